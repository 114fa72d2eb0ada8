"""The encoder contract of what reads X-CLIP and PE: long, since every check runs the whole network."""

from __future__ import annotations

import pytest

from mmrep.config import component
from mmrep.testing import check_encoder
from tests.hub import joint_toys

SAME = "the frames' class tokens are still the same before the first block, whatever weighs them"
NO_GRADIENT = {f"*.layers.0.message_attn.{part}.*": SAME for part in ("q_proj", "k_proj")}
MAKE = {
    "xclip": joint_toys.xclip,
    "pe_audio": lambda folder: joint_toys.pe("pe_audio", folder),
    "pe_video": lambda folder: joint_toys.pe("pe_video", folder),
    "pe_audio_video": lambda folder: joint_toys.pe("pe_audio_video", folder),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "encoder", "fields"), [
    ("xclip", "hf-video", {}), ("xclip", "hf-text", {}), ("pe_audio", "hf-audio", {}),
    ("pe_video", "hf-video", {"sampling": "ends"}), ("pe_audio_video", "hf-text", {"space": "video"}),
])  # fmt: skip
def test_contract(kind, encoder, fields, tmp_path):
    MAKE[kind](tmp_path)
    built = component("encoders", encoder, path=str(tmp_path), local_files_only=True, **fields).build()
    check_encoder(built, n=3, no_gradient=NO_GRADIENT if (kind, encoder) == ("xclip", "hf-video") else None)

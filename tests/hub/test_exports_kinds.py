"""Checkpoints that a bridge reads, out again: equal in transformers' layout, or refused by what has no place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mmrep
from mmrep.hub.exports.export import ExportError
from tests.hub.library_calls import KINDS

WRITTEN = (
    "dinov2-registers",
    "data2vec",
    "mae",
    "hiera",
    "wav2vec2",
    "timesformer",
    "patchtst",
    "timesfm",
    "timesfm2_5",
)
REFUSED = {
    "clap": {None: "audio: clap, text: clap", "audio": r"part of a larger one \(clap\)"},
    "xclip": {None: "video: xclip, text: xclip", "video": r"\(xclip\)", "text": r"\(xclip\)"},
    "pe_audio": {None: "audio: pe_audio, text: PE", "audio": r"\(pe_audio\)", "text": r"part of a larger one \(PE"},
    "pe_video": {"video": r"\(pe_video\)"},
    "clip-projected": {None: r"\(clip\)"},
    "vjepa2": {None: "an encoder of two halves"},
}  # fmt: skip
"""What transformers has no place for, by kind and tower (None: all)."""


def trained(kind, folder):
    """The model of one kind with other values than those of its checkpoint, and raw values for its towers."""
    _, raws, call = KINDS[kind](folder)
    ours = mmrep.load(folder)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.02)
    return ours, raws, call


@pytest.mark.parametrize("kind", WRITTEN)
def test_transformers_reads_it(kind, tmp_path):
    import transformers

    ours, raws, call = trained(kind, tmp_path / "in")
    folder = ours.export("hf", tmp_path / "out")
    theirs, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert [name for name in report["missing_keys"] if not name.startswith("pooler.")] == []
    again = mmrep.load(folder)
    for name, raw in raws.items():
        np.testing.assert_array_equal(again.encode(raw, name), ours.encode(raw, name))
    if not kind.startswith("timesfm"):  # whose call begins with what AutoModel leaves out
        with torch.no_grad():
            wanted = call(theirs.eval())
        for name, raw in raws.items():
            np.testing.assert_allclose(ours.encode(raw, name), wanted[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_transformers_has_no_place_for_is_refused(kind, tmp_path):
    ours, _, _ = trained(kind, tmp_path / "in")
    for tower, message in REFUSED[kind].items():
        with pytest.raises(ExportError, match=message):
            ours.export("hf", tmp_path / "out", tower=tower)
        if tower is not None:
            reason = "a part of a joint model" if tower == "text" else "no transformer of"
            with pytest.raises(ExportError, match=reason):
                ours.export("sentence-transformers", tmp_path / "out", tower=tower)
        assert not (tmp_path / "out").exists()


def test_t5s_encoder_is_what_sentence_transformers_builds(tmp_path):
    """Saved as it is, the library finds none of its names and begins with random values."""
    from sentence_transformers import SentenceTransformer

    ours, raws, _ = trained("t5", tmp_path / "in")
    theirs = SentenceTransformer(str(ours.export("sentence-transformers", tmp_path / "out")), device="cpu")
    np.testing.assert_allclose(theirs.encode(raws["text"]), ours.encode(raws["text"]), atol=2e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tower", "reason"), [
    ("data2vec", "image", None), ("mae", "image", "must match the size of tensor"),
    ("timesfm", "time_series", "aten::cummax"),
])  # fmt: skip
def test_as_a_graph_it_is_equal_or_refused(kind, tower, reason, tmp_path, capsys):
    ours, _, _ = trained(kind, tmp_path / "in")
    if reason is None:
        assert (ours.export("onnx", tmp_path / "out", tower=tower) / f"{tower}.onnx").is_file()  # compared by itself
        return
    with pytest.raises(ExportError, match=rf"cannot be written as ONNX: captured: .+; traced: .*{reason}") as error:
        ours.export("onnx", tmp_path / "out", tower=tower)
    assert "draft_export" not in str(error.value)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()

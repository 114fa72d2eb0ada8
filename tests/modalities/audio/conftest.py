"""Tiny Hugging Face audio models in folders, as a user would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from audio_tiny_hf import make


@pytest.fixture(scope="session")
def hf_audio_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``hf_audio_folder("whisper")``: a folder with a tiny random model and its feature extractor."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            model, extractor = make(kind)
            for parameter in model.parameters():  # tiny initial weights would hide what does not reach the output
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
            extractor.save_pretrained(made[kind])
        return made[kind]

    return folder

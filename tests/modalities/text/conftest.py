"""Tiny Hugging Face models in folders, as a user would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_hf import make


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``hf_folder("bert")``: a folder with a tiny random model and its tokenizer."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            model, words = make(kind)
            for parameter in model.parameters():  # tiny initial weights would hide what does not reach the output
                torch.nn.init.normal_(parameter, std=0.3)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
            words.save_pretrained(made[kind])
        return made[kind]

    return folder

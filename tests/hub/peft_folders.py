"""Adapters of peft for tiny random models, saved by peft, and what its own library computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf

LORA = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "r": 4, "lora_alpha": 12}


def base(kind: str, folder: Path) -> Path:
    """A tiny model of transformers, with tokenizer or processor or both."""
    if kind in ("clip", "siglip", "vit", "dinov2"):
        image_tiny_hf.save(kind, folder)
    if kind not in ("vit", "dinov2"):
        torch.manual_seed(0)
        model, tokenizer = tiny_hf.make(kind)
        if kind not in ("clip", "siglip"):
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def adapter(where: Path, folder: Path, model: Any = None, **options: Any) -> Path:
    """Peft's own folder of an adapter for the base in ``where``, with random values in all that it trains."""
    import peft
    import transformers

    network = transformers.AutoModel.from_pretrained(where) if model is None else model
    usual = LORA if options.get("peft_type", "LORA") == "LORA" else {"task_type": LORA["task_type"]}
    made = peft.get_peft_model(network, peft.get_peft_config({**usual, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(folder)
    return folder


@torch.no_grad()
def theirs(where: Path, folder: Path, inputs: Any, cls: str = "AutoModel") -> Any:
    """What peft's model of the two gives."""
    import peft
    import transformers

    network = getattr(transformers, cls).from_pretrained(where)
    return peft.PeftModel.from_pretrained(network, str(folder)).eval()(**inputs)

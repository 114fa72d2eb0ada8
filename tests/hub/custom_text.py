"""A tiny model of text whose code is in its own repository; the code leaves a mark where it runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.modalities.text import tiny_hf

CONFIGURATION = """
import os
from transformers import PretrainedConfig


def mark():
    if "CUSTOM_TEXT_MARK" in os.environ:
        open(os.environ["CUSTOM_TEXT_MARK"], "w").close()


mark()


class CustomConfig(PretrainedConfig):
    model_type = "custom-text"

    def __init__(self, vocab_size=60, hidden_size=8, num_hidden_layers=1, **others):
        mark()
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**others)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_custom import CustomConfig


class CustomModel(PreTrainedModel):
    config_class = CustomConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size)])
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, output_hidden_states=False, **others):
        first = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        last = torch.tanh(self.layers[0](first))
        return BaseModelOutput(last_hidden_state=last, hidden_states=(first, last) if output_hidden_states else None)
"""


def write(folder: Path, *, repository: str = "") -> dict[str, torch.Tensor]:
    """Fill a folder; ``repository`` stands before the names of its modules. The weights."""
    folder.mkdir(exist_ok=True)
    document = {
        "model_type": "custom-text", "architectures": ["CustomModel"], "hidden_size": 8, "vocab_size": 60,
        "num_hidden_layers": 1, "auto_map": {
            "AutoConfig": f"{repository}configuration_custom.CustomConfig",
            "AutoModel": f"{repository}modeling_custom.CustomModel",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "configuration_custom.py").write_text(CONFIGURATION)
    (folder / "modeling_custom.py").write_text(MODELING)
    tiny_hf.tokenizer("both").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = {"table.weight": (60, 8), "layers.0.weight": (8, 8), "layers.0.bias": (8,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights

"""Blocks computed again: the same loss and gradient, dropout and statistics included, and less that is kept."""

from __future__ import annotations

import copy

import pytest
import torch

from mmrep.checkpointing import checkpoint_blocks
from mmrep.config import ConfigError, component
from mmrep.model import Model, ModelConfig
from mmrep.objectives.root import Root
from mmrep.tower import TowerConfig
from tests.modalities.text.tiny_hf import make
from tests.training.toys import ToyRoot, toy_trainer

VIT = {"type": "image-vit", "size": 8, "patch": 2, "width": 16, "depth": 3, "heads": 2, "dropout": 0.2,
       "drop_path": 0.2}  # fmt: skip
ENCODERS = {
    "ours": VIT,
    "causal": {"type": "text-transformer", "tokenizer": "bytes", "width": 16, "depth": 2, "heads": 2, "dropout": 0.2},
    "cnn": {"type": "image-cnn", "size": 16, "widths": [8, 8], "depths": [2, 2], "norm": "batch"},
    "timm": {"type": "timm", "model": "test_vit", "size": 160, "options": {"drop_path_rate": 0.2}},
    "frames": {"type": "video-frames", "encoder": VIT, "frames": 4, "depth": 1, "heads": 2},
    "bert": {"type": "hf-text"},
    "llama": {"type": "hf-text"},
    "t5-encoder": {"type": "hf-text"},
}


@pytest.fixture(params=ENCODERS)
def encoder(request, tmp_path):
    chosen = dict(ENCODERS[request.param])
    torch.manual_seed(0)
    if chosen["type"] == "hf-text":
        for part in make(request.param):
            part.save_pretrained(tmp_path)
        chosen["path"] = str(tmp_path)
    return component("encoders", **chosen).build().train()


def measured(encoder):
    """The loss, the gradients and the buffers after one backward pass, and the bytes that were kept for it."""
    kept: dict[int, int] = {}

    def pack(value):
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    inputs = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(6, 0)])
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = encoder(inputs).tokens.values.sin().sum()
    size = sum(bytes for place, bytes in kept.items() if place not in own)
    loss.backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(encoder.named_buffers()), size, torch.get_rng_state()


def test_the_gradient_is_the_same_to_the_bit_and_less_is_kept(encoder):
    again = copy.deepcopy(encoder)
    assert checkpoint_blocks(again)
    (loss, gradients, buffers, size, _), (loss2, gradients2, buffers2, size2, _) = measured(encoder), measured(again)
    assert torch.equal(loss, loss2)
    assert gradients.keys() == gradients2.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], gradients2[name])] == []
    assert [name for name in buffers if not torch.equal(buffers[name], buffers2[name])] == []
    assert size2 < 0.7 * size
    assert again.state_dict().keys() == encoder.state_dict().keys()


def test_a_copy_runs_its_own_blocks():
    encoder = component("encoders", **VIT).build().train()
    checkpoint_blocks(encoder)
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    inputs = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(2, 0)])
    assert not twin(inputs).tokens.values.any()
    twin(inputs).tokens.values.sum().backward()
    assert all(p.grad is None for p in encoder.parameters())
    with torch.no_grad():
        assert encoder(inputs).tokens.values.any()


def root(**towers):
    made = {name: TowerConfig(encoder=component("encoders", **chosen)) for name, chosen in towers.items()}
    pair = component("objectives", "contrastive", pairs=[{"between": ["x", "y"]}])
    return Root(Model(ModelConfig(dim=4, towers=made)), [pair], fields={"x": "a", "y": "b"}, views={})


def test_what_has_no_blocks_is_told_and_a_model_without_any_is_refused(caplog):
    root(a=VIT, b={"type": "features"}).checkpoint_encoders()
    assert "tower b: no blocks that can be computed again" in caplog.text
    with pytest.raises(ConfigError, match=r"train\.checkpointing: no encoder that trains"):
        root(a={"type": "features"}, b={"type": "features"}).checkpoint_encoders()


def test_the_trainer_asks_for_it():
    asked = ToyRoot()
    asked.checkpoint_encoders = lambda: setattr(asked, "was_asked", True)
    toy_trainer(root=asked)
    assert not hasattr(asked, "was_asked")
    toy_trainer(root=asked, checkpointing=True)
    assert asked.was_asked

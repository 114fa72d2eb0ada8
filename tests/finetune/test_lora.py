"""LoRA, DoRA and (IA)^3 by their formulas, in every kind of encoder: trained, saved, merged, and begun from."""

from __future__ import annotations

import dataclasses
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mmrep
from mmrep._unused import freeze_unused
from mmrep.config import ConfigError, component, parse
from mmrep.embed.store import tower_digest
from mmrep.finetune._attention import CalledAttention
from mmrep.finetune._through_peft import inside, is_linear
from mmrep.finetune.adapter import merged
from mmrep.hub.start import Start
from mmrep.model import Model, ModelConfig, parameter_counts
from mmrep.registry import MissingPackageError
from mmrep.tower import TowerConfig
from mmrep.training.optim import OptimConfig, build_optimizer
from tests.modalities.text.tiny_hf import make

VIT = {"type": "image-vit", "size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2}
ENCODERS = {
    "image-vit": VIT,
    "timm": {"type": "timm", "model": "test_vit", "size": 160},
    "open-clip-image": {"type": "open-clip-image", "model": "mmrep-tune"},
    "open-clip-text": {"type": "open-clip-text", "model": "mmrep-tune"},
}
NORMS = {"bert": "*LayerNorm*", "gpt2": "*ln_f*", "open-clip-image": "*ln_post*", "open-clip-text": "*ln_final*"}
LORA = {"type": "lora", "rank": 4, "alpha": 6.0}
DORA = {**LORA, "dora": True, "also": ["*norm*"]}
IA3 = {"type": "ia3", "also": ["*norm*"]}


def added(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in name or ".ia3_l." in name


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory):
    """A tiny open_clip model, both of whose towers have torch's own attention."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    words = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    made = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": words}
    (folder / "mmrep-tune.json").write_text(json.dumps(made))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """``text("bert")``: an encoder config of a tiny model in the hub's layout."""

    def config(kind: str) -> dict:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        for part in make(kind):
            part.save_pretrained(folder)
        return {"type": "hf-text", "path": str(folder)}

    made = {kind: config(kind) for kind in ("bert", "gpt2")}
    return made.__getitem__


def build(adapter=None, encoder=VIT, seed=0, **fields) -> Model:
    torch.manual_seed(seed)
    tower = {"encoder": encoder, "adapter": adapter, **fields}
    towers = {"a": parse(TowerConfig, tower), "b": parse(TowerConfig, {"encoder": VIT})}
    return Model(ModelConfig(dim=4, towers=towers)).eval()


def trained(model, steps=3, seed=1):
    """After some steps of an optimizer with decay, away from where it began."""
    optimizer, tower = build_optimizer(model, OptimConfig(lr=0.05)), model.tower("a").train()
    inputs = tower.encoder.collate([tower.encoder.prepare(raw) for raw in tower.encoder.examples(3, 0)])
    target = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        (tower(inputs) - target).square().sum().backward()
        optimizer.step()
    return model.eval()


def encode(model):
    return model.encode(model.tower("a").encoder.examples(3, 5), "a")


@pytest.mark.parametrize("adapter", [LORA, DORA, IA3], ids=["lora", "dora", "ia3"])
@pytest.mark.parametrize("kind", [*ENCODERS, "bert", "gpt2"])
def test_it_begins_as_the_plain_model_trains_alone_and_is_saved_and_merged_whole(kind, adapter, text, tmp_path):
    encoder = ENCODERS[kind] if kind in ENCODERS else text(kind)
    norms = NORMS.get(kind, "*norm*")
    adapter = {**adapter, "also": [norms]} if "also" in adapter else adapter
    plain, model = build(None, encoder), build(adapter, encoder)
    np.testing.assert_allclose(encode(model), encode(plain), atol=1e-6)
    assert torch.equal(model.tower("b").projector.map.weight, plain.tower("b").projector.map.weight)  # built as before
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert freeze_unused(model) == {}  # every weight of the adapter is used
    trained(model)
    moved = {n.removeprefix("towers.a.") for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    named = {name.removeprefix("towers.a.") for name in before if name.startswith("towers.a.")}
    also = {n for n in named if "also" in adapter and fnmatchcase(n, f"encoder.{norms}") and not added(n)}
    assert also or "also" not in adapter
    assert moved == {n for n in named if added(n) or n.startswith("projector")} | also
    # Apart: base and adapter.
    model.save_pretrained(tmp_path / "apart")
    loaded = mmrep.load(tmp_path / "apart")
    np.testing.assert_array_equal(encode(loaded), encode(model))
    assert loaded.config == model.config
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    suffixes = {p.suffix for p in (tmp_path / "apart").rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".txt"}
    # Merged.
    one = model.merged()
    assert one.state_dict().keys() == plain.state_dict().keys()
    np.testing.assert_allclose(encode(one), encode(model), atol=2e-6)
    assert abs(encode(one) - encode(plain)).max() > 0.05
    assert one.config == plain.config
    assert all(p.requires_grad for p in one.parameters())
    one.save_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(encode(mmrep.load(tmp_path / "merged")), encode(one))
    assert any(map(added, model.state_dict()))  # the merged one is a copy


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "heads", "padding"])
def test_torchs_attention_of_called_layers_is_the_same(mask, batch_first):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        theirs.out_proj.bias.normal_()
    x = torch.randn(3, 5, 8, dtype=torch.float64) if batch_first else torch.randn(5, 3, 8, dtype=torch.float64)
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    options = {
        "none": {},
        "causal": {"attn_mask": torch.zeros(5, 5, dtype=torch.float64).masked_fill(causal, -torch.inf)},
        "bool": {"attn_mask": causal},
        "heads": {"attn_mask": torch.randn(6, 5, 5, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding, "attn_mask": causal},
    }[mask]
    ours = CalledAttention(theirs)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = theirs(a, a, a, need_weights=False, **options)[0], ours(b, b, b, **options)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(found)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert ours.original() is theirs
    with pytest.raises(ValueError, match="self-attention only"):
        ours(x, x.clone(), x)


def test_what_an_attention_holds_that_cannot_be_replaced_is_no_target():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, add_zero_attn=True)
            self.linear = nn.Linear(8, 8)

        def layer_modules(self):
            return [self]

    assert not CalledAttention.can_replace(Block().attention)
    assert [name for name, _ in inside(Block(), is_linear)] == ["linear"]


def test_weights_that_the_encoder_passes_by_are_refused(monkeypatch):
    model = build({**LORA, "targets": ["*.attention.out"]})
    for block in model.tower("a").encoder.transformer.blocks:
        block.attention.out.forward = lambda x, out=block.attention.out: F.linear(x, out.weight, out.bias)
    with pytest.raises(
        ConfigError, match=r"towers\.a\.adapter: the encoder passes by encoder\.transformer.*attention\.out"
    ):
        freeze_unused(model)


@pytest.mark.parametrize("dora", [False, True])
def test_value_and_gradient_are_those_of_the_formula(dora):
    """W + alpha / r B A; of DoRA m times that over the norm of its rows, which is held constant in the gradient."""
    model = build({**LORA, "dora": dora}).double()
    layer = model.tower("a").encoder.transformer.blocks[0].attention.qkv
    parts = {name: p for name, p in layer.named_parameters()}
    A, B = parts["lora_A.default.weight"], parts["lora_B.default.weight"]
    W, bias = parts["base_layer.weight"], parts["base_layer.bias"]
    assert A.shape == (4, 16)
    assert B.shape == (48, 4)  # queries, keys and values at once
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        for p in parts.values():
            p.copy_(torch.randn_like(p))
    mine = {n: p.detach().clone().requires_grad_() for n, p in parts.items()}
    A, B = mine["lora_A.default.weight"], mine["lora_B.default.weight"]
    weight = W.detach() + 6.0 / 4 * B @ A
    if dora:
        m = mine["lora_magnitude_vector.default.weight"]
        weight = m[:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
    expected, found = F.linear(x, weight, bias.detach()), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    for name, p in parts.items():
        if "lora" in name:
            torch.testing.assert_close(p.grad, mine[name].grad, rtol=1e-10, atol=1e-12)
        else:
            assert p.grad is None


def test_what_holds_nothing_that_trains_is_in_eval_mode():
    model = build({**LORA, "targets": ["*.blocks.1.*"]}, {**VIT, "dropout": 0.5}).train()
    blocks = model.tower("a").encoder.transformer.blocks
    assert not blocks[0].dropout.training
    assert blocks[1].dropout.training
    assert not blocks[1].norm1.training
    assert model.tower("a").projector.training


def test_targets_are_named_by_patterns_and_counted():
    whole, some = build(LORA), build({**LORA, "targets": ["*.qkv", "patches"]})
    added = {n for n in some.state_dict() if ".lora_A." in n}
    assert {n.split(".encoder.")[1].split(".lora_")[0] for n in added} == {
        "transformer.blocks.0.attention.qkv", "transformer.blocks.1.attention.qkv", "patches",
    }  # fmt: skip
    per_block = 4 * (16 + 48) + 4 * (16 + 16) + 4 * (16 + 64) + 4 * (64 + 16)
    plain = parameter_counts(build())["a"][0]
    projector = 16 * 4
    assert parameter_counts(whole)["a"] == (plain + 2 * per_block, 2 * per_block + projector)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"targets": ["*.qvk"]}, r"towers\.a: adapter\.targets: nothing that it could name matches '\*\.qvk'"),
        ({"also": ["nrom.*"]}, r"adapter\.also: nothing .* 'nrom\.\*'; did you mean 'norm\.\*'"),
        ({"also": ["*.qkv.weight"]}, r"adapter\.also: 'transformer.*qkv\.weight' has an adapter already"),
    ],
)
def test_what_names_nothing_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        build({**LORA, **fields})


def test_an_encoder_without_layers_says_what_could_be_named():
    rows = {"type": "features"}
    with pytest.raises(ConfigError, match=r"Features has no linear layers in its layers; say which modules, of map"):
        build(LORA, rows)
    assert build({**LORA, "targets": ["map"]}, rows)


def test_a_frozen_encoder_with_an_adapter_is_refused_and_a_frozen_tower_rests_whole():
    with pytest.raises(ConfigError, match="frozen: true would keep the adapter from training"):
        build(LORA, frozen=True)
    tower = build(LORA, frozen="tower").tower("a")
    assert tower.frozen
    assert not any(p.requires_grad for p in tower.parameters())
    names = {n for n, p in build(LORA, frozen=1).tower("a").named_parameters() if p.requires_grad}
    assert {n.split(".")[3] for n in names if "lora" in n} == {"1"}


def test_kept_features_depend_on_alpha():
    a, b = (build({**LORA, "alpha": alpha}, frozen="tower").tower("a") for alpha in (6.0, 8.0))
    b.load_state_dict(a.state_dict())
    assert tower_digest(a) != tower_digest(b)
    assert tower_digest(a) == tower_digest(build(LORA, frozen="tower").tower("a"))


@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_without_peft_it_says_what_to_install(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r'pip install "mmrep\[lora\]"'):
        build(adapter)


def begun(folder: Path, adapter, seed=7) -> Model:
    """A model of other random weights that begins from the saved one."""
    model = build(adapter, seed=seed)
    Start(str(folder), model.config).fill(model)
    return model.eval()


@pytest.mark.parametrize("adapter", [LORA, {**LORA, "dora": True}, {"type": "ia3"}], ids=["lora", "dora", "ia3"])
def test_beginning_from_a_saved_model_with_and_without_an_adapter(adapter, tmp_path):
    plain, tuned = trained(build()), trained(build(adapter))
    plain.save_pretrained(tmp_path / "plain")
    tuned.save_pretrained(tmp_path / "tuned")
    np.testing.assert_allclose(encode(begun(tmp_path / "plain", adapter)), encode(plain), atol=1e-6)
    np.testing.assert_array_equal(encode(begun(tmp_path / "tuned", adapter)), encode(tuned))
    np.testing.assert_allclose(encode(begun(tmp_path / "tuned", None)), encode(tuned), atol=2e-6)
    other = begun(tmp_path / "tuned", {**LORA, "rank": 2})  # the old one is in the weights, a new one begins
    np.testing.assert_allclose(encode(other), encode(tuned), atol=2e-6)
    assert {p.shape[0] for n, p in other.named_parameters() if "lora_A" in n} == {2}


def test_a_saved_model_that_lacks_weights_is_still_refused(tmp_path):
    build().save_pretrained(tmp_path / "plain")
    start = Start(str(tmp_path / "plain"), build(LORA).config)
    weights = start._weights()
    start._weights = lambda: {k: v for k, v in weights.items() if not k.endswith("blocks.0.attention.qkv.weight")}
    with pytest.raises(ConfigError, match=r"no fitting values for .*qkv\.base_layer\.weight"):
        start.fill(build(LORA))


def test_only_the_named_towers_are_merged_and_a_resting_part_of_an_encoder_rests_on():
    frames = {"type": "video-frames", "encoder": VIT, "frames": 4, "depth": 1, "heads": 2, "frozen_frames": True}
    model = build({**LORA, "targets": ["transformer.*.qkv"]}, frames)
    two = dataclasses.replace(model.config, towers={**model.config.towers, "b": dataclasses.replace(
        model.config.towers["b"], adapter=component("adapters", "lora"))})  # fmt: skip
    model = Model(two)
    some = merged(model, ["a"])
    assert [tower.adapter is None for tower in some.config.towers.values()] == [True, False]
    assert {n for n, p in some.named_parameters() if not p.requires_grad and n.startswith("towers.a.")} == {
        n for n, _ in some.named_parameters() if n.startswith("towers.a.encoder.inner.")
    }


def test_scales_are_those_of_the_formula():
    """Keys and values: l * (W x + b). The second layer of a feed-forward: W (l * x) + b. Nothing else."""
    model = build({"type": "ia3"}).double()
    block = model.tower("a").encoder.transformer.blocks[1]
    scaled = {name: part for name, part in block.named_modules() if hasattr(part, "ia3_l")}
    assert [part.is_feedforward for part in scaled.values()] == [False, True]
    x = torch.randn(5, 16, dtype=torch.float64)
    for part, given in zip(scaled.values(), (x, torch.randn(5, 64, dtype=torch.float64)), strict=True):
        layer, scale = part.base_layer, part.ia3_l["default"]
        assert torch.equal(scale, torch.ones_like(scale))
        with torch.no_grad():
            scale.copy_(torch.randn_like(scale))
        mine = scale.detach().flatten().requires_grad_()
        if part.is_feedforward:
            expected = F.linear(given * mine, layer.weight.detach(), layer.bias.detach())
        else:
            expected = mine * F.linear(given, layer.weight.detach(), layer.bias.detach())
        found = part(given)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        found.sin().sum().backward()
        expected.sin().sum().backward()
        torch.testing.assert_close(scale.grad.flatten(), mine.grad, rtol=1e-10, atol=1e-12)
        assert layer.weight.grad is None


def test_scales_do_not_decay_though_they_are_matrices():
    """Decay would draw them to zero, which is not nothing to a factor."""
    model = build({"type": "ia3"})
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    scales = {name: p for name, p in model.named_parameters() if ".ia3_l." in name}
    assert {p.ndim for p in scales.values()} == {2}
    assert {decay[name] for name in scales} == {0.0}
    assert decay["towers.a.projector.map.weight"] == 0.5


def test_which_side_is_scaled_goes_by_the_whole_name():
    """Of a list peft would take every layer whose name ends as one of it does."""
    model = build({"type": "ia3", "targets": ["patches"], "feedforward": ["transformer.blocks.1.*.out"]})
    sides = {n: part.is_feedforward for n, part in model.tower("a").encoder.named_modules() if hasattr(part, "ia3_l")}
    assert sides == {"patches": False, "transformer.blocks.1.attention.out": True}


def test_convolutions_are_scaled_and_merged():
    cnn = {"type": "image-cnn", "size": 16, "widths": [8], "depths": [1], "norm": "group"}
    able = [n for n, part in build(None, cnn).tower("a").encoder.named_modules() if isinstance(part, nn.Conv2d)]
    model = trained(build({"type": "ia3", "targets": able[:1], "feedforward": able[1:2]}, cnn))
    np.testing.assert_allclose(encode(model.merged()), encode(model), atol=2e-6)
    assert abs(encode(model) - encode(build(None, cnn))).max() > 0.01


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"targets": ["*.qkv"], "feedforward": ["*.qkv"]}, r"feedforward: '.*qkv' is among targets"),
        ({"feedforward": ["*.fc9"]}, r"adapter\.feedforward: nothing that it could name matches '\*\.fc9'"),
        ({"targets": ["*.kv"]}, r"adapter\.targets: nothing that it could name matches '\*\.kv'"),
    ],
)
def test_scales_of_nothing_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        build({"type": "ia3", **fields})


def test_keys_and_values_that_are_not_known_by_name_are_asked_for():
    with pytest.raises(ConfigError, match=r"no layer of Features is called by a name .* say which, of map"):
        build({"type": "ia3"}, {"type": "features"})

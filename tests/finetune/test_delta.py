"""Fusion by deviation: against a loop, what stays, and that it is not the mean."""

from __future__ import annotations

import copy

import pytest
import torch

import mmrep
from mmrep.config import ConfigError
from mmrep.finetune._command import merge
from mmrep.finetune.delta import fuse_by_delta
from mmrep.finetune.merge import soup
from tests.finetune.test_merge import model, moved


@pytest.mark.parametrize("by", ["tensor", "element"])
def test_each_checkpoint_weighs_by_how_far_it_has_moved(by):
    base = model()
    tuned = [moved(base, 1), moved(base, 2, scale=0.05)]
    start = base.state_dict()
    still = [name for name in start if name.startswith("towers.a.projector")]
    one = [name for name in start if name.startswith("towers.b.projector")]
    tuned[0].load_state_dict({name: start[name] for name in still}, strict=False)
    tuned[1].load_state_dict({name: start[name] for name in [*still, *one]}, strict=False)
    merged = fuse_by_delta(base, tuned, by=by)
    states, found = [m.state_dict() for m in tuned], merged.state_dict()
    for name, value in start.items():
        moves = [state[name].double() - value.double() for state in states]
        sizes = [m.norm() if by == "tensor" else m.abs() for m in moves]
        total = sum(sizes)
        wanted = value.double() + sum(torch.nan_to_num(s / total) * m for s, m in zip(sizes, moves, strict=True))
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-7)
    assert still
    assert one
    assert all(torch.equal(found[name], start[name]) for name in still)
    assert all(torch.allclose(found[name], states[0][name]) for name in one)
    mean = soup(tuned).state_dict()
    assert not all(torch.allclose(found[name], mean[name]) for name in start)


def test_one_checkpoint_is_itself_and_inputs_are_left_alone():
    base = model()
    other = moved(base, 1)
    before = copy.deepcopy(base.state_dict())
    merged = fuse_by_delta(base, [other])
    for name, value in other.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="by: 'tensor' or 'element', got 'layer'"):
        fuse_by_delta(model(), [model()], by="layer")
    with pytest.raises(ConfigError, match="one tuned model at least"):
        fuse_by_delta(model(), [])
    with pytest.raises(ConfigError, match="models of one architecture"):
        fuse_by_delta(model(), [model(width=12)])


def test_the_command_fuses_saved_models_and_refuses_what_does_not_go_together(tmp_path):
    base = model()
    named = {"base": base, "a": moved(base, 1), "b": moved(base, 2, scale=0.05)}
    for name, one in named.items():
        one.save_pretrained(tmp_path / name)
    folders, options = [str(tmp_path / name) for name in "ab"], {"alpha": None, "base": str(tmp_path / "base")}
    said = merge(folders, tmp_path / "out", **options, scale=(), by_delta=True)
    assert "--by-delta" in said
    found = mmrep.load(str(tmp_path / "out")).state_dict()
    for name, value in fuse_by_delta(base, [named["a"], named["b"]]).state_dict().items():
        torch.testing.assert_close(found[name], value)
    for wrong in ({"scale": (0.5, 0.5)}, {"base": None, "scale": ()}):
        with pytest.raises(ConfigError, match="--by-delta: goes with --base"):
            merge(folders, tmp_path / "other", **{**options, **wrong}, by_delta=True)

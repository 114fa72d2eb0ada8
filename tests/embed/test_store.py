"""Features of frozen towers on disk: found again only where encoder, weights, pool and prepared input are the same."""

from __future__ import annotations

import copy

import pytest
import torch

from mmrep.config import component
from mmrep.embed.memo import Memo, content_key
from mmrep.embed.store import FeatureStore, tower_digest
from mmrep.model import Tower, TowerConfig
from tests import toys

CPU = torch.device("cpu")
ITEMS = [toys.ToyEncoder(toys.ToyConfig()).prepare(raw) for raw in ([1.0], [0.5, -1.0], [2.0], [0.1, 0.2, 0.3])]
KEYS = [content_key(item) for item in ITEMS]


def tower(seed: int = 0, pool: str = "mean", **fields) -> Tower:
    torch.manual_seed(seed)
    config = TowerConfig(encoder=component("encoders", "toy", **fields), pool=component("pools", pool), frozen=True)
    return Tower(config, 4).eval()


class Counted(Tower):
    """Counts the values that it embeds."""

    seen = 0

    def features(self, inputs):
        self.seen += len(inputs["values"])
        return super().features(inputs)


def counted() -> Counted:
    torch.manual_seed(0)
    return Counted(TowerConfig(encoder=component("encoders", "toy"), frozen=True), 4).eval()


def ask(folder, built: Tower, rows: slice = slice(None)) -> torch.Tensor:
    store = FeatureStore(folder)
    found = Memo(store=store).features(built, KEYS[rows], ITEMS[rows], CPU)
    store.flush()
    return found


def test_a_second_run_computes_nothing_and_gets_the_same_bits(tmp_path):
    first, second = counted(), counted()
    expected = ask(tmp_path, first)
    assert first.seen == 4
    assert torch.equal(ask(tmp_path, second), expected)
    assert second.seen == 0


def test_only_what_is_new_is_computed(tmp_path):
    ask(tmp_path, counted(), slice(0, 2))
    second = counted()
    found = ask(tmp_path, second)
    assert second.seen == 2
    torch.testing.assert_close(found, ask(tmp_path / "fresh", counted()), rtol=1e-6, atol=1e-7)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


@pytest.mark.parametrize(
    "other", [tower(seed=1), tower(pool="last"), tower(depth=1)], ids=["weights", "pool", "encoder"]
)
def test_another_tower_is_another_key(tmp_path, other):
    ask(tmp_path, tower())
    found = ask(tmp_path, other)
    torch.testing.assert_close(found, Memo().features(other, KEYS, ITEMS, CPU))
    assert tower_digest(other) != tower_digest(tower())
    assert tower_digest(tower()) == tower_digest(copy.deepcopy(tower()))


def test_the_projector_does_not_count():
    changed = tower()
    torch.nn.init.zeros_(changed.projector.map.weight)
    assert tower_digest(changed) == tower_digest(tower())


def test_a_damaged_file_is_computed_again(tmp_path, caplog):
    expected = ask(tmp_path, counted())
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    second = counted()
    assert torch.equal(ask(tmp_path, second), expected)
    assert second.seen == 4
    assert "computed again" in caplog.text


def test_features_are_written_as_they_come_and_nothing_half_written_is_seen(tmp_path):
    store = FeatureStore(tmp_path, every=2)
    Memo(store=store, batch_size=1).features(counted(), KEYS, ITEMS, CPU)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
    assert not [p for p in tmp_path.glob("*/.*")]
    store.flush()
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2

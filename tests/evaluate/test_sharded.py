"""Evaluation on several processes is exact: each record is embedded once, and the set is that of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmrep.config import component
from mmrep.data.sample import Quarantined, Sample
from mmrep.data.source import Source, SourceConfig
from mmrep.encoder import BadSampleError
from mmrep.evaluate._errands import Errands
from mmrep.evaluate._parts import Part, merge
from mmrep.evaluate.encoded import encode_source, encode_together
from mmrep.evaluate.retrieval import retrieval_metrics
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.training.collectives import world
from tests import toys  # noqa: F401 (it registers the toy encoder)
from tests.ranks import run_ranks

FIELDS = {"left": "numbers", "right": "numbers"}


class Numbers(Source):
    """Records of two fields: some lack one, two cannot be read at all, two not be prepared."""

    Config = SourceConfig

    def __init__(self, n=23):
        super().__init__(SourceConfig())
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in (4, 11):
            raise BadSampleError("torn", f"record {index}")
        values: list[list[float] | None] = [
            [(index * 7 + j * 3 + side) % 13 / 6 - 1 for j in range(1 + (index + side) % 4)] for side in (0, 5)
        ]
        if index % 6 == 1:
            values[0] = None
        if index in (8, 21):
            values[1] = []  # which the encoder cannot read
        return Sample(f"n{index}", {"left": values[0], "right": values[1]}, label=index % 3, group=index // 2)


class NumberStream(Numbers):
    """The same as a stream; its parts are whole shards, so that they do not interleave to the source's order."""

    streaming = True

    def stream(self, part=0, parts=1, seed=None):
        for shard in range(part, 3, parts):
            for index in range(shard * 8, min(self.n, shard * 8 + 8)):
                yield self.record(index)


def model():
    torch.manual_seed(0)
    tower = TowerConfig(encoder=component("encoders", "toy"))
    return Model(ModelConfig(dim=6, towers={"numbers": tower}))


def plain(encoded) -> Any:
    return encoded and {
        "ids": [sample.id for sample in encoded.samples],
        "raw": [sample.fields for sample in encoded.samples],
        "embeddings": {name: value.tolist() for name, value in encoded.embeddings.items()},
        "present": {name: value.tolist() for name, value in encoded.present.items()},
        "bad": [(note.id, note.cause) for note in encoded.quarantined],
    }


def together(limit):
    """As each process sees it; a batch of two makes many batches, of other samples than one process has."""
    return [
        plain(encode_together(model(), kind(), FIELDS, batch_size=2, limit=limit)) for kind in (Numbers, NumberStream)
    ]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("limit", [None, 10])
def test_the_set_is_that_of_one_process(tmp_path, size, limit):
    found = run_ranks(together, size, tmp_path, limit)
    assert found[1:] == [[None, None]] * (size - 1)
    for kind, seen in zip((Numbers, NumberStream), found[0], strict=True):
        expected = plain(encode_source(model(), kind(), FIELDS, batch_size=2, limit=limit))
        for key in ("ids", "raw", "present"):
            assert seen[key] == expected[key]
        assert [tuple(note) for note in seen["bad"]] == expected["bad"]
        assert len(seen["bad"]) == (4 if limit is None else 2)
        for name, value in expected["embeddings"].items():
            np.testing.assert_allclose(seen["embeddings"][name], value, rtol=1e-5, atol=1e-6)


def test_one_process_needs_no_group():
    assert plain(encode_together(model(), Numbers(), FIELDS)) == plain(encode_source(model(), Numbers(), FIELDS))


def test_every_record_is_there_once():
    encoded = encode_source(model(), Numbers(), FIELDS)
    assert [s.id for s in encoded.samples] == [f"n{i}" for i in range(23) if i not in (4, 11, 8, 21)]
    assert [note.id for note in encoded.quarantined] == ["#4", "n8", "#11", "n21"]
    assert encoded.present["left"].tolist() == [s.fields["left"] is not None for s in encoded.samples]
    assert not encoded.embeddings["left"][~encoded.present["left"]].any()


def figures():
    encoded = encode_together(model(), Numbers(), FIELDS)
    return encoded and _figures(encoded)


def _figures(encoded):
    both = encoded.present["left"] & encoded.present["right"]
    left, right = (encoded.embeddings[name][both] for name in ("left", "right"))
    return retrieval_metrics(left, right, [[i] for i in range(int(both.sum()))], (1, 5))


def test_figures_do_not_depend_on_the_number_of_processes(tmp_path):
    assert run_ranks(figures, 3, tmp_path)[0] == pytest.approx(_figures(encode_source(model(), Numbers(), FIELDS)))


def test_a_record_embedded_twice_is_a_bug():
    twice = Part(places=[3], embeddings={}, present={})
    with pytest.raises(AssertionError, match="twice"):
        merge([twice, Part(places=[0, 3])])


def errands():
    """The first process asks for two things that need all, and one of the others' counts shows that they came."""
    done = []

    def add(number):
        done.append(number)
        return float(world().sum(torch.tensor(float(number + world().rank))))

    shared = Errands({"add": add})
    if world().rank:
        shared.follow()
        return done
    answers = [shared.ask("add", 1), shared.ask("add", 10)]
    shared.done()
    return answers


def test_the_others_run_the_errands_of_the_first(tmp_path):
    assert run_ranks(errands, 2, tmp_path) == [[3.0, 21.0], [1, 10]]


def test_alone_an_errand_is_a_call():
    shared = Errands({"double": lambda x: 2 * x})
    assert shared.ask("double", 4) == 8
    shared.done()


def test_a_quarantined_record_keeps_its_cause():
    encoded = encode_source(model(), Numbers(), FIELDS)
    assert isinstance(encoded.quarantined[0], Quarantined)
    assert encoded.quarantined[0].cause == "torn"

"""The evaluation `zero-shot` of a tower with two embeddings: its own, or with ``known`` both of them blended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmrep.data.sample import Sample
from mmrep.evaluate.encoded import EncodedSet
from mmrep.evaluate.suites import ZeroShot
from mmrep.finetune.representation import NAME
from tests.finetune.test_representation import CLASSES, build, inputs

TEMPLATES = ("{}", "a {}")


@pytest.fixture(scope="module")
def bench() -> Any:
    model = build().float()
    encoder = model.tower("image").encoder
    labels = [CLASSES[n % 3] for n in range(9)]
    samples = [Sample(id=str(n), fields={"picture": raw}, label=label)
               for n, (raw, label) in enumerate(zip(encoder.examples(9, 1), labels, strict=True))]  # fmt: skip
    vectors = model.encode([sample.fields["picture"] for sample in samples], "image")
    found = EncodedSet(samples, {"picture": vectors}, {"picture": np.ones(9, dtype=bool)})
    return SimpleNamespace(model=model, fields={"picture": "image"}, encoded={"held out": found}.__getitem__)


def asked(bench: Any, **fields: Any) -> list[dict[str, Any]]:
    config = ZeroShot.Config(data="held out", field="picture", text="text", templates=TEMPLATES, **fields)
    return ZeroShot(config).run(bench)


@torch.no_grad()
def slowly(model: Any, *, known: bool) -> tuple[float, float]:
    """The share of right answers and the mean probability of the true class, class by class."""
    classes, names = [], sorted(CLASSES)
    for name in names:
        vectors = [torch.from_numpy(model.encode(template.replace("{}", name), "text")) for template in TEMPLATES]
        classes.append(F.normalize(torch.stack([F.normalize(v, dim=0) for v in vectors]).mean(0), dim=0))
    batch = inputs(model, "image", 9)
    tower = model.tower("image")
    encoding = tower.encoding(batch)
    first = F.normalize(tower.projector(tower.pool(encoding)), dim=1)
    second = F.normalize(encoding.extra[NAME], dim=1)
    items = F.normalize(0.7 * first + 0.3 * second, dim=1) if known else first
    scores = items @ torch.stack(classes).T
    truth = torch.tensor([names.index(CLASSES[n % 3]) for n in range(9)])
    probability = (float(model.temperature("default").scale) * scores).softmax(1)
    return float((scores.argmax(1) == truth).float().mean()), float(probability[range(9), truth].mean())


def test_known_classes_are_told_by_both_embeddings(bench):
    for known in (False, True):
        row = asked(bench, known=known)[0]
        accuracy, probability = slowly(bench.model, known=known)
        assert row["top1"] == pytest.approx(accuracy)
        assert row["true_class_probability"] == pytest.approx(probability, rel=1e-4)
    own, both = (asked(bench, known=known)[0]["true_class_probability"] for known in (False, True))
    assert abs(own - both) > 1e-3
    assert not bench.model.tower("image").adapter.known  # afterwards

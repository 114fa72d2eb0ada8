"""A run of self-distilling objectives that is cut and resumed is the same run, bit by bit: centres, slices, teacher."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import component
from mmrep.data.loader import BatchLoader
from mmrep.data.reader import Reader
from mmrep.data.records import Records
from mmrep.schedules import Schedule
from mmrep.training.contracts import TrainConfig
from mmrep.training.optim import OptimConfig
from mmrep.training.trainer import Trainer
from tests.objectives import ssl_toys
from tests.training.test_exact_resume import Kill
from tests.training.toys import lines, tensors

HEAD = {"prototypes": 7, "hidden": 9, "bottleneck": 5, "layers": 2, "freeze": 2}
OBJECTIVES = [
    component("objectives", "dino", field="x", head=HEAD, patch={"head": HEAD}),
    component("objectives", "bootstrap", fields=["x"], predictor={"hidden": 7}),
    component("objectives", "redundancy", fields=["x"], loss={"type": "sigreg", "slices": 5}),
    component("objectives", "masked", field="x", target={"type": "teacher"}),
    component("objectives", "anchor", fields=["x"]),
    component("objectives", "l2-sp"),
    component("objectives", "cross-view", field="x", queue=7, head={"hidden": 5}),
    component("objectives", "self-guided", field="x", hidden=5, sampled=1),
    component("objectives", "masked", field="x", name="clusters", target={"type": "clusters", "codes": 3}),
]


def build(folder, *, seed=0, callbacks=()):
    generator = torch.Generator().manual_seed(1)
    columns = {"x": [torch.randn(3 + i % 3, generator=generator).tolist() for i in range(21)]}
    columns["x"][4] = None
    columns["id"] = [f"s{i}" for i in range(21)]
    root = ssl_toys.build(*OBJECTIVES, dropout=0.2, momentum=0.8, seed=seed)
    if seed == 0:  # what is resumed has its clusters from the checkpoint
        root.fit(lambda field: [value for value in columns[field] if value is not None])
    views = {"x": [ssl_toys.Noise(), ssl_toys.Noise(0.5)]}
    root.views = views
    reader = Reader({"x": root.model.tower("a").encoder}, views)
    loader = BatchLoader(Records.from_lists(**columns), reader, batch_size=5, workers=0, seed=2)
    return Trainer(
        root, loader, train=TrainConfig(steps=10, precision="fp32", log_every=2, save_every=3),
        optim=OptimConfig(lr=0.01, schedule=Schedule(warmup=2)), folder=folder, callbacks=callbacks,
    )  # fmt: skip


def test_resume_is_bitwise(tmp_path):
    straight = build(tmp_path / "straight")
    straight.fit()
    with pytest.raises(InterruptedError):
        build(tmp_path / "cut", callbacks=[Kill(7)]).fit()
    resumed = build(tmp_path / "cut", seed=9)
    resumed.fit(resume=True)
    a, b = tensors(straight), tensors(resumed)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")
    state = straight.root.state_dict()
    for name in ("dino.assign.centre", "dino.patch_assign.centre", "redundancy.loss.step"):
        assert state[f"objectives.{name}"].any()
    assert state["objectives.cross-view.queue"].any()
    assert state["objectives.cross-view.filled"] == 7
    assert any(name.startswith("objectives.self-guided.past") for name in state)
    assert any(name.startswith("teacher.copies") for name in state)
    assert not state["objectives.bootstrap.predictors.x.norms.0.running_mean"].eq(0).all()

"""What several processes run: adapters, whole modules beside them, checkpointing and two objectives, under DDP."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmrep._unused import freeze_unused
from mmrep.config import component, parse
from mmrep.data.batch import Batch
from mmrep.model import Model, ModelConfig
from mmrep.objectives.root import Root
from mmrep.tower import TowerConfig
from mmrep.training.collectives import world
from tests.objectives.parity import errors

N, FIRST = 7, 4  # samples, and how many of them the first of two processes has
VIT = {"type": "image-vit", "size": 8, "patch": 2, "width": 16, "depth": 2, "heads": 2}
CONTRASTIVE = component("objectives", "contrastive", pairs=[{"between": ["x", "y"]}])
MASKED = component("objectives", "masked", field="x", mask={"type": "random"})
DORA = {"type": "lora", "rank": 2, "dora": True, "also": ["norm.*"]}
TOKENS = {"type": "representation-tokens", "begin": 2, "count": 3, "width": 5, "rank": 2, "keep": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"type": "lora", "rank": 2, "also": ["norm.*", "special"]}},
    "dora": {"adapter": DORA},
    "ia3": {"adapter": {"type": "ia3", "also": ["norm.*"]}},
    "dora, two objectives, checkpointing": {"adapter": DORA, "objectives": 2, "checkpointing": True},
    "two objectives, checkpointing": {"objectives": 2, "checkpointing": True},
    "one without the other": {"adapter": DORA, "missing": True},
    "tokens of two towers": {"adapter": TOKENS},
    "tokens of two towers, one without": {"adapter": TOKENS, "missing": True},
}


def build(adapter: Any = None, objectives: int = 1, checkpointing: bool = False, missing: bool = False) -> Root:
    torch.manual_seed(3)
    towers = {name: parse(TowerConfig, {"encoder": VIT, "adapter": adapter}) for name in "ab"}
    model = Model(ModelConfig(dim=4, towers=towers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name or ".ia3_l." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert freeze_unused(model) == {}
    root = Root(model, [CONTRASTIVE, MASKED][:objectives], fields={"x": "a", "y": "b"}, views={}).train()
    if checkpointing:
        root.checkpoint_encoders()
    return root


def batch(root: Root, rows: range, step: int, missing: bool) -> Batch:
    """Rows of a global batch; if ``missing``, the first process has no sample with the field ``y``."""
    encoder = root.model.tower("a").encoder
    items = [encoder.prepare(raw) for raw in encoder.examples(N, step)]
    others = [encoder.prepare(raw) for raw in encoder.examples(N, step + 9)]
    here = {"x": [i for i in rows], "y": [i for i in rows if not (missing and i < FIRST)]}
    inputs = {"x": [encoder.collate([items[i] for i in here["x"]])]}
    if here["y"]:
        inputs["y"] = [encoder.collate([others[i] for i in here["y"]])]
    present = {field: torch.tensor([i in here[field] for i in rows]) for field in "xy"}
    return Batch(ids=[str(i) for i in rows], inputs=inputs, present=present, seeds=torch.tensor(list(rows)))


def run(case: str, rows: range, wrap: Any) -> dict[str, Tensor]:
    """Gradients of the first step and weights after three of SGD: a parameter unused in one step fails in the next."""
    settings = CASES[case]
    root = build(**settings)
    wrapped = wrap(root)
    trained = {name: p for name, p in root.named_parameters() if p.requires_grad}
    optimizer, found = torch.optim.SGD(trained.values(), lr=2e-3), {}
    for step in range(3):
        wrapped(batch(root, rows, step, settings.get("missing", False)))["loss"].backward()
        if step == 0:
            found = {f"gradient {name}": p.grad.clone() for name, p in trained.items() if p.grad is not None}
            assert len(found) == len(trained)
        optimizer.step()
        optimizer.zero_grad()
    return found | {f"weight {name}": p.detach() for name, p in trained.items()}


def compare(reference: str) -> dict[str, dict[str, float]]:
    """On every process: the largest errors of each case (see `tests.objectives.parity.errors`)."""
    rank = world().rank
    rows, out = (range(FIRST), range(FIRST, N))[rank], {}
    whole = load_file(reference)
    for case in CASES:
        found = run(case, rows, DistributedDataParallel)
        out[case] = errors(found, {name: whole[f"{case}/{name}"] for name in found})
    return out

"""A toy encoder whose tokens see each other and can be hidden, and batches with several views of a field."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch

from mmrep.config import component
from mmrep.data.batch import Batch
from mmrep.embed.memo import Memo
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.registry import encoders
from mmrep.schedules import Clock
from mmrep.step import Step
from mmrep.teacher import TeacherConfig
from mmrep.tokens import Content, Encoding, Grid, Tokens
from mmrep.views.view import View, uniform
from mmrep.world import LocalWorld
from tests.toys import ToyConfig, ToyEncoder


@encoders.register("toy-ssl")
class SSLToy(ToyEncoder):
    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content", "attention"})

    def tokenize(self, inputs):
        grid = Grid.sequence(inputs["valid"])
        positions = (grid.coords * 0.1 + 0.05).to(inputs["values"].dtype).expand(-1, -1, self.width)
        return Tokens(self.embed(inputs["values"][..., None]) + positions, grid, positions)

    def content(self, inputs):
        return Content(inputs["values"][..., None])

    def attended(self, tokens):
        """Attention that a layer's tokens would have to each other; it moves nothing."""
        encoding = self.encode(tokens, None, range(1, self.depth + 1))
        x, shown = torch.stack(encoding.layers, 1).unflatten(-1, (2, -1)).movedim(-2, 2), tokens.grid.valid
        logits = (x @ x.mT + x.sum(-1)[..., None, :]).masked_fill(~shown[:, None, None, None], -torch.inf)
        return dataclasses.replace(encoding, layers=(), extra={"attention": logits.softmax(-1)})

    def encode(self, tokens, keep=None, layers=()):
        tokens = tokens.keep(keep)
        x, kept = tokens.values, []
        weight = tokens.grid.valid[..., None].to(x.dtype)
        for number, block in enumerate(self.blocks, 1):
            mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
            x = self.dropout(torch.tanh(block(x + mean))) + x
            kept.append(x) if number in layers else None
        return Encoding(Tokens(x, tokens.grid), layers=tuple(kept))


class Noise(View):
    """Adds noise that the seed decides, in the loader."""

    def __init__(self, scale=0.3):
        super().__init__(None)
        self.scale = scale

    def sample(self, decoded, seed):
        noise = uniform(torch.tensor([seed]), len(decoded))[0] - 0.5
        return [value + self.scale * float(e) for value, e in zip(decoded, noise, strict=True)]


def build(*objectives, fields=None, momentum=0.5, dropout=0.0, normalize=False, pool="attention", dim=6, seed=0,
          reductions=()):  # fmt: skip
    fields = {"x": "a"} if fields is None else fields
    torch.manual_seed(seed)
    encoder = component("encoders", "toy-ssl", dropout=dropout)
    both = {
        "a": TowerConfig(encoder=encoder, pool=component("pools", pool), projector=component("projectors", "mlp")),
        "b": TowerConfig(encoder=encoder, projector=component("projectors", "linear", bias=True)),
    }
    towers = {name: both[name] for name in sorted(set(fields.values()))}
    model = Model(ModelConfig(dim=dim, towers=towers, normalize=normalize, temperatures={}, reductions=reductions))
    teacher = TeacherConfig(momentum=momentum, schedule=None)
    return Root(model, list(objectives), fields=fields, views={}, teacher=teacher)


def raw(field, i, step=0):
    generator = torch.Generator().manual_seed(1000 * step + 17 * i + ord(field))
    return torch.randn(3 + i % 3, generator=generator).tolist()


def batch(rows=range(9), *, fields="x", views=2, missing=(), group=None, step=0):
    """Samples whose values depend on their number alone, each with some views."""
    encoder, dtype = ToyEncoder(ToyConfig()), torch.get_default_dtype()
    inputs = {}
    for f in fields:
        here = [i for i in rows if (f, i) not in missing]
        read = [
            encoder.collate([encoder.prepare(raw(f, i, step), view=Noise(), seed=7 * i + 1000 * v) for i in here])
            for v in range(views if here else 0)
        ]
        if here:
            inputs[f] = [{**v, "values": v["values"].to(dtype)} for v in read]
    return Batch(
        ids=[str(i) for i in rows],
        inputs=inputs,
        present={f: torch.tensor([(f, i) not in missing for i in rows], dtype=torch.bool) for f in fields},
        seeds=torch.tensor(list(rows), dtype=torch.long),
        group=None if group is None else group[list(rows)],
    )


def in_parts(edges, **options):
    """A batch of parts, as for `train.micro_batch`."""
    parts = [batch(range(a, b), **options) for a, b in pairwise(edges)]
    whole = batch(range(edges[0], edges[-1]), **options)
    return dataclasses.replace(whole, inputs={}, parts=parts)


def step_of(root, b, **clock):
    options = {"fields": root.fields, "views": root.views, "world": LocalWorld(), "memo": Memo()}
    return Step(root.model, b, **options, teacher=root.teacher, clock=Clock(**clock))


def nudge(root, seed=3):
    """Teacher and student apart, as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in root.teacher.copies.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return root


def reached(loss, root):
    """Names of the parameters to which some gradient comes."""
    named = {n: p for n, p in root.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n for n, g in zip(named, found, strict=True) if g is not None and bool(g.any())}

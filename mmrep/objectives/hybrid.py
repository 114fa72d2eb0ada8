"""Distillation of tokens from two teachers: how tokens stand to each other from one, what they are from the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.encoder import Encoder
from mmrep.hub.fetch import ModelFolderError
from mmrep.hub.load import load
from mmrep.hub.start import model_folder
from mmrep.losses.tokenwise import LOSSES
from mmrep.model import Model, Tower
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import UnknownNameError, near
from mmrep.step import Step, idle
from mmrep.targets.target import look
from mmrep.tokens import Grid


@config
class TokenTeacher:
    """model: a saved model (folder, run folder or hub id), which reads what the student reads, in tokens of the same
    places. tower: which of its towers; null = its only one. weight: of what it teaches.
    """

    model: str
    tower: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


@config
class RelationTeacher(TokenTeacher):
    """layers: by the student's layer (from 1), that of the teacher whose relations it is to have."""

    layers: Annotated[dict[int, int], Field(min_length=1)]
    temperature: Annotated[float, Field(gt=0)] = 0.1


@config
class FeatureTeacher(TokenTeacher):
    """loss: of each token's last features, through a learned map, and the teacher's, which are normed first."""

    loss: Literal["smooth-l1", "mse", "l1", "cosine"] = "smooth-l1"


@config
class HybridConfig(ObjectiveConfig):
    """field: the student's. view: which reading. relations: a masked teacher. features: a contrastive one.

    drop: share of the tokens that the student does not read in the end, those most like the others. by: from which
    part of the run on it is so many; before, it grows from none in a straight line.
    """

    field: str
    relations: RelationTeacher | None = None
    features: FeatureTeacher | None = None
    view: Annotated[int, Field(ge=0)] = 0
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    by: Annotated[float, Field(ge=0, le=1)] = 0.5


class Hybrid(Objective):
    """Hybrid Distill (Shi et al. 2023, arXiv:2306.15876), of any encoders with tokens on one lattice.

    * relations: ``mean_i KL(softmax_j(cos(t_i, t_j) / T) | softmax_j(cos(s_i, s_j) / T))`` over the tokens that the
      student read, of block outputs, a mean over layers. No widths need to agree. (The paper relates queries with keys
      and values with values, which only some encoders could show.)
    * features: the loss of a token's features, a mean over those tokens.
    * a token is redundant by its mean cosine with the others of its sample, in the last layer of the features teacher,
      or where there is none of the other; the most redundant are dropped. (In the paper by the student's own layers,
      more of them layer by layer.)

    A mean over samples. Teachers are in neither model nor checkpoints, and read the same view as the student.
    """

    Config = HybridConfig
    scope = "sample"

    def __init__(self, config: HybridConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        if config.field not in fields:
            raise ConfigError(
                [f"objectives.hybrid.field: unknown {config.field!r}{near(config.field, fields)} "
                 f"Fields: {', '.join(fields)}"]
            )  # fmt: skip
        tower = model.tower(fields[config.field])
        chosen = {"relations": config.relations, "features": config.features}
        teachers = {name: _load(source, name) for name, source in chosen.items() if source is not None}
        problems = [f"objectives.hybrid.{problem}" for problem in _problems(config, tower, teachers)]
        if problems:
            raise ConfigError(problems)
        self.__dict__["_teachers"] = teachers  # frozen: not parameters of this module
        width = tower.encoder.width
        self.map = nn.Linear(width, teachers["features"].encoder.width) if config.features is not None else None

    def outsiders(self) -> dict[str, Tower]:
        """See `Objective.outsiders`."""
        return cast("dict[str, Tower]", self.__dict__["_teachers"])

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {cast(HybridConfig, self.config).field}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field."""
        return int(step.present(cast(HybridConfig, self.config).field).sum())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts ``relations`` and ``features``, before their weights."""
        config = cast(HybridConfig, self.config)
        n = step.world.sum(step.present(config.field).sum())
        share = step.world.size / n.clamp_min(1)
        if not step.has(config.field):
            return {"loss": idle(step.tower(config.field).encoder) + idle(self)}
        encoder, tokens = step.tower(config.field).encoder, step.tokens(config.field, config.view)
        layers = {} if config.relations is None else config.relations.layers
        taught = self._taught(step)
        kept = self._kept(taught[-1][0], step.clock.progress)
        special = _special(tokens.grid)
        out = encoder.encode(tokens, kept + special if config.drop else None, list(layers))
        own, asked = out.tokens.values[:, special:], [x[:, special:] for x in out.layers]
        loss, parts = torch.zeros((), device=own.device), dict[str, Tensor]()
        if config.relations is not None:
            theirs = [_take(x, kept) for x in taught[0][1]]
            pairs = zip(asked, theirs, strict=True)
            each = torch.stack([_relations(s, t, config.relations.temperature) for s, t in pairs]).mean(0)
            parts["relations"] = each.sum() * share
            loss = loss + config.relations.weight * parts["relations"]
        if config.features is not None and self.map is not None:
            wanted = F.layer_norm(_take(taught[-1][0], kept), taught[-1][0].shape[-1:])
            said = self.map(own)
            said = said if said.dtype == torch.float64 else said.float()
            each = LOSSES[config.features.loss](said.flatten(0, 1), wanted.to(said.dtype).flatten(0, 1), None)
            parts["features"] = each.view(len(own), -1).mean(1).sum() * share
            loss = loss + config.features.weight * parts["features"]
        return {"loss": loss, **parts}

    @torch.no_grad()
    def _taught(self, step: Step) -> list[tuple[Tensor, list[Tensor]]]:
        """Of each teacher, relations first, its last tokens and the layers asked for, without special ones."""
        config = cast(HybridConfig, self.config)
        found: list[tuple[Tensor, list[Tensor]]] = []
        for name, tower in self.outsiders().items():
            layers = list(config.relations.layers.values()) if name == "relations" and config.relations else []
            out = tower.encoding(step.inputs(config.field, config.view), None, layers)
            special = _special(out.tokens.grid)
            found.append((out.tokens.values[:, special:], [x[:, special:] for x in out.layers]))
        return found

    def _kept(self, values: Tensor, progress: float) -> Tensor:
        """Which tokens the student reads, int64 [B, K], in their order: the least like the others."""
        config = cast(HybridConfig, self.config)
        grown = 1.0 if config.by == 0 else min(progress / config.by, 1.0)
        number = values.shape[1] - int(config.drop * grown * values.shape[1])
        unit = F.normalize(values.float(), dim=-1)
        redundancy = (unit * unit.sum(1, keepdim=True)).sum(-1)  # N times the mean cosine, its own of 1 included
        return redundancy.argsort(dim=1, stable=True)[:, :number].sort(1).values


def _relations(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of the divergence of their relations: [B, K, D] and [B, K, E] to [B]."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        logs: list[Tensor] = []
        for values in (student, teacher):
            unit = F.normalize(values.to(dtype), dim=-1)
            logs.append((unit @ unit.transpose(1, 2) / temperature).log_softmax(-1))
        own, wanted = logs
        return (wanted.exp() * (wanted - own)).sum(-1).mean(-1)


def _special(grid: Grid) -> int:
    """How many tokens stand before the lattice."""
    assert grid.shape is not None
    return grid.valid.shape[1] - int(torch.tensor(grid.shape).prod())


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _load(source: TokenTeacher, name: str) -> Tower:
    place = f"objectives.hybrid.{name}"
    try:
        model = load(model_folder(source.model))
        tower = source.tower or (next(iter(model.towers)) if len(model.towers) == 1 else "")
        if not tower:
            raise ConfigError([f"{place}.tower: {source.model!r} has {', '.join(model.towers)}: say which"])
        return model.tower(tower).eval().requires_grad_(False)
    except ModelFolderError as error:
        raise ConfigError([f"{place}.model: {error}"]) from error
    except UnknownNameError as error:
        raise ConfigError([f"{place}.tower: {error}"]) from error


def _problems(config: HybridConfig, tower: Tower, teachers: dict[str, Tower]) -> Iterator[str]:
    if not teachers:
        yield "relations: none, and no features: name a teacher"
    if tower.frozen:
        yield f"field: the encoder that reads {config.field!r} is frozen: it has nothing to learn with"
    if config.drop and "drop_tokens" not in tower.encoder.supports:
        yield f"drop: {type(tower.encoder).__name__} computes all tokens or none"
    own = look(tower.encoder).tokens.grid
    if own.shape is None:
        yield f"field: {type(tower.encoder).__name__} has no lattice of tokens"
        return
    for name, teacher in teachers.items():
        if not _reads_alike(tower.encoder, teacher.encoder):
            yield f"{name}: it prepares its input otherwise than the student (size, colours): it must read the same"
        elif look(teacher.encoder).tokens.grid.shape != own.shape:
            theirs = look(teacher.encoder).tokens.grid.shape
            yield f"{name}: its tokens are on a lattice {theirs}, the student's on {own.shape}"
    for student, layer in (config.relations.layers if config.relations is not None else {}).items():
        for who, encoder, number in (("student", tower.encoder, student),
                                     ("teacher", teachers["relations"].encoder, layer)):  # fmt: skip
            depth = encoder.depth if "layers" in encoder.supports else 0
            if not 1 <= number <= depth:
                yield f"relations.layers: the {who} has no layer {number}; it has {depth}"


def _reads_alike(a: Encoder, b: Encoder) -> bool:
    """Whether both make the same of raw values."""
    if a.modality != b.modality:
        return False
    for raw in a.examples(2, 0):
        mine, theirs = a.prepare(raw), b.prepare(raw)
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[key], theirs[key]) for key in mine):
            return False
    return True

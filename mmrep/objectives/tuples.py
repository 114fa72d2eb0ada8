"""Contrast of tuples of fields, all at once rather than in pairs: GRAM, TRIANGLE, Symile, centroids."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import Component, ConfigError, Of, config
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class TupleConfig:
    """One tuple of fields.

    of: the fields; the same one again is for another of its views. anchor: the field that is contrasted with the
    others; null = each in turn. views: which view of each field; null = the first. weight: factor. temperature: name of
    one of ``model.temperatures``. partial: what becomes of a sample that lacks some of the fields. ``drop``: it takes
    no part. ``subsets``: a loss that takes such tuples gets them; for another, samples that have the same fields are
    contrasted among themselves, and the loss is the mean over all tuples.
    """

    of: Annotated[tuple[str, ...], Field(min_length=2)]
    anchor: str | None = None
    views: tuple[int, ...] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: str = "default"
    partial: Literal["drop", "subsets"] = "drop"

    @property
    def name(self) -> str:
        """``image+speech+caption``; ``image.0+image.1`` where views are named."""
        views = self.views or [None] * len(self.of)
        return "+".join(f if view is None else f"{f}.{view}" for f, view in zip(self.of, views, strict=True))

    @property
    def place(self) -> int | None:
        """Where the anchor is among the fields."""
        return None if self.anchor is None else self.of.index(self.anchor)


@config
class TuplesConfig(ObjectiveConfig):
    """tuples: of fields. loss: of ``tuple_losses``. use_group: samples of one group are no negatives of each other."""

    tuples: list[TupleConfig]
    loss: Annotated[Component, Of("tuple_losses")]
    use_group: bool = True


class Tuples(Objective):
    """A weighted sum of a loss over tuples of fields.

    The model's ``dim`` and the number of fields decide which temperatures make sense (for Symile, larger ones than for
    pairs by orders of magnitude); one that does not is refused, with the lines to write instead.
    """

    Config = TuplesConfig
    scope = "batch"

    def __init__(self, config: TuplesConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        self.loss = config.loss.build()
        problems = [
            f"objectives.tuples.tuples[{i}]{problem}"
            for i, chosen in enumerate(config.tuples)
            for problem in self._problems(chosen, model, fields)
        ]
        if not config.tuples:
            problems = ["objectives.tuples.tuples: none is given"]
        if problems:
            raise ConfigError(problems)

    def _problems(self, chosen: TupleConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
        """What is wrong with one tuple; found when the objective is built, not in the first step."""
        name, (low, high) = cast(TuplesConfig, self.config).loss.type, self.loss.fields
        for field in chosen.of:
            if field not in fields:
                yield f".of: unknown field {field!r}{near(field, fields)} Fields: {', '.join(fields)}"
        if len(chosen.of) < low or (high is not None and len(chosen.of) > high):
            number = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
            yield f".of: loss {name!r} takes {number} fields, got {len(chosen.of)}: {', '.join(chosen.of)}"
            return
        if chosen.anchor is not None and chosen.of.count(chosen.anchor) != 1:
            found = "is in it twice" if chosen.anchor in chosen.of else f"is not{near(chosen.anchor, chosen.of)}"
            yield f".anchor: one of {', '.join(chosen.of)}; {chosen.anchor!r} {found}"
            return
        if chosen.views is not None and len(chosen.views) != len(chosen.of):
            yield f".views: {len(chosen.of)} fields need {len(chosen.of)} views, got {list(chosen.views)}"
        read = list(zip(chosen.of, chosen.views or (0,) * len(chosen.of), strict=False))
        if len(set(read)) < len(read):
            yield f".of: {', '.join(chosen.of)} has a field twice; give each its own of `views`"
        if chosen.partial == "subsets" and low == high:
            yield f".partial: loss {name!r} takes {low} fields, so that no subset is left; use drop"
            return
        if chosen.temperature not in model.temperatures:
            hint = near(chosen.temperature, model.temperatures)
            known = ", ".join(model.temperatures)
            yield f".temperature: unknown {chosen.temperature!r}{hint} model.temperatures has: {known}"
            return
        if model.temperature(chosen.temperature).bias is not None:
            where = f"model.temperatures.{chosen.temperature}.bias"
            yield f".temperature: loss {name!r} does not use a bias; remove {where}"
        yield from self._wrong_scales(chosen, model)

    def _wrong_scales(self, chosen: TupleConfig, model: Model) -> Iterator[str]:
        name = cast(TuplesConfig, self.config).loss.type
        most = len(chosen.of)
        low, high = self.loss.bounds(model.dim, most)
        sizes = {len(subset) for subset in self._subsets(chosen)}
        bounds = {size: self.loss.bounds(model.dim, size) for size in sizes}
        if len(set(bounds.values())) > 1:
            wanted = ", ".join(f"{b[0]:.3g} to {b[1]:.3g} for {size} fields" for size, b in sorted(bounds.items()))
            yield (
                f".partial: loss {name!r} needs other scales for smaller tuples ({wanted}); use drop, and list the "
                "subsets as tuples of their own with a temperature each"
            )
            return
        t = model.temperature(chosen.temperature).config
        top = t.scale if not t.learned else None if t.max_scale is None else max(t.max_scale, t.scale)
        # A perfect tuple should be able to reach a logit of 10: below, no loss of a batch of hundreds can get small.
        if t.scale > high or (not t.learned and t.scale < low) or (t.learned and top is not None and top < 10 * low):
            limits = (
                f"fixed at {t.scale:.3g}" if not t.learned else f"from {t.scale:.3g}, at most {t.max_scale or 'any'}"
            )
            yield (
                f".temperature: loss {name!r} over {most} fields in {model.dim} dimensions needs scales of "
                f"{low:.3g} to {high:.3g}; {chosen.temperature!r} is {limits}. Write:\n"
                f"model:\n  temperatures:\n    {chosen.temperature}: "
                f"{{scale: {low / 0.07:.4g}, min_scale: {low:.4g}, max_scale: {high:.4g}}}"
            )

    def _subsets(self, chosen: TupleConfig) -> list[tuple[int, ...]]:
        """Places of the fields of every tuple that is contrasted, the whole first."""
        most, (low, high) = len(chosen.of), self.loss.fields
        if chosen.partial == "drop" or self.loss.takes_partial:
            return [tuple(range(most))]
        sizes = range(min(most, high or most), low - 1, -1)
        found = [subset for size in sizes for subset in combinations(range(most), size)]
        return [subset for subset in found if chosen.place is None or chosen.place in subset]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are named by the fields, ``a+b+c``, those of the loss ``a+b+c.part``."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=step.model.device)
        for chosen in cast(TuplesConfig, self.config).tuples:
            out = self._of(chosen, step)
            out.pop("n")
            loss = out.pop("loss")
            total = total + chosen.weight * loss
            parts[chosen.name] = loss.detach()
            parts.update({f"{chosen.name}.{part}": value for part, value in out.items()})
        return {"loss": total, **parts}

    def _of(self, chosen: TupleConfig, step: Step) -> dict[str, Tensor]:
        """What the loss says of one kind of tuple; over subsets, the mean over tuples."""
        views = chosen.views or (0,) * len(chosen.of)
        embeddings = [step.embedding(field, view) for field, view in zip(chosen.of, views, strict=True)]
        present = torch.stack([step.present(field) for field in chosen.of], 1)
        if chosen.partial == "drop":
            present = present & present.all(1, keepdim=True)
        places = torch.arange(len(chosen.of), device=present.device)
        subsets, found = self._subsets(chosen), list[dict[str, Tensor]]()
        for subset in subsets:
            valid = present
            if len(subsets) > 1:
                exactly = present == torch.isin(places, torch.tensor(subset, device=present.device))
                valid = exactly.all(1, keepdim=True).expand(-1, len(subset))
            out = self.loss(
                [embeddings[k] for k in subset],
                scale=step.model.temperature(chosen.temperature).scale,
                group=step.group if self.config.use_group else None,
                valid=valid,
                anchor=None if chosen.place is None else subset.index(chosen.place),
                world=step.world,
            )
            found.append(out)
        if len(found) == 1:
            return found[0]
        counts = torch.stack([out["n"] for out in found])
        shares = counts / counts.sum().clamp_min(1)
        return {key: (shares * torch.stack([out[key] for out in found])).sum() for key in found[0]}

"""Labels learned by a linear classifier, with supervised contrast and hard pairs beside it if wanted (Core-tuning)."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.data.sample import stable_hash
from mmrep.losses.hard_pairs import mix_hard_pairs, supervised_contrast
from mmrep.model import Model
from mmrep.objectives._labels import label_places
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.views.view import uniform


@config
class SupervisedConfig(ObjectiveConfig):
    """field: what is classified; its samples have labels. classes: all of them, as the labels name them.

    of: the classifier reads ``pooled`` features, before the projector, or the ``embedding``; over a frozen encoder,
    whose features are kept from epoch to epoch, only the latter. contrast: weight of supervised contrast in a space of
    ``dim`` columns behind an MLP; 0 = plain cross-entropy. temperature: of the contrast. focal: weigh its pairs by how
    hard they still are. mix: make hard pairs by mixing features, for the contrast and for the classifier. alpha: of the
    Beta distribution of their shares. floor: least share of the other class in a hard negative. view: which reading.
    """

    field: str
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    of: Literal["pooled", "embedding"] = "pooled"
    contrast: Annotated[float, Field(ge=0)] = 0.0
    dim: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(gt=0)] = 0.07
    focal: bool = True
    mix: bool = False
    alpha: Annotated[float, Field(gt=0)] = 1.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.8
    view: Annotated[int, Field(ge=0)] = 0


class Supervised(Objective):
    """``L_ce + contrast * L_con``: with ``mix: true`` and a contrast this is Core-tuning (arXiv:2102.06605, section 4).

    ``L_ce`` is the cross-entropy of a linear classifier, with ``mix`` the mean over the samples and their two mixtures,
    each of which is of two classes by its shares. ``L_con`` is `supervised_contrast`, among the samples and, with
    ``mix``, each one's own hard pair (`mix_hard_pairs`). Classifier and MLP are in checkpoints but not in the saved
    model: put a head of `mmrep.finetune.heads` on it. Samples without a label count for nothing.
    """

    Config = SupervisedConfig
    scope = "batch"

    def __init__(self, config: SupervisedConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems: list[str] = []
        if config.field not in fields:
            problems.append(f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}")
        elif config.of == "pooled" and model.tower(fields[config.field]).frozen:
            problems.append(
                f"of: the encoder of {config.field!r} is frozen, so nothing before it learns: `of: embedding`"
            )
        if len(set(config.classes)) < len(config.classes):
            problems.append("classes: one is named twice")
        if problems:
            raise ConfigError([f"objectives.supervised.{problem}" for problem in problems])
        self.index = {name: place for place, name in enumerate(config.classes)}
        width = model.tower(fields[config.field]).pool.width if config.of == "pooled" else model.dim
        self.classifier = nn.Linear(width, len(config.classes))
        self.contrastor = None
        if config.contrast:
            self.contrastor = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.dim))

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        config = cast(SupervisedConfig, self.config)
        return {config.field} if config.of == "embedding" else set()

    def pooled(self) -> set[str]:
        """See `Objective.pooled`."""
        config = cast(SupervisedConfig, self.config)
        return {config.field} if config.of == "pooled" else set()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are ``accuracy``, ``classify`` and, where asked for, ``contrast``.

        Raises:
            ValueError: a label is none of the classes.
        """
        config, world = cast(SupervisedConfig, self.config), step.world
        read = step.pooled if config.of == "pooled" else step.embedding
        found, labels = read(config.field, config.view), label_places(step, self.index, "supervised")
        here = step.present(config.field) & (labels >= 0)
        x, y = found[here], labels[here]
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            logits = self.classifier(x)
            losses, rows = [F.cross_entropy(logits, y, reduction="none")], torch.tensor(len(y), device=x.device)
            pair = None
            if config.mix:
                seeds = step.batch.seeds[here] + stable_hash("supervised")
                drawn = uniform(seeds, 3)
                shares = _beta(drawn[:, :2], config.alpha)
                pair = mix_hard_pairs(x, y, shares, drawn[:, 2], floor=config.floor, world=world)
                for mixed, share, kinds in (
                    (pair.positive, pair.positive_share, pair.positive_kinds),
                    (pair.negative, pair.negative_share, pair.negative_kinds),
                ):
                    logs = -self.classifier(mixed).log_softmax(1).gather(1, kinds)
                    each = share * logs[:, 0] + (1 - share) * logs[:, 1]
                    losses.append(torch.where(pair.found, each, 0.0))
                rows = rows + 2 * pair.found.sum()
            classified = torch.cat(losses).sum() * (world.size / world.sum(rows).clamp_min(1))
            total = classified + found.sum() * 0 + idle(self)
            right = (logits.argmax(1) == y).float().mean() if len(y) else x.new_zeros(())
            parts = {"accuracy": right.detach(), "classify": classified.detach()}
            if self.contrastor is not None:
                around = [None, None] if pair is None else [self._z(pair.positive), self._z(pair.negative)]
                contrast = supervised_contrast(
                    self._z(x), y, temperature=config.temperature, focal=config.focal, positive=around[0],
                    negative=around[1], found=None if pair is None else pair.found, world=world,
                )  # fmt: skip
                total = total + config.contrast * contrast
                parts["contrast"] = contrast.detach()
        return {"loss": total, **parts}

    def _z(self, x: Tensor) -> Tensor:
        assert self.contrastor is not None
        return F.normalize(self.contrastor(x), dim=1)


def _beta(points: Tensor, alpha: float) -> Tensor:
    """Uniform numbers to numbers of Beta(alpha, alpha), by the inverse of its distribution function."""
    if alpha == 1:
        return points
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, points.cpu().double().numpy())).to(points)

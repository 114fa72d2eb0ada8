"""A watch on collapse: a tower that gives nearly the same vector for everything, or vectors of very few directions.

The loss of a predictive or self-distilling objective looks best in a collapse, so the embeddings are watched.
"""

from __future__ import annotations

import logging
import math
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import config
from mmrep.evaluate.diagnostics import effective_rank
from mmrep.objectives.root import Root
from mmrep.training.collectives import world
from mmrep.training.contracts import Callback
from mmrep.training.errors import CollapseError
from mmrep.training.trainer import Trainer

logger = logging.getLogger(__name__)

_ROWS = 1024  # a singular value decomposition of this many rows takes a fraction of a second


@config
class CollapseConfig:
    """When to look, and what counts as collapsed.

    every: steps between two looks. after: steps that are not judged; an untrained tower is narrow. min_spread: least
    standard deviation per dimension, in units of that of a uniform sphere (1 = uniform, 0 = one point). min_rank: least
    effective rank. max_plateau: a loss over K codes or prototypes above this share of log K knows nothing but their
    number. patience: so many looks in a row must be bad. stop: end the run; else it is only said, once.
    """

    every: Annotated[int, Field(ge=1)] = 50
    after: Annotated[int, Field(ge=0)] = 100
    min_spread: Annotated[float, Field(ge=0)] = 0.05
    min_rank: Annotated[float, Field(ge=0)] = 2.0
    max_plateau: Annotated[float, Field(gt=0)] = 0.995
    patience: Annotated[int, Field(ge=1)] = 3
    stop: bool = False


class CollapseWatch(Callback):
    """Logs ``spread/<field>`` and ``rank/<field>`` of the batch's embeddings.

    It speaks up when they are gone, and when a loss over codes or prototypes stands still at log K.
    """

    def __init__(self, config: CollapseConfig, root: Root) -> None:
        self.config = config
        self.root = root
        self._bad: dict[str, int] = {}

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """Measure, log, judge.

        Raises:
            CollapseError: on every process, if the config says stop.
        """
        if step % self.config.every:
            return
        for field, embeddings in self.root.seen.items():
            rows = world().gather(embeddings[: -(-_ROWS // world().size)].contiguous())
            if len(rows) < 2:
                continue
            spread, rank = measure(rows)
            figures = {f"spread/{field}": rows.new_tensor(spread), f"rank/{field}": rows.new_tensor(rank)}
            trainer.metrics.add(figures, 0)  # on the device, where the log adds up
            fine = spread >= self.config.min_spread and rank >= self.config.min_rank
            self._judge(trainer, step, field, fine, self._collapsed(field, spread, rank))
        for name, share in self.root.plateaus.items():
            # The share of a process is that of its own samples, scaled so that the mean over processes is the whole.
            left = float(world().sum(share.detach().clone()) / world().size)
            self._judge(trainer, step, name, left <= self.config.max_plateau, self._stuck(name, left))

    def _judge(self, trainer: Trainer, step: int, what: str, fine: bool, message: str) -> None:
        if step <= self.config.after:
            return
        self._bad[what] = 0 if fine else self._bad.get(what, 0) + 1
        if self._bad[what] != self.config.patience:
            return
        message = f"step {step}: {message}"
        if self.config.stop:
            raise CollapseError(f"{message}. Last checkpoint: {trainer.last_checkpoint or 'none'}")
        if trainer.is_main:
            logger.warning("%s. The run goes on (collapse.stop: true would end it)", message)

    def _collapsed(self, field: str, spread: float, rank: float) -> str:
        return (
            f"the embeddings of {field!r} have collapsed: spread {spread:.3g} (1 is a uniform sphere, at "
            f"least {self.config.min_spread:g} is asked), effective rank {rank:.3g} (at least "
            f"{self.config.min_rank:g}). Usual causes: too high a learning rate, a predictive objective without a "
            "teacher or a variance term, targets with a gradient, a temperature that ran away, one caption for all"
        )

    def _stuck(self, name: str, left: float) -> str:
        return (
            f"the loss of {name!r} is {left:.4g} of log K (at most {self.config.max_plateau:g} is asked): it knows "
            "nothing but how many codes or prototypes there are. Usual causes: a teacher's temperature too near the "
            "student's, centring without sharpening, codes that do not depend on the input, too low a learning rate"
        )


def measure(embeddings: Tensor) -> tuple[float, float]:
    """Spread and effective rank of embeddings [n, D], n >= 2.

    The spread is the mean over dimensions of the standard deviation of the unit vectors, times sqrt(D): 1 where they
    are uniform on the sphere, 0 where they are one point (Chen and He 2021, arXiv:2011.10566, section 4.1). The
    effective rank is exp(entropy) of the singular values after centring (arXiv:2210.02885).
    """
    unit = F.normalize(embeddings.float().cpu(), dim=1)  # small, and not every device has doubles
    return float(unit.double().std(0).mean() * math.sqrt(unit.shape[1])), effective_rank(unit)

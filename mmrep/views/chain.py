"""Several views one after the other, and readings that draw the same numbers as another: a picture and its ruin.

In a recipe, a clean reading and a noisy one of the same crop::

    views:
      image:
        - &clean {type: image-augment, rotation: 15}
        - {type: chain, of: [*clean, {type: image-noise}], follows: 0}
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mmrep.config import Component, ConfigError, Of, config
from mmrep.data.sample import stable_hash
from mmrep.tokens import Inputs
from mmrep.views.view import Params, View


@config
class ChainConfig:
    """of: views that act on the device, in this order. role: what the reading is for.

    follows: the number of the reading of this field whose random numbers this one draws too, so that the first of
    ``of`` does here what it does there; None = numbers of its own.
    """

    of: Annotated[list[Component], Of("views"), Field(min_length=1)]
    follows: Annotated[int, Field(ge=0)] | None = None
    role: Literal["global", "local", "context", "target", "corrupt"] = "global"


class Chain(View):
    """The first view draws from the sample's seed itself, each later one from a seed of its own.

    The parameters are those of all; where two views have one of the same name, it is that of the later.
    """

    Config = ChainConfig

    def __init__(self, config: ChainConfig) -> None:
        super().__init__(config)
        self.role, self.follows = config.role, config.follows
        self.views: list[View] = [chosen.build() for chosen in config.of]
        for chosen, view in zip(config.of, self.views, strict=True):
            if any(getattr(type(view), verb) is not getattr(View, verb) for verb in ("sample", "parameters")):
                raise ConfigError([f"of: {chosen.type!r} acts on single samples; a chain is of views on the device"])

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """See `View.batch`."""
        params: Params = {}
        for number, view in enumerate(self.views):
            inputs, more = view.batch(inputs, seeds if number == 0 else seeds + stable_hash("chain", number))
            params |= more
        return inputs, params

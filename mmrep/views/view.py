"""The contract of a view: one randomised reading of a field.

A view may act on one decoded sample in a loader worker (`View.sample`), on a whole collated batch on the device
(`View.batch`), or both. All randomness derives from one integer seed a sample, so a reading does not depend on batch
composition, number of workers or number of processes, and can be replayed exactly.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrep.tokens import Inputs

Params = dict[str, Tensor]
"""The parameters of the transforms that made a view; the batch first."""


class View:
    """A random reading. The base class reads as it is.

    Attributes:
        role: what the reading is for: ``"global"``, ``"local"``, ``"context"``, ``"target"`` or ``"corrupt"``.
        follows: number of the reading of the same field whose seeds are given to `sample` and `batch`; None = its own.
    """

    Config: ClassVar[type]
    role: str = "global"
    follows: int | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def sample(self, decoded: Any, seed: int) -> Any:
        """Transform one decoded raw value; called by ``Encoder.prepare``. The default changes nothing."""
        return decoded

    def parameters(self, decoded: Any, seed: int) -> Params:
        """What `sample` draws for this value and seed, without changing anything: tensors without a batch axis.

        The reader stacks them over the batch, and they end up in ``Step.params`` beside those of `batch` (which win
        where a name is the same). Every value of a field must have the same names and shapes. The default has none.
        """
        return {}

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Transform collated inputs on their device.

        Args:
            inputs: what ``Encoder.collate`` returned, B samples.
            seeds: int64 [B], one a sample.

        Returns:
            The new inputs, and the parameters of the transform, each tensor with the batch first.
        """
        return inputs, {}


class Recorded(View):
    """A view whose `parameters` are noted as it reads; the reader puts it around views that have any.

    Attributes:
        params: those of the last value that `sample` was called with.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view.config)
        self.view = view
        self.role, self.follows = view.role, view.follows
        self.params: Params = {}

    def __getattr__(self, name: str) -> Any:
        if name == "view":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.view, name)

    def sample(self, decoded: Any, seed: int) -> Any:
        """What the view makes of the value; `params` are then its parameters."""
        self.params = self.view.parameters(decoded, seed)
        return self.view.sample(decoded, seed)


def uniform(seeds: Tensor, n: int, stream: int = 0) -> Tensor:
    """Counter-based random numbers: float32 [B, n] in [0, 1), a pure function of each sample's seed.

    The mixing function is splitmix64 (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        seeds: int64 [B].
        n: how many numbers per sample.
        stream: separates independent uses of one seed.
    """
    steps = torch.arange(1, n + 1, device=seeds.device, dtype=torch.long) + stream * 1_000_003
    z = seeds[:, None] + steps * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    z = z ^ _shift(z, 31)
    return _shift(z, 40).to(torch.float32) / (1 << 24)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers (torch's shift carries the sign down)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)

"""Which part of a data set a group falls in: a hash of its own name, whatever else the data holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.data.sample import stable_hash
from mmrep.data.source import SourceConfig

Part = Literal["train", "validation", "test"]


@config
class SplitConfig(SourceConfig):
    """split: which part. validation, test: share of the groups that are held out. seed: which ones.

    A group falls in its part by a hash of the seed and its name. Another order, another option or a new release of the
    data moves no group, and a larger share only takes groups from the training part.
    """

    split: Literal["train", "validation", "test", "all"] = "train"
    seed: int = 0
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise ConfigError([
                f"validation: {self.validation} and test: {self.test} leave nothing to train on; together they are "
                f"less than 1"
            ])  # fmt: skip


def part_of(group: str, config: SplitConfig) -> Part:
    """The part that a group falls in.

    Args:
        group: its name: a concept, a scaffold, whatever must not be on both sides.
        config: seed and shares.
    """
    point = stable_hash("split", config.seed, group) / 2**63
    if point < config.test:
        return "test"
    return "validation" if point >= 1 - config.validation else "train"

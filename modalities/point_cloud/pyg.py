"""Point networks of torch_geometric (github.com/pyg-team/pytorch_geometric): PointNet++, DGCNN, Point Transformer.

In a recipe::

    encoder: {type: pyg-points, network: dgcnn, groups: 32, width: 128}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmrep.config import config
from mmrep.modalities.point_cloud._base import PointEncoder, Preprocess
from mmrep.modalities.point_cloud._pyg_networks import NETWORKS
from mmrep.tokens import Encoding, Grid, Inputs, Tokens

_FILE = "pyg_points.json"


class PyGPoints(PointEncoder):
    """One of torch_geometric's point networks, as tokens: one for each group of near points.

    Coordinates are the groups' centres, chosen by farthest point sampling; a cloud of fewer points than groups has a
    token a point, and the rest is padding. Points look at each other before there are tokens, so these cannot be
    dropped: everything up to them is tokenizing, and encoding only norms.
    """

    @config
    class Config(Preprocess):
        """Fields of ``pyg-points``, beside its preprocessing.

        network: see `mmrep.modalities.point_cloud._pyg_networks`. groups: tokens per cloud at most. neighbors: points
        that each point or group reads. width: D. checkpoint: a ``.safetensors`` file of weights of the same network and
        sizes, with the names of ``encoder.network.state_dict()``.
        """

        network: Literal["pointnet", "dgcnn", "point-transformer"] = "pointnet"
        groups: Annotated[int, Field(ge=1)] = 32
        neighbors: Annotated[int, Field(ge=2)] = 16
        width: Annotated[int, Field(ge=2)] = 128
        checkpoint: str | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.checkpoint is not None and not self.checkpoint.endswith(".safetensors"):
                raise ValueError(
                    f"checkpoint {self.checkpoint!r} is not a .safetensors file; loading a pickle can run any program"
                )

    supports = frozenset({"tokens"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width = config.width
        self.network = NETWORKS[config.network](self.channels, config.width, config.groups, config.neighbors)
        self.norm = nn.LayerNorm(config.width)
        if config.checkpoint is not None and not (files is not None and (files / _FILE).is_file()):
            _load(self.network, Path(config.checkpoint))

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``points`` float [B, N, 3], ``valid`` bool [B, N] and the features to tokens [B, groups, D]."""
        features = self.point_features(inputs).to(self.norm.weight.dtype)
        values, (centres, present) = self.network(features, (inputs["points"].float(), inputs["valid"]))
        return Tokens(values, Grid(centres, present, present.new_zeros(present.shape)))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """The tokens, normed."""
        self.check_request(keep, layers)
        return Encoding(Tokens(self.norm(tokens.values), tokens.grid))

    def save_files(self, folder: Path) -> None:
        """Say that the checkpoint, if there was one, has gone into the saved state: its path means nothing there."""
        if self.config.checkpoint is not None:
            (folder / _FILE).write_text(json.dumps({"checkpoint": Path(self.config.checkpoint).name}) + "\n", "utf-8")


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"checkpoint: there is no file {str(path)!r}")
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be loaded: {error}") from error

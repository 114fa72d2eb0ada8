"""A transformer over patches of near points (Point-BERT, arXiv:2111.14819; Point-MAE, arXiv:2203.06604).

In a recipe::

    encoder: {type: point-patch, max_points: 1024, groups: 64, neighbors: 32, width: 192, depth: 6, heads: 3}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.point_cloud._base import PointEncoder, Preprocess
from mmrep.modalities.point_cloud.grouping import farthest_points, gather, nearest
from mmrep.tokens import Content, Grid, Inputs, Tokens
from mmrep.transformer_encoder import TransformerEncoder


class PointPatch(TransformerEncoder, PointEncoder):
    """Groups around farthest points to tokens; only the tokens that are kept are computed by the transformer.

    A token is a group: a centre, chosen by farthest point sampling, and its nearest points relative to it, read by a
    small PointNet. Tokens are the class token (if any), then the groups in the order of choice, so that the first of
    them are spread over the whole cloud. A cloud of fewer points than groups has a group a point, and the rest is
    padding. Coordinates are the centres, in the units of the prepared points. The position of a group, an MLP of its
    centre, is added to its token before any is dropped.
    """

    @config
    class Config(Preprocess):
        """Fields of a ``point-patch``, beside its preprocessing.

        groups: tokens per cloud at most. neighbors: points of a group at most, its centre included. point_width:
        channels of the small PointNet's first layer, of which the later ones have two and four times as many. width: D.
        depth: number of blocks. heads: attention heads; must divide ``width``. mlp_ratio: hidden width of the MLPs over
        ``width``. class_token: put a class token in front. dropout, drop_path: probabilities; drop_path rises linearly
        with depth. layer_scale: initial value, or None for none.
        """

        groups: Annotated[int, Field(ge=1)] = 64
        neighbors: Annotated[int, Field(ge=2)] = 32
        point_width: Annotated[int, Field(ge=1)] = 64
        width: Annotated[int, Field(ge=1)] = 192
        depth: Annotated[int, Field(ge=1)] = 6
        heads: Annotated[int, Field(ge=1)] = 3
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
        class_token: bool = True
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
        layer_scale: Annotated[float, Field(gt=0)] | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth = config.width, config.depth
        self.patches = PatchNet(3 + self.channels, config.point_width, config.width)
        self.positions = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, config.width))
        self.transformer = Transformer(
            config.width,
            config.depth,
            config.heads,
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            drop_path=config.drop_path,
            layer_scale=config.layer_scale,
        )
        self.norm = nn.LayerNorm(config.width)
        self.special = nn.Parameter(torch.empty(1, 1, config.width)) if config.class_token else None
        if self.special is not None:
            nn.init.normal_(self.special, std=0.02)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``points`` float [B, N, 3], ``valid`` bool [B, N] and the features to tokens [B, 1 + groups, D]."""
        chosen, centres, members, around = self._groups(inputs)
        dtype = self.norm.weight.dtype
        patches = torch.cat([around, gather(self.point_features(inputs), members)], dim=3).to(dtype)
        places = self.positions(centres.to(dtype))
        values = self.patches(patches, members >= 0) + places
        present = chosen >= 0
        marks = torch.zeros_like(present)
        if self.special is not None:
            B = len(values)
            front = self.special.to(values.dtype).expand(B, -1, -1)
            values, places = (torch.cat([front, part], dim=1) for part in (values, places))
            centres = torch.cat([centres.new_zeros(B, 1, 3), centres], dim=1)
            present = torch.cat([present.new_ones(B, 1), present], dim=1)
            marks = torch.cat([marks.new_ones(B, 1), marks], dim=1)
        return Tokens(values, Grid(centres, present, marks), places)

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the points of each group relative to its centre, [B, N, 3 * neighbors].

        The centre is not hidden: it is the token's position (Point-MAE, section 3.2). A place that a group of fewer
        points leaves empty is not observed.
        """
        _, _, members, around = self._groups(inputs)
        short = self.config.neighbors - members.shape[2]  # of a batch of small clouds
        front = 0 if self.special is None else 1
        there = (members >= 0)[..., None].expand_as(around)
        values, observed = (
            nn.functional.pad(part.flatten(2), (0, 3 * short, front, 0))
            for part in (around.masked_fill(~there, 0.0), there)
        )
        return Content(values, observed, points=3)

    def _groups(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which points are centres [B, G], where these are [B, G, 3], their neighbours [B, G, K] relative [B, G, K, 3].

        -1 is no centre, or no neighbour.
        """
        points, valid = inputs["points"].float(), inputs["valid"]
        chosen = farthest_points(points, valid, self.config.groups)
        centres = gather(points, chosen)
        members = nearest(centres, points, valid, self.config.neighbors)
        return chosen, centres, members, gather(points, members) - centres[:, :, None]

    def no_weight_decay(self) -> set[str]:
        """The class token."""
        return set() if self.special is None else {"special"}


class PatchNet(nn.Module):
    """The small PointNet of Point-BERT (section 3.1), with LayerNorm in place of BatchNorm.

    Each point goes through two layers; the maximum over the points of its group is put beside it; two more layers and
    another maximum give the token. BatchNorm would mix the samples of a batch, and count padding.

    Args:
        channels: of a point.
        hidden: channels of the first layer; the others have 2, 4 times as many and ``width``.
        width: D.
    """

    def __init__(self, channels: int, hidden: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, 2 * hidden)
        )
        self.second = nn.Sequential(
            nn.Linear(4 * hidden, 4 * hidden), nn.LayerNorm(4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, width)
        )

    def forward(self, points: Tensor, valid: Tensor) -> Tensor:
        """[B, G, K, channels] and bool [B, G, K] to [B, G, D]; zero where a group has no valid point."""
        own = self.first(points)
        shared = masked_max(own, valid)[:, :, None].expand_as(own)
        return masked_max(self.second(torch.cat([shared, own], dim=3)), valid)


def masked_max(values: Tensor, valid: Tensor) -> Tensor:
    """The maximum over the last axis but one, of valid entries; zero where there is none. [..., K, C] to [..., C]."""
    low = values.masked_fill(~valid[..., None], torch.finfo(values.dtype).min).amax(-2)
    return low.masked_fill(~valid.any(-1)[..., None], 0)

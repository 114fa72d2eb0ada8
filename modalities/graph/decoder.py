"""A predictor that passes messages: what hidden nodes are, from what their neighbours became (GraphMAE's decoder).

In a recipe::

    input: mask-token
    predictor: {type: graph-gnn, conv: gin, depth: 1}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.modalities.graph._packed import Packed, convolution
from mmrep.predictors.predictor import Predictor, take
from mmrep.registry import require
from mmrep.tokens import Grid, Tokens, indicator


@config
class GraphDecoderConfig:
    """conv, heads: as of the encoder ``graph-gnn``. depth: convolutions, with ReLU between them.

    gin and gat read the encoder's vectors of edges if these are as wide as its nodes.

    remask: what the encoder made of the hidden nodes is replaced by another learned vector, so that only messages from
    other nodes tell what they are (GraphMAE, section 3.2); without it the decoder may simply read it off.
    """

    conv: Literal["gin", "gcn", "sage", "gat"] = "gin"
    depth: Annotated[int, Field(ge=1)] = 1
    heads: Annotated[int, Field(ge=1)] = 4
    remask: bool = True


class GraphDecoder(Predictor):
    """``head(conv(... conv(W h)))`` at the hidden nodes, W h being a learned vector there (GraphMAE, arXiv:2205.10803).

    It runs along the edges of the whole graph. The encoder has seen every node, the hidden ones as mask tokens.
    """

    Config = GraphDecoderConfig
    needs_hidden = True

    def __init__(self, config: GraphDecoderConfig, *, width: int, out: int, axes: int, condition: int = 0) -> None:
        super().__init__(config, width=width, out=out, axes=axes, condition=condition)
        if condition:
            raise ValueError("predictor 'graph-gnn' takes no condition; use 'transformer'")
        if config.conv == "gat" and width % config.heads:
            raise ValueError(f"predictor 'graph-gnn': heads={config.heads} does not divide width={width}")
        geometric: Any = require("torch_geometric.nn", "graph")
        self.embed = nn.Linear(width, width, bias=False)
        self.token = nn.Parameter(0.02 * torch.randn(width)) if config.remask else None
        self.convs = nn.ModuleList(
            convolution(geometric, config.conv, width, config.heads, typed=True) for _ in range(config.depth)
        )
        self.head = nn.Linear(width, out)

    def forward(
        self, context: Tokens, index: Tensor, tokens: Tokens, target: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """See `Predictor.forward`.

        Raises:
            ValueError: the tokens are no graph's, or others stand among them (``given`` fields).
        """
        grid = tokens.grid
        if grid.edges is None or context.values.shape[1] != grid.valid.shape[1]:
            raise ValueError("predictor 'graph-gnn' reads the nodes of one graph: a graph encoder's, without `given`")
        values = self.embed(context.values)
        if self.token is not None:
            hidden = indicator(target, values.shape[1])[..., None]
            values = torch.where(hidden, self.token.to(values.dtype), values)
        packed = Packed(grid)
        along, found = self._along(grid), packed.take(values)
        for number, conv in enumerate(self.convs):
            found = conv(F.relu(found) if number else found, packed.edges, *along)
        return take(self.head(packed.put(found)), target)

    def _along(self, grid: Grid) -> tuple[Tensor, ...]:
        """What a convolution is given beside the edges: their vectors, their weights, or nothing."""
        assert grid.edges is not None
        conv, width = cast(GraphDecoderConfig, self.config).conv, self.embed.out_features
        if conv == "sage":
            return ()
        if conv == "gcn":
            weights = getattr(grid, "edge_weights", None)
            return () if weights is None else (weights,)
        found = getattr(grid, "edge_values", None)
        if found is None or found.shape[1] != width:
            found = self.head.weight.new_zeros(grid.edges.shape[1], width)
        return (found,)

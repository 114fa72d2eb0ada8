"""Message passing over graphs and molecules with torch_geometric's convolutions.

In a recipe::

    encoder: {type: graph-gnn, input: molecule, conv: gin, width: 128, depth: 4}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.modalities.graph._base import GraphEncoder
from mmrep.modalities.graph._checkpoint import check_safetensors, load_checkpoint
from mmrep.modalities.graph._embed import reads_edges
from mmrep.modalities.graph._packed import Packed, convolution
from mmrep.modalities.graph.read import Reading
from mmrep.registry import require
from mmrep.tokens import Encoding, Inputs, Tokens

READS_EDGES = ("gin", "gat")
"""Convolutions that see edge features; `gcn` alone sees edge weights."""


class GraphGNN(GraphEncoder):
    """A stack of graph convolutions; a token is a node.

    Only kept nodes are computed: those that `encode` drops take no part in message passing, which then runs on the
    induced subgraph. Degrees, however, are those of the whole graph, as positions are in other modalities. A layer's
    output is that of its block, before the final norm.
    """

    @config
    class Config(Reading):
        """Fields of a ``graph-gnn``, beside how graphs are read.

        conv: ``gin`` (arXiv:1810.00826; with edge features GINE, arXiv:1905.12265), ``gcn`` (arXiv:1609.02907),
        ``sage`` (arXiv:1706.02216) or ``gat`` (arXiv:1710.10903). gcn and sage see no edge features, of molecules not
        even the kinds of bonds; gcn alone sees edge weights. width: D. depth: number of blocks. heads: of gat; must
        divide ``width``. residual: add a block's input to its output. norm: of a block's nodes, one by one (``layer``)
        or over each graph (``graph``, GraphNorm, arXiv:2009.03294); neither depends on other graphs of the batch. jump:
        jumping knowledge (arXiv:1806.03536): the last block's output, the highest of all blocks, or all joined and
        mapped to ``width``. dropout: probability, at each block's end. checkpoint: a ``.safetensors`` file of weights
        of a ``graph-gnn`` of this config, or of a saved model that has one.
        """

        conv: Literal["gin", "gcn", "sage", "gat"] = "gin"
        width: Annotated[int, Field(ge=1)] = 128
        depth: Annotated[int, Field(ge=1)] = 4
        heads: Annotated[int, Field(ge=1)] = 4
        residual: bool = True
        norm: Literal["layer", "graph", "none"] = "layer"
        jump: Literal["last", "max", "cat"] = "last"
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        checkpoint: str | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.conv == "gat" and self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")
            if self.conv not in READS_EDGES and self.input == "graph" and reads_edges(self):
                asked = "edge features" if self.edge_features or self.edge_categories else "directed: both"
                raise ValueError(
                    f"conv {self.conv!r} cannot tell edges apart, so {asked} would be lost; use conv gin or gat, or "
                    "leave the edge fields out (extra: ignore reads such graphs) and set directed to undirected or keep"
                )
            check_safetensors(self.checkpoint)

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, reading=config)
        geometric: Any = require("torch_geometric.nn", "graph")
        self.config: GraphGNN.Config = config
        self.width, self.depth = config.width, config.depth
        self.embed(config.width, config.width if config.conv in READS_EDGES else None)
        typed = self.edge_embedding is not None
        self.convs = nn.ModuleList(
            convolution(geometric, config.conv, config.width, config.heads, typed=typed) for _ in range(config.depth)
        )
        self.norms = nn.ModuleList(_norm(geometric, config) for _ in range(config.depth))
        self.jump = None if config.jump == "last" else geometric.JumpingKnowledge(config.jump)
        self.joined = nn.Linear(config.depth * config.width, config.width) if config.jump == "cat" else None
        self.norm = nn.LayerNorm(config.width)
        if config.checkpoint is not None and files is None:
            load_checkpoint(self, Path(config.checkpoint))

    def save_files(self, folder: Path) -> None:
        """With a ``checkpoint``, note that the saved state has its weights: the file is then not looked for again."""
        if self.config.checkpoint is not None:
            (folder / "checkpoint.txt").write_text(f"{Path(self.config.checkpoint).name}\n", encoding="utf-8")

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Embedded nodes [B, N, D], with their edges in the grid."""
        return self.tokens(inputs, *self.node_embedding(inputs))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Pass messages along the edges between kept nodes; [B, N', D], normed."""
        self.check_request(keep, layers)
        kept = tokens.keep(keep)
        grid = kept.grid
        packed = Packed(grid)
        edge_values, weights = getattr(grid, "edge_values", None), getattr(grid, "edge_weights", None)
        values = packed.take(kept.values)
        outputs: list[Tensor] = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            values = self._block(conv, norm, values, packed, edge_values, weights)
            outputs.append(values)
        if self.jump is not None:
            values = self.jump(outputs)
        if self.joined is not None:
            values = self.joined(values)
        asked = tuple(packed.put(outputs[number - 1]) for number in layers)
        return Encoding(Tokens(packed.put(self.norm(values)), grid), layers=asked)

    def layer_modules(self) -> list[nn.Module]:
        """See `Encoder.layer_modules`: a convolution and its norm each."""
        return [nn.ModuleList(layer) for layer in zip(self.convs, self.norms, strict=True)]

    def _block(
        self, conv: Any, norm: Any, values: Tensor, packed: Packed, edge_values: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """Convolution, norm, ReLU, dropout, residual."""
        if self.edge_embedding is not None and edge_values is not None:
            out = conv(values, packed.edges, edge_values)
        elif self.config.conv == "gcn":
            out = conv(values, packed.edges, weights)
        else:
            out = conv(values, packed.edges)
        if self.config.norm == "graph":
            exact = out if out.dtype == torch.float64 else out.float()  # its statistics overflow in half precision
            out = norm(exact, packed.graph, packed.graphs)
        else:
            out = norm(out)
        out = F.dropout(F.relu(out), self.config.dropout, self.training)
        return values + out if self.config.residual else out


def _norm(geometric: Any, config: GraphGNN.Config) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.width)
    return geometric.GraphNorm(config.width) if config.norm == "graph" else nn.Identity()

"""A transformer over the nodes of a graph, with structural encodings.

Random-walk and Laplacian encodings as in GPS (arXiv:2205.12454), degrees and biases by distance and edge as in
Graphormer (arXiv:2106.05234). In a recipe::

    encoder: {type: graph-transformer, input: molecule, width: 128, depth: 4, class_token: true}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.graph._base import GraphEncoder
from mmrep.modalities.graph._grid import GraphGrid
from mmrep.modalities.graph._structure import (
    SignFree,
    adjacency,
    laplacian,
    random_walk,
    shortest_paths,
)
from mmrep.modalities.graph.read import Reading
from mmrep.tokens import Content, Encoding, Inputs, Tokens

Count = Annotated[int, Field(ge=0)]


class GraphTransformer(GraphEncoder):
    """A token is a node; the class token, if any, stands in front and has no edges.

    Encodings of a node's place in the whole graph are added before any node is dropped, and distances are those of the
    whole graph. Equal up to the order of nodes: renumbering a graph renumbers its tokens and changes nothing else.
    Memory grows with the square of the number of nodes. Parallel edges count as often as they are read.
    """

    @config
    class Config(Reading):
        """Fields of a ``graph-transformer``, beside how graphs are read.

        width: D. depth: number of blocks. heads: attention heads; must divide ``width``. mlp_ratio: hidden width of the
        MLPs over ``width``. class_token: put a class token in front. random_walk: steps of the random-walk encoding, 0
        = none. laplacian: eigenvectors of the Laplacian encoding, 0 = none. distance: attention gets a bias by the
        number of steps between two nodes, told apart up to this many, 0 = none. Edge features and directions, if any
        are read, give a bias between the nodes that they join. dropout, drop_path, layer_scale: as in `image-vit`.
        """

        width: Annotated[int, Field(ge=1)] = 128
        depth: Annotated[int, Field(ge=1)] = 4
        heads: Annotated[int, Field(ge=1)] = 4
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
        class_token: bool = False
        random_walk: Count = 16
        laplacian: Count = 0
        distance: Count = 8
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
        layer_scale: Annotated[float, Field(gt=0)] | None = None
        max_nodes: Annotated[int, Field(ge=1)] = 1_000

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, reading=config)
        self.config: GraphTransformer.Config = config
        self.width, self.depth = config.width, config.depth
        self.embed(config.width, config.heads)
        self.walks = nn.Linear(config.random_walk, config.width) if config.random_walk else None
        self.spectrum = SignFree(config.laplacian, config.width) if config.laplacian else None
        # One row more for what is farther, and one for the way from and to the class token.
        self.distance = nn.Embedding(config.distance + 3, config.heads) if config.distance else None
        if self.distance is not None:
            nn.init.zeros_(self.distance.weight)
        self.special = nn.Parameter(0.02 * torch.randn(1, 1, config.width)) if config.class_token else None
        self.dropout = nn.Dropout(config.dropout)
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

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Embedded nodes with their structural encodings, [B, N, D]; one token more in front with a class token."""
        values, places = self.node_embedding(inputs)
        links, distances = None, None
        if self.walks is not None or self.spectrum is not None or self.distance is not None:
            with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
                links = adjacency(inputs["edges"], inputs.get("edge_weights"), inputs["valid"].shape[1])
                walks = random_walk(links, self.config.random_walk) if self.walks is not None else None
                spectrum = laplacian(links, inputs["valid"], self.config.laplacian) if self.spectrum else None
                distances = shortest_paths(links, self.config.distance) if self.distance is not None else None
            if self.walks is not None and walks is not None:
                walked = self.walks(walks.to(self.walks.weight.dtype))
                values, places = values + walked, places + walked
            if self.spectrum is not None and spectrum is not None:
                waves = self.spectrum(*spectrum)
                values, places = values + waves, places + waves
        tokens = self.tokens(inputs, self.dropout(values), places, distances)
        return tokens if self.special is None else self._with_class(tokens)

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding: [B, N', D], normed; the layers are block outputs, not normed."""
        self.check_request(keep, layers)
        kept = tokens.keep(keep)
        bias = self._bias(kept)
        if bias is None:
            values, asked = self.transformer(kept.values, kept.grid.valid, layers)
            return Encoding(Tokens(self.norm(values), kept.grid), layers=asked)
        values, found = kept.values, {}
        for number, block in enumerate(self.transformer.blocks, start=1):
            values = block(values, bias)
            if number in layers:
                found[number] = values
        return Encoding(Tokens(self.norm(values), kept.grid), layers=tuple(found[number] for number in layers))

    def no_weight_decay(self) -> set[str]:
        """The class token and the bias by distance."""
        names = set() if self.special is None else {"special"}
        return names | ({"distance.weight"} if self.distance is not None else set())

    def _with_class(self, tokens: Tokens) -> Tokens:
        """Put the class token in front of every row."""
        assert self.special is not None
        grid = tokens.grid
        assert isinstance(grid, GraphGrid)
        assert grid.edges is not None
        B, N, D = tokens.values.shape
        distances = grid.distances
        if distances is not None:
            distances = nn.functional.pad(distances, (1, 0, 1, 0), value=self.config.distance + 2)
        front = torch.ones(B, 1, dtype=torch.bool, device=grid.valid.device)
        moved = GraphGrid(
            coords=torch.cat([grid.coords.new_zeros(B, 1, grid.coords.shape[2]), grid.coords], 1),
            valid=torch.cat([front, grid.valid], 1),
            special=torch.cat([front, grid.special], 1),
            edges=grid.edges + 1 + grid.edges // max(N, 1),
            edge_values=grid.edge_values,
            edge_weights=grid.edge_weights,
            distances=distances,
        )
        front, places = self.special.to(tokens.values.dtype).expand(B, 1, D), tokens.positions
        places = None if places is None else torch.cat([front, places], 1)
        return Tokens(torch.cat([front, tokens.values], 1), moved, places)

    def content(self, inputs: Inputs) -> Content:
        """See `GraphEncoder.content`; the class token stands in front."""
        content, front = super().content(inputs), int(self.special is not None)
        shift = (front, 0) if content.values.ndim == 2 else (0, 0, front, 0)
        seen = content.observed
        return replace(
            content,
            values=nn.functional.pad(content.values, shift),
            observed=None if seen is None else nn.functional.pad(seen, shift),
        )

    def _bias(self, tokens: Tokens) -> Tensor | None:
        """What is added to the logits of attention: float [B, heads, N, N], -inf where a key is padding."""
        grid = tokens.grid
        assert isinstance(grid, GraphGrid)
        assert grid.edges is not None
        B, N, _ = tokens.values.shape
        if self.distance is None and grid.edge_values is None:
            return None
        bias = tokens.values.new_zeros(B, N, N, self.config.heads)
        if self.distance is not None and grid.distances is not None:
            # Row: the query, to which the message comes.
            bias = bias + self.distance(grid.distances).transpose(1, 2)
        if grid.edge_values is not None:
            source, target = grid.edges
            pair = target * N + source % max(N, 1)
            flat = bias.flatten(0, 2)
            bias = flat.index_add(0, pair, grid.edge_values.to(flat.dtype)).view_as(bias)
        seen = grid.valid | ~grid.valid.any(1, keepdim=True)
        return bias.permute(0, 3, 1, 2).masked_fill(~seen[:, None, None, :], float("-inf"))

"""What every graph encoder shares: reading, padding, the grid with its edges, and example graphs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmrep.encoder import BadSampleError, Encoder
from mmrep.modalities.graph import _examples
from mmrep.modalities.graph._embed import EdgeEmbedding, NodeEmbedding, reads_edges
from mmrep.modalities.graph._grid import GraphGrid
from mmrep.modalities.graph.molecules import draw, is_molecule
from mmrep.modalities.graph.read import Reading, read
from mmrep.modalities.graph.record import Graph
from mmrep.tokens import Content, Inputs, Tokens
from mmrep.views import View

if TYPE_CHECKING:
    from PIL.Image import Image

_FILL = {"nodes": -1, "edges": -1, "edge_ids": -1}


class GraphEncoder(Encoder):
    """Reads graphs; a subclass makes ``node_embedding`` and ``edge_embedding`` by `embed` and adds ``encode``.

    The inputs of a batch are, N and E being the most nodes and edges of a graph in it:

    - ``nodes`` int64 [B, N]: where the node stood in the raw graph, -1 is padding; ``valid`` bool [B, N];
    - ``edges`` int64 [B, E, 2]: source and target, indices into the N, -1 is padding. An undirected edge is there
      twice; ``edge_ids`` int64 [B, E] gives both ways the same number; ``edge_types`` int64 [B, E] says whether it is
      (0) undirected, (1) an edge of a directed graph, (2) its reverse;
    - as the config has them, ``features`` float32 [B, N, F], ``categories`` int64 [B, N, K], ``edge_features`` float32
      [B, E, F'] and ``edge_categories`` int64 [B, E, K']; a category of -1 is unknown or masked;
    - after a diffusion view ``edge_weights`` float32 [B, E] and ``diffusion`` float32 [B], its parameter.

    A token is a node, in the raw graph's order; its coordinate is the place of the node in the raw graph.

    Args:
        config: the encoder's config.
        files: see `Encoder`.
        reading: how graphs are read; may be the config itself.
    """

    modality = "graph"
    node_embedding: NodeEmbedding
    edge_embedding: EdgeEmbedding | None

    def __init__(self, config: Any, files: Path | None = None, *, reading: Reading) -> None:
        super().__init__(config, files)
        self.reading = reading

    def embed(self, width: int, edge_width: int | None) -> None:
        """Make the embeddings of nodes and, unless ``edge_width`` is None or edges are all alike, of edges."""
        self.node_embedding = NodeEmbedding(self.reading, width)
        if not (self.reading.node_sizes or self.reading.node_features):  # a node is nothing but its place
            self.supports = self.supports - {"content", "mask_token"}
        reads = edge_width is not None and reads_edges(self.reading)
        self.edge_embedding = EdgeEmbedding(self.reading, edge_width) if reads and edge_width else None

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One graph to the inputs of its class's docstring, without the batch axis, ``valid`` and padding.

        Raises:
            BadSampleError: the graph cannot be read; see `mmrep.modalities.graph.read.read`.
        """
        graph = read(raw, self.reading)
        if view is not None:
            graph = view.sample(graph, seed)
        return tensors(graph)

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad nodes and edges to the most of any graph: features with 0, indices with -1."""
        if not items:
            items = [tensors(read(self.examples(1, 0)[0], self.reading))]
            return {key: value[:0] for key, value in self.collate(items).items()}
        batch: Inputs = {}
        for key, first in items[0].items():
            length = max((len(item[key]) for item in items), default=0) if first.ndim else 0
            shape = (len(items), length, *first.shape[1:]) if first.ndim else (len(items),)
            padded = torch.full(shape, _FILL.get(key, 0), dtype=first.dtype)
            for row, item in enumerate(items):
                if first.ndim:
                    padded[row, : len(item[key])] = item[key]
                else:
                    padded[row] = item[key]
            batch[key] = padded
        return {**batch, "valid": batch["nodes"] >= 0}

    def length(self, item: Inputs) -> int:
        """The number of nodes."""
        return len(item["nodes"])

    def summary(self, item: Inputs) -> Tensor:
        """Counts of nodes by first category (120) and by degree (0 to 8 and more), and sums of features: float32."""
        edges, n = item["edges"], len(item["nodes"])
        degrees = torch.bincount(edges[:, 0], minlength=n)[:n].clamp_max(8)
        parts = [torch.bincount(degrees, minlength=9)]
        if "categories" in item:
            parts.append(torch.bincount(item["categories"][:, 0].clamp(0, 119), minlength=120))
        if "features" in item:
            parts.append(item["features"].sum(0))
        return torch.cat([part.float() for part in parts])

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the first category of each node (of molecules the element), or else its features.

        A category that is unknown or masked is not observed. A node without attributes has no content.
        """
        if "content" not in self.supports:
            return super().content(inputs)
        if not self.reading.node_sizes:
            return Content(inputs["features"])
        codes = inputs["categories"][..., 0]
        return Content(codes.clamp_min(0), codes >= 0, vocabulary=self.reading.node_sizes[0])

    def tokens(self, inputs: Inputs, values: Tensor, places: Tensor, distances: Tensor | None = None) -> Tokens:
        """Node values [B, N, D] and the part of them that is the node's place [B, N, D], with their grid."""
        B, N = inputs["valid"].shape
        edges = inputs["edges"]
        rows = torch.arange(B, device=edges.device)[:, None]
        ends_valid = inputs["valid"][rows[..., None], edges.clamp_min(0)].all(-1) if N else edges[..., 0] >= 0
        there = (edges >= 0).all(-1) & ends_valid
        flat = (edges + N * rows[..., None])[there].T
        weights = inputs.get("edge_weights")
        grid = GraphGrid(
            coords=inputs["nodes"].clamp_min(0).to(torch.float32)[..., None],
            valid=inputs["valid"],
            special=torch.zeros_like(inputs["valid"]),
            edges=flat,
            edge_values=None if self.edge_embedding is None else self.edge_embedding(inputs)[there],
            edge_weights=None if weights is None else weights[there],
            distances=distances,
        )
        return Tokens(values, grid, places if "mask_token" in self.supports else None)

    def preview(self, raw: Any) -> Image | str:
        """The drawing of a molecule if rdkit is there, or a line such as ``graph of 12 nodes, 24 edges``.

        An undirected edge counts once.
        """
        try:
            if is_molecule(raw) and find_spec("rdkit") is not None:
                return draw(raw)
            graph = read(raw, self.reading)
        except BadSampleError as error:
            return str(error)
        kind = "directed graph" if graph.directed else "graph"
        n, e = len(graph), len(np.unique(graph.edge_ids))
        return f"{kind} of {n} node{'s' * (n != 1)}, {e} edge{'s' * (e != 1)}"

    def examples(self, n: int, seed: int) -> list[Any]:
        """Paths, cycles, stars, random graphs and a lone node, of several sizes and raw forms, as the config reads."""
        return _examples.examples(self.reading, n, seed)

    def oddities(self, seed: int) -> dict[str, Any]:
        """Graphs at and past the edge: dangling, empty, huge, of wrong features, not graphs at all."""
        return _examples.oddities(self.reading, seed)


def tensors(graph: Graph) -> Inputs:
    """A record as the tensors that it is collated from."""
    item = {
        "nodes": graph.nodes,
        "edges": graph.edges,
        "edge_ids": graph.edge_ids,
        "edge_types": graph.edge_types,
        "features": graph.features,
        "categories": graph.categories,
        "edge_features": graph.edge_features,
        "edge_categories": graph.edge_categories,
        "edge_weights": graph.edge_weights,
    }
    out = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in item.items() if value is not None}
    return out if graph.diffusion is None else {**out, "diffusion": torch.tensor(graph.diffusion)}

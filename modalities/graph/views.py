"""Random readings of graphs: fewer edges, nodes and features, a part of the graph, or its diffusion.

In a recipe (GraphCL's pair, arXiv:2010.13902, and MVGRL's, arXiv:2006.05582)::

    views: {graph: [{type: graph-augment, edge_drop: 0.2}, {type: graph-augment, edge_drop: 0, subgraph: walk}]}
    views: {graph: [{type: graph-augment, edge_drop: 0}, {type: graph-augment, edge_drop: 0, diffusion: ppr}]}
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.modalities.graph._subgraph import diffuse, hops, walk
from mmrep.modalities.graph.record import Graph
from mmrep.tokens import Inputs
from mmrep.views.view import Params, View, uniform

Share = Annotated[float, Field(ge=0, le=1)]
_EDGES, _NODES, _FEATURES, _COLUMNS = 1, 2, 3, 4  # streams of random numbers


class GraphAugment(View):
    """Changes of a graph that are drawn from its sample's seed alone, whatever the batch.

    What changes sizes happens to one sample in a loader worker (`sample`): the diffusion, then the subgraph. The rest
    happens to the whole batch on its device (`batch`): nodes, edges and features are dropped in place. Both ways of an
    edge go together, and a graph always keeps a node.
    """

    @config
    class Config:
        """Probabilities; with all at 0 and both kinds at ``none`` the view changes nothing.

        edge_drop: of dropping an edge. node_drop: of dropping a node with its edges. feature_mask: of masking a node's
        features: floats become 0, categories unknown. column_mask: of masking one column of the features of all nodes
        of the graph (GRACE, arXiv:2006.04131). subgraph: the nodes that a random walk meets until it has met ``size``
        of them all (``walk``; ``restart`` is its probability of going back to the start), or those within ``hops``
        edges of a random node. diffusion: the edges are the entries of personalised PageRank (``ppr``; alpha is drawn
        from ``alpha``) or of the heat kernel (``heat``; ``time``) that are at least ``threshold``. role: what the
        reading is for.
        """

        edge_drop: Share = 0.2
        node_drop: Share = 0.0
        feature_mask: Share = 0.0
        column_mask: Share = 0.0
        subgraph: Literal["none", "walk", "hops"] = "none"
        size: Share = 0.8
        restart: Annotated[float, Field(ge=0, lt=1)] = 0.1
        hops: Annotated[int, Field(ge=0)] = 2
        diffusion: Literal["none", "ppr", "heat"] = "none"
        alpha: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.2, 0.2)
        time: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (5.0, 5.0)
        threshold: Annotated[float, Field(gt=0)] = 0.01
        role: Literal["global", "local", "context", "target", "corrupt"] = "global"

        def __post_init__(self) -> None:
            for name in ("alpha", "time"):
                low, high = getattr(self, name)
                if low > high:
                    raise ValueError(f"{name}: the lowest, {low}, is above the highest, {high}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config: GraphAugment.Config = config
        self.role = config.role

    def sample(self, decoded: Graph, seed: int) -> Graph:
        """The diffusion and the subgraph of one graph. Nodes keep their order, and ``nodes`` says which are left."""
        c = self.config
        generator = np.random.default_rng(seed % 2**63)
        start = generator.random()  # drawn always, so that the subgraph is the same with and without a diffusion
        nodes = None
        if c.subgraph == "walk":
            nodes = walk(decoded, c.size, c.restart, generator)
        elif c.subgraph == "hops":
            nodes = hops(decoded, c.hops, generator)
        if c.diffusion != "none":
            low, high = c.alpha if c.diffusion == "ppr" else c.time
            decoded = diffuse(decoded, c.diffusion, low + (high - low) * start, c.threshold)
        return decoded if nodes is None else decoded.induced(nodes)

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Drop nodes, edges and features of collated graphs; see `GraphEncoder` for the inputs.

        Returns:
            The inputs, in which what was dropped is -1, 0 or not valid, and the parameters:

            - ``nodes`` int64 [B, N]: where each remaining node stood in the raw graph, -1 for padding and what was
              dropped; nodes that `sample` left out are not among the N.
            - ``edges`` bool [B, E]: which entries of ``inputs["edges"]`` remain.
            - ``masked`` bool [B, N]: nodes whose features are masked. ``columns`` bool [B, F + K]: masked columns,
              floats first.
            - ``diffusion`` float32 [B], alpha or time, after a diffusion.
        """
        seeds = seeds.to(inputs["edges"].device)
        valid = self._nodes(inputs["valid"], seeds)
        edges = self._edges(inputs, valid, seeds)
        masked, columns = self._masks(inputs, valid, seeds)
        out = {
            **inputs,
            "valid": valid,
            "nodes": inputs["nodes"].masked_fill(~valid, -1),
            "edges": inputs["edges"].masked_fill(~edges[..., None], -1),
        }
        floats = inputs["features"].shape[2] if "features" in inputs else 0
        for name, part, fill in (("features", columns[:, :floats], 0), ("categories", columns[:, floats:], -1)):
            if name in inputs:
                gone = masked[..., None] | (part[:, None] & valid[..., None])
                out[name] = inputs[name].masked_fill(gone, fill)
        params = {"nodes": out["nodes"], "edges": edges, "masked": masked, "columns": columns}
        return out, params if "diffusion" not in inputs else {**params, "diffusion": inputs["diffusion"]}

    def _nodes(self, valid: Tensor, seeds: Tensor) -> Tensor:
        if not self.config.node_drop or not valid.numel():
            return valid
        u = uniform(seeds, valid.shape[1], _NODES)
        # The node with the greatest number stays whatever the probability.
        last = u.masked_fill(~valid, -1).argmax(1, keepdim=True)
        stays = (u >= self.config.node_drop).scatter(1, last, True)
        return valid & stays

    def _edges(self, inputs: Inputs, valid: Tensor, seeds: Tensor) -> Tensor:
        edges, ids = inputs["edges"], inputs["edge_ids"]
        stays = (edges >= 0).all(-1)
        if not edges.numel():
            return stays
        at = edges.clamp_min(0)
        stays = stays & valid.gather(1, at[..., 0]) & valid.gather(1, at[..., 1])
        if self.config.edge_drop:
            # One number an edge, not one a way; there are at least as many ways as edges.
            u = uniform(seeds, edges.shape[1], _EDGES).gather(1, ids.clamp_min(0))
            stays = stays & (u >= self.config.edge_drop)
        return stays

    def _masks(self, inputs: Inputs, valid: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        width = sum(inputs[name].shape[2] for name in ("features", "categories") if name in inputs)
        rows = uniform(seeds, valid.shape[1], _FEATURES) < self.config.feature_mask
        return rows & valid, uniform(seeds, width, _COLUMNS) < self.config.column_mask

"""Any raw graph to one record: dicts, torch_geometric's ``Data``, networkx graphs and adjacency matrices.

Third-party objects are known by what they can do, so that reading one imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmrep.config import config
from mmrep.encoder import BadSampleError
from mmrep.modalities.graph._columns import columns, numbers
from mmrep.modalities.graph._edges import symmetric, wire
from mmrep.modalities.graph.molecules import ATOM_CATEGORIES, BOND_CATEGORIES, is_molecule, molecule
from mmrep.modalities.graph.record import Graph, Listed

Count = Annotated[int, Field(ge=0)]
Sizes = tuple[Annotated[int, Field(ge=1)], ...]
_NAMES = {
    "x": ("x", "node_features", "node_feat"),
    "edge_attr": ("edge_attr", "edge_features", "edge_feat"),
    "node_categories": ("node_categories",),
    "edge_categories": ("edge_categories",),
}


@config
class Reading:
    """How a raw graph becomes the network's input. It is part of the encoder and saved with it.

    input: ``graph``, or ``molecule``: SMILES strings, rdkit molecules, or graphs with their atom and bond categories
    (the fields of features are then given). hydrogens: molecules get their hydrogens as nodes.
    node_features: number of float columns of a node, 0 = none. node_categories: number of values of each integer column
    of a node. edge_features, edge_categories: the same for edges. extra: a graph that has features which no field
    announces is refused, or they are ignored. node_attributes, node_labels, edge_attributes, edge_labels: names of the
    networkx attributes that are read, the first of each pair as float columns, the second as one integer column each.
    directed: a directed graph is refused; read as ``undirected``; keeps its edges alone (``keep``: messages go from
    source to target); or gets reverse edges too, and each edge an embedding of its direction (``both``).
    parallel: of several edges between the same two nodes the first is kept (``merge``), or all are (``keep``).
    self_loops: keep edges from a node to itself (once), or drop them. degree: add an embedding of each node's degree;
    a graph of no features and no degree has the same learned vector at every node. max_degree: larger degrees count as
    this. max_nodes, max_edges: larger graphs are refused; edges are counted as listed.
    """

    input: Literal["graph", "molecule"] = "graph"
    hydrogens: bool = False
    node_features: Count = 0
    node_categories: Sizes = ()
    edge_features: Count = 0
    edge_categories: Sizes = ()
    extra: Literal["refuse", "ignore"] = "refuse"
    node_attributes: tuple[str, ...] = ()
    node_labels: tuple[str, ...] = ()
    edge_attributes: tuple[str, ...] = ()
    edge_labels: tuple[str, ...] = ()
    directed: Literal["refuse", "undirected", "keep", "both"] = "refuse"
    parallel: Literal["merge", "keep"] = "merge"
    self_loops: Literal["keep", "drop"] = "keep"
    degree: bool = True
    max_degree: Annotated[int, Field(ge=1)] = 32
    max_nodes: Annotated[int, Field(ge=1)] = 10_000
    max_edges: Annotated[int, Field(ge=1)] = 100_000

    def __post_init__(self) -> None:
        given = [name for name in ("node_features", "node_categories", "edge_features", "edge_categories")
                 if getattr(self, name)]  # fmt: skip
        if self.input == "molecule" and given:
            raise ValueError(f"input: molecule has features of its own; leave out {', '.join(given)}")

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Number of values of each integer column of a node."""
        return tuple(ATOM_CATEGORIES.values()) if self.input == "molecule" else self.node_categories

    @property
    def edge_sizes(self) -> tuple[int, ...]:
        """Number of values of each integer column of an edge."""
        return tuple(BOND_CATEGORIES.values()) if self.input == "molecule" else self.edge_categories


def read(raw: Any, how: Reading) -> Graph:
    """Read one graph.

    Args:
        raw: a dict of ``edge_index`` [2, e] (torch_geometric's convention: an undirected edge is listed in both
            directions), ``edges`` [e, 2] (each edge once; undirected unless ``directed`` says otherwise) or
            ``adjacency`` [n, n] (dense or scipy sparse; where it is not zero there is an edge, and its values are the
            edge feature if one is expected and no ``edge_attr`` given); with ``num_nodes``, ``x``, ``node_categories``,
            ``edge_attr``, ``edge_categories`` and ``directed`` as needed. Or a torch_geometric ``Data`` or a networkx
            graph. For ``input: molecule`` also a SMILES string or an rdkit molecule.
        how: see `Reading`.

    Raises:
        BadSampleError: the causes are listed in the modality's README.
    """
    if is_molecule(raw):
        if how.input != "molecule":
            raise BadSampleError(
                "not a graph", f"{type(raw).__name__} {str(raw)[:60]!r}: for molecules set input: molecule"
            )
        raw = molecule(raw, hydrogens=how.hydrogens)
    if hasattr(raw, "node_types") and hasattr(raw, "edge_types"):
        raise BadSampleError(
            "heterogeneous graph",
            "node and edge types become categories: homogeneous = data.to_homogeneous(); give {'edge_index': "
            "homogeneous.edge_index, 'node_categories': homogeneous.node_type[:, None], …} with node_categories set",
        )
    if all(hasattr(raw, name) for name in ("nodes", "edges", "is_directed")):
        return _resolve(_from_networkx(raw, how), how)
    if hasattr(raw, "edge_index") and hasattr(raw, "num_nodes"):
        raw = _from_data(raw)
    if not isinstance(raw, Mapping):
        hint = "; an adjacency matrix is given as {'adjacency': matrix}" if hasattr(raw, "shape") else ""
        raise BadSampleError("not a graph", f"a value of type {type(raw).__name__}{hint}")
    return _resolve(_from_mapping(cast("Mapping[str, Any]", raw), how), how)


def _from_data(raw: Any) -> dict[str, Any]:
    """The fields of a ``torch_geometric.data.Data``."""
    if getattr(raw, "num_graphs", 1) != 1:
        raise BadSampleError("not a graph", f"a Batch of {raw.num_graphs} graphs: give them one by one (to_data_list)")
    names = [name for several in _NAMES.values() for name in several] + ["directed"]
    found = {name: getattr(raw, name, None) for name in names}
    if raw.edge_index is None and getattr(raw, "adj_t", None) is not None:
        raise BadSampleError("not a graph", "Data with adj_t in place of edge_index: undo the ToSparseTensor transform")
    index = np.zeros((2, 0), np.int64) if raw.edge_index is None else raw.edge_index
    known = any(found[name] is not None for name in (*_NAMES["x"], "node_categories"))
    stored = None if known or "num_nodes" not in raw else raw.num_nodes  # asking for it would guess it from the edges
    return {**found, "edge_index": index, "num_nodes": stored}


def _from_mapping(raw: Mapping[str, Any], how: Reading) -> Listed:
    forms = [name for name in ("edge_index", "edges", "adjacency") if raw.get(name) is not None]
    if len(forms) != 1:
        keys = ", ".join(str(key) for key in list(raw)[:12])
        raise BadSampleError("not a graph", f"needs one of edge_index, edges and adjacency; it has the keys: {keys}")
    form = forms[0]
    given = {role: _first(raw, names) for role, names in _NAMES.items()}
    given = {role: None if value is None else numbers(value, role) for role, value in given.items()}
    nodes, values = None, None
    if form == "adjacency":
        edges, nodes, values = _from_adjacency(raw["adjacency"])
    else:
        edges = _pairs(raw[form], form)
    if values is not None and given["edge_attr"] is None and how.edge_features == 1:
        given["edge_attr"] = values
    x, node_categories = _split(given["x"], given["node_categories"], how.node_features, how.node_sizes)
    edge_attr, edge_categories = _split(given["edge_attr"], given["edge_categories"], how.edge_features, how.edge_sizes)
    n = _count_nodes(raw.get("num_nodes"), nodes, [x, node_categories], edges, how)
    directed = raw.get("directed")
    if directed is None and form == "edges":
        directed = False
    return Listed(
        n=n,
        edges=edges,
        features=columns(x, how.node_features, n, "node", extra=how.extra),
        categories=columns(node_categories, how.node_sizes, n, "node", extra=how.extra),
        edge_features=columns(edge_attr, how.edge_features, len(edges), "edge", extra=how.extra),
        edge_categories=columns(edge_categories, how.edge_sizes, len(edges), "edge", extra=how.extra),
        directed=None if directed is None else bool(directed),
    )


def _from_networkx(raw: Any, how: Reading) -> Listed:
    ids = tuple(raw.nodes)
    if not ids:
        raise BadSampleError("no nodes", "an empty networkx graph")
    if len(ids) > how.max_nodes:
        raise BadSampleError("too many nodes", f"{len(ids)} nodes; max_nodes is {how.max_nodes}")
    place = {name: i for i, name in enumerate(ids)}
    listed = list(raw.edges(data=True))
    node_rows = [raw.nodes[name] for name in ids]
    edge_rows = [edge[2] for edge in listed]
    edges = np.array([(place[u], place[v]) for u, v, _ in listed], np.int64).reshape(-1, 2)

    def pick(rows: list[Any], names: tuple[str, ...], expected: Any, noun: str) -> Any:
        return columns(_attributes(rows, names, noun) if names else None, expected, len(rows), noun, extra=how.extra)

    return Listed(
        n=len(ids),
        edges=edges,
        features=pick(node_rows, how.node_attributes, how.node_features, "node"),
        categories=pick(node_rows, how.node_labels, how.node_sizes, "node"),
        edge_features=pick(edge_rows, how.edge_attributes, how.edge_features, "edge"),
        edge_categories=pick(edge_rows, how.edge_labels, how.edge_sizes, "edge"),
        directed=bool(raw.is_directed()),
        ids=ids,
    )


def _attributes(rows: list[Any], names: tuple[str, ...], noun: str) -> NDArray[Any]:
    """The named attributes of all nodes or edges side by side; an attribute is a number or a vector."""
    parts: list[NDArray[Any]] = []
    for name in names:
        lacking = [i for i, row in enumerate(rows) if name not in row]
        if lacking:
            raise BadSampleError(
                "missing features", f"{len(lacking)} of {len(rows)} {noun}s have no attribute {name!r}"
            )
        values = numbers([row[name] for row in rows], f"{noun} attribute {name!r}")
        parts.append(values.reshape(len(rows), -1) if len(rows) else np.zeros((0, 1), values.dtype))
    return np.concatenate(parts, 1)


def _from_adjacency(matrix: Any) -> tuple[NDArray[np.int64], int, NDArray[Any]]:
    """Edges, number of nodes, and the value at each edge."""
    if hasattr(matrix, "tocoo"):
        sparse = matrix.tocoo()
        shape, row, column, values = sparse.shape, sparse.row, sparse.col, numbers(sparse.data, "adjacency")
        row, column, values = row[values != 0], column[values != 0], values[values != 0]
    else:
        dense = numbers(matrix, "adjacency")
        shape = dense.shape
        flat = np.flatnonzero(dense)
        row, column = np.divmod(flat, max(shape[-1:], default=1))
        values = dense.ravel()[flat]
    if len(shape) != 2 or shape[0] != shape[1]:
        raise BadSampleError("edge shape", f"adjacency has shape {tuple(shape)}, not [n, n]")
    if not np.isfinite(values).all():
        raise BadSampleError("not finite", "NaN or infinity in the adjacency matrix")
    return np.stack([row, column], 1).astype(np.int64), int(shape[0]), values[:, None]


def _pairs(raw: Any, form: str) -> NDArray[np.int64]:
    """``edge_index`` [2, e] or ``edges`` [e, 2] to int64 [e, 2]."""
    array = numbers(raw, form)
    wanted = "[2, e]" if form == "edge_index" else "[e, 2]"
    if array.size == 0 and array.ndim <= 2:
        return np.zeros((0, 2), np.int64)
    if array.ndim != 2 or array.shape[0 if form == "edge_index" else 1] != 2:
        turned = array.ndim == 2 and array.shape[1 if form == "edge_index" else 0] == 2
        other = "edges" if form == "edge_index" else "edge_index"
        hint = f"; give it as {other!r}" if turned else ""
        raise BadSampleError("edge shape", f"{form} has shape {array.shape}, not {wanted}{hint}")
    if not np.issubdtype(array.dtype, np.integer):
        raise BadSampleError("edge dtype", f"{form} is {array.dtype}; node indices are integers")
    pairs = array.T if form == "edge_index" else array
    if int(pairs.max()) > np.iinfo(np.int64).max:
        raise BadSampleError("dangling edge", f"an edge to node {int(pairs.max())}")
    return pairs.astype(np.int64)


def _split(values: Any, categories: Any, features: int, sizes: Sequence[int]) -> tuple[Any, Any]:
    """Where only categories are expected, the main array may hold them (as torch_geometric's molecules do)."""
    return (None, values) if sizes and not features and categories is None else (values, categories)


def _count_nodes(stated: Any, nodes: int | None, arrays: list[Any], edges: NDArray[np.int64], how: Reading) -> int:
    counts: dict[str, int] = {} if nodes is None else {"adjacency": nodes}
    if stated is not None:
        value = numbers(stated, "num_nodes")
        if value.size != 1 or not np.issubdtype(value.dtype, np.integer) or int(value.reshape(())) < 0:
            raise BadSampleError("node count", f"num_nodes is {stated!r}, not a whole number")
        counts["num_nodes"] = int(value.reshape(()))
    for array in arrays:
        if array is not None:
            counts["rows of node features"] = len(np.atleast_1d(array))
    if len(set(counts.values())) > 1:
        raise BadSampleError("node count", ", ".join(f"{name}: {count}" for name, count in counts.items()))
    n = next(iter(counts.values())) if counts else int(edges.max(initial=-1)) + 1
    if len(edges) and int(edges.min()) < 0:
        raise BadSampleError("negative index", f"an edge has the node {int(edges.min())}")
    if n == 0 and not len(edges):
        raise BadSampleError("no nodes", "a graph needs one; for featureless nodes without edges give num_nodes")
    if n > how.max_nodes:
        raise BadSampleError("too many nodes", f"{n} nodes; max_nodes is {how.max_nodes}")
    if len(edges) and int(edges.max()) >= n:
        raise BadSampleError("dangling edge", f"an edge to node {int(edges.max())} of a graph of {n} nodes")
    return n


def _resolve(listed: Listed, how: Reading) -> Graph:
    """Decide on directions and duplicates."""
    if len(listed.edges) > how.max_edges:
        raise BadSampleError("too many edges", f"{len(listed.edges)} edges; max_edges is {how.max_edges}")
    directed = listed.directed
    if directed is None:
        directed = not symmetric(listed)
    if directed and how.directed == "refuse":
        raise BadSampleError(
            "directed graph",
            "the encoder's config says directed: refuse; set it to undirected, keep or both, or give 'directed': False",
        )
    return wire(listed, directed, how.directed, merge=how.parallel == "merge", loops=how.self_loops == "keep")


def _first(raw: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), None)

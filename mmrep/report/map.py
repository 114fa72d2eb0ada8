"""The joint space in two dimensions: both fields of a sample of pairs, by PCA and t-SNE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmrep.report.data import PairSet
from mmrep.report.heatmap import unit
from mmrep.report.thumbnails import Shown, Viewer, shorten

PAIRS = 150
WIDTH, HEIGHT, MARGIN = 960, 680, 36
PICTURE = 24
_LABEL_LENGTH, _LABEL_HEIGHT, _LETTER = 22, 13, 6.2


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """One embedding: place in pixels, what it shows, and a label where there is room for one."""

    x: float
    y: float
    shown: Shown
    label: str = ""


@dataclass(frozen=True)
class SpaceMap:
    """The points of each field, in one order: point i of one field pairs with point i of the other.

    ``method`` says how the coordinates were made; ``links`` are the pairs' lines (x1, y1, x2, y2), pixels.
    """

    width: int
    height: int
    points: dict[str, list[Point]]
    links: list[tuple[float, float, float, float]]
    method: str
    of: int


def space_map(pairs: PairSet, viewer: Viewer, seed: int = 0) -> SpaceMap | str:
    """Lay out up to 150 pairs, or say why there is nothing to lay out."""
    paired = pairs.paired()
    if len(paired) < 2:
        return "a map needs two samples or more that have both fields"
    chosen = np.sort(np.random.default_rng(seed).permutation(paired)[:PAIRS])
    vectors = np.concatenate([unit(pairs.encoded.embeddings[name][chosen]) for name in pairs.fields])
    if np.ptp(vectors, axis=0).max() < 1e-6:
        return "all embeddings are equal: the space has collapsed to a point"
    flat, method = project(vectors, seed)
    places = _fit(flat)
    halves = dict(zip(pairs.fields, (places[: len(chosen)], places[len(chosen) :]), strict=True))
    shown = {name: [viewer.show(int(i), name, size=40) for i in chosen] for name in pairs.fields}
    taken = [_box(x, y, s) for name, at in halves.items() for (x, y), s in zip(at, shown[name], strict=True)]
    points = {
        name: [Point(float(x), float(y), s, _label(x, y, s, taken)) for (x, y), s in zip(at, shown[name], strict=True)]
        for name, at in halves.items()
    }
    first, second = (points[name] for name in pairs.fields)
    links = [(a.x, a.y, b.x, b.y) for a, b in zip(first, second, strict=True)]
    return SpaceMap(WIDTH, HEIGHT, points, links, method, len(paired))


def project(vectors: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], str]:
    """Rows [n, d] to the plane [n, 2], and the name of the method; the same for the same input and seed."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    parts = min(50, *vectors.shape)
    if len(vectors) < 8 or parts < 2:  # t-SNE has nothing to say about so few neighbours, or about a line
        plane = np.zeros((len(vectors), 2))
        plane[:, : min(parts, 2)] = PCA(min(parts, 2), svd_solver="full").fit_transform(vectors)
        return plane, "PCA"
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed, n_jobs=1)
    # One thread: the order of sums is fixed, and so few points gain nothing from more (on a busy machine they lose).
    with threadpool_limits(1):
        plane = tsne.fit_transform(PCA(parts, svd_solver="full").fit_transform(vectors))
    return plane, f"PCA to {parts} dimensions, then t-SNE with perplexity {perplexity:.0f}"


def _fit(flat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stretch the plane to the canvas, inside its margin, in tenths of a pixel."""
    low, high = flat.min(axis=0), flat.max(axis=0)
    share = (flat - low) / np.where(high > low, high - low, 1.0)
    return np.round(MARGIN + share * (np.array([WIDTH, HEIGHT]) - 2 * MARGIN), 1)


def _box(x: float, y: float, shown: Shown) -> Box:
    """What a point covers: left, top, right, bottom."""
    half = PICTURE / 2 if shown.picture else 4
    return x - half, y - half, x + half, y + half


def _label(x: float, y: float, shown: Shown, taken: list[Box]) -> str:
    """The text of a point without picture, shortened, if the place right of it is free; the place is then taken."""
    if shown.picture:
        return ""
    label = shorten(shown.text, _LABEL_LENGTH)
    box = (x + 7, y - _LABEL_HEIGHT / 2, x + 7 + _LETTER * len(label), y + _LABEL_HEIGHT / 2)
    overlaps = any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
    if overlaps or box[2] > WIDTH:
        return ""
    taken.append(box)
    return label

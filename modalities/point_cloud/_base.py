"""What every point cloud encoder shares: reading, thinning out and normalising a cloud, padding, and examples."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.encoder import Encoder
from mmrep.modalities.point_cloud._columns import Columns
from mmrep.modalities.point_cloud._render import render
from mmrep.modalities.point_cloud.decode import Cloud, decode
from mmrep.tokens import Inputs
from mmrep.views import View
from mmrep.views.view import uniform

FEATURES = ("colors", "normals")


@config
class Preprocess:
    """How a decoded cloud becomes the network's input. It is part of the encoder and saved with it.

    max_points: larger clouds are thinned out to so many points, and surfaces are sampled with so many. normalize:
    "unit-sphere" moves the centroid to 0 and the farthest point to distance 1; "none" keeps the source's units, such as
    metres, where size and place matter. features: what each point brings beside its place, of "colors" and "normals";
    a cloud without colours is mid-grey, one without normals has zeros. columns: what the columns of an array or text
    file are; None goes by their number: xyz, xyz-rgb, xyz-rgb-normals.
    """

    max_points: Annotated[int, Field(ge=1)] = 1024
    normalize: Literal["unit-sphere", "none"] = "unit-sphere"
    features: tuple[Literal["colors", "normals"], ...] = ()
    columns: Columns | None = None

    def __post_init__(self) -> None:
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"features names one twice: {', '.join(self.features)}")


class PointEncoder(Encoder):
    """Reads point clouds; subclasses add ``tokenize`` and ``encode``.

    The inputs of a batch are ``points`` float32 [B, N, 3], ``valid`` bool [B, N] and, as the config asks, ``colors``
    [B, N, 3] in 0..1 and ``normals`` [B, N, 3] of length 1 or 0. Padding is on the right, and zero.

    Args:
        config: the encoder's config.
        files: see `Encoder`.
        preprocess: the preprocessing; may be the config itself.
    """

    modality = "point_cloud"

    def __init__(self, config: Any, files: Path | None = None, *, preprocess: Preprocess) -> None:
        super().__init__(config, files)
        self.preprocess = preprocess
        self.features = tuple(name for name in FEATURES if name in preprocess.features)
        self.channels = 3 * len(self.features)

    def preview(self, raw: Any) -> Image.Image:
        """The cloud as a person sees it, from a little above."""
        return render(thin(decode(raw, columns=self.preprocess.columns, samples=4096), 50_000, 0))

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One cloud to ``points`` float32 [n, 3] and its features; see `decode` for what a cloud may be.

        Without a view, the points that are drawn from a surface or kept of a large cloud are always the same; with a
        view, ``seed`` chooses them.

        Args:
            raw: the cloud.
            view: called with the decoded `Cloud`.
            seed: the view's seed.

        Raises:
            BadSampleError: the cloud cannot be read.
        """
        how = self.preprocess
        draw = 0 if view is None else seed
        cloud = decode(raw, columns=how.columns, samples=how.max_points, seed=draw % 2**63)
        if view is not None:
            cloud = view.sample(cloud, seed)
        cloud = thin(cloud, how.max_points, draw)
        points = unit_sphere(cloud.points) if how.normalize == "unit-sphere" else cloud.points
        item = {"points": torch.from_numpy(points.astype(np.float32))}
        for name in self.features:
            found = getattr(cloud, name)
            item[name] = torch.full_like(item["points"], _ABSENT[name]) if found is None else torch.from_numpy(found)
        return item

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad on the right to the largest cloud, and tell which points are ``valid``."""
        lengths = [len(item["points"]) for item in items]
        inputs = {"valid": torch.arange(max(lengths, default=1)) < torch.tensor(lengths, dtype=torch.long)[:, None]}
        for name in ("points", *self.features):
            padded = torch.zeros(*inputs["valid"].shape, 3)
            for row, item in zip(padded, items, strict=True):
                row[: len(item[name])] = item[name]
            inputs[name] = padded
        return inputs

    def length(self, item: Inputs) -> int:
        """The number of points."""
        return len(item["points"])

    def summary(self, item: Inputs) -> Tensor:
        """32 quantiles of the distance to the centroid, and the spread along the three main axes: float32 [35]."""
        points = item["points"].float()
        centred = points - points.mean(0)
        levels = torch.linspace(0, 1, 32, device=points.device)
        spread = torch.linalg.eigvalsh(centred.T @ centred / len(points)).clamp_min(0).sqrt()
        return torch.cat([torch.quantile(centred.norm(dim=1), levels), spread])

    def point_features(self, inputs: Inputs) -> Tensor:
        """The features that the config names, float32 [B, N, channels], in about -1..1."""
        scaled = {"colors": lambda c: 2 * c - 1, "normals": lambda n: n}
        parts = [scaled[name](inputs[name].float()) for name in self.features]
        return torch.cat([inputs["points"].new_zeros(*inputs["valid"].shape, 0), *parts], dim=2)

    def examples(self, n: int, seed: int) -> list[Any]:
        """Spheres, boxes, tori and lines of 3 to 1.5 ``max_points`` points, as arrays, tensors, dicts and NPY bytes."""
        limit = self.preprocess.max_points
        counts = (min(96, limit), max(3, limit + limit // 2), 7, min(40, limit), min(200, limit))
        return [_FORMS[i % len(_FORMS)](_shape(i, counts[i % len(counts)], seed * 31 + i)) for i in range(n)]

    def oddities(self, seed: int) -> dict[str, Any]:
        """Few, equal, collinear, far, tiny and huge points; wrong numbers, widths, types and files."""
        cloud = _shape(0, 20, seed).points.astype(np.float32)
        ply = _ply(cloud)
        far = cloud.astype(np.float64) + 1e6
        return {
            "one point": cloud[:1],
            "two equal points": cloud[[0, 0]],
            "all points equal": np.full((50, 3), 0.1),
            "collinear": np.arange(30)[:, None] * np.array([[0.1, 0.2, 0.3]]),
            "duplicates": np.concatenate([cloud, cloud, cloud]),
            "far from the origin": far,
            "tiny": cloud * 1e-30,
            "huge": cloud * 1e30,
            "NaN": np.where(np.arange(20)[:, None] == 3, np.nan, cloud),
            "infinity": np.where(np.arange(20)[:, None] == 3, np.inf, cloud),
            "no points": np.zeros((0, 3)),
            "an empty list": [],
            "text": "a cloud of points",
            "strings": np.array([["a", "b", "c"]]),
            "two columns": cloud[:, :2],
            "four columns": np.concatenate([cloud, cloud[:, :1]], axis=1),
            "a single row": cloud[0],
            "three axes": cloud[None],
            "bytes as coordinates": (np.arange(60).reshape(20, 3) * 4).astype(np.uint8),
            "booleans": cloud > 0,
            "complex": cloud + 1j,
            "ragged rows": [[0.0, 1.0, 2.0], [0.0, 1.0]],
            "colours out of range": np.concatenate([cloud, cloud * 300], axis=1),
            "a ply": {"bytes": ply, "path": "cloud.ply"},
            "a truncated ply": {"bytes": ply[:-7], "path": "cloud.ply"},
            "no bytes": {"bytes": b"", "path": "cloud.ply"},
            "a mesh without faces": {"bytes": b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "path": "a.off"},
            "a mesh without area": {"bytes": b"OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "path": "a.off"},
            "an empty mesh": {"bytes": b"OFF\n0 0 0\n", "path": "a.off"},
            "a missing vertex": {"bytes": b"OFF\n2 1 0\n0 0 0\n1 0 0\n3 0 1 2\n", "path": "a.off"},
        }


_ABSENT = {"colors": 0.5, "normals": 0.0}


def thin(cloud: Cloud, count: int, seed: int) -> Cloud:
    """A random choice of ``count`` points, in the order of the cloud; all of them if there are no more."""
    if len(cloud.points) <= count:
        return cloud
    draw = uniform(torch.tensor([seed]), len(cloud.points))[0]
    return cloud.take(draw.argsort(stable=True)[:count].sort().values.numpy())


def unit_sphere(points: np.ndarray) -> np.ndarray:
    """Float64 [N, 3] with the centroid at 0 and the farthest point at distance 1; points that are all equal go to 0."""
    moved = points - points[0]  # first: equal points then are exactly zero, and no rounding is blown up below
    moved = moved - moved.mean(0)
    peak = np.abs(moved).max()
    if peak == 0:
        return moved
    moved = moved / peak  # first: the squares of tiny distances would vanish
    return moved / np.linalg.norm(moved, axis=1).max()


def _shape(kind: int, n: int, seed: int) -> Cloud:
    """A sphere, box, torus or line of ``n`` points."""
    u = uniform(torch.tensor([seed]), 3 * n).double().view(n, 3).numpy()
    if kind % 4 == 0:
        points = 2 * u - 1 + 1e-3
        points = points / np.sqrt((points**2).sum(1, keepdims=True))
    elif kind % 4 == 1:
        points = np.where(np.arange(3) == np.arange(n)[:, None] % 3, np.rint(u), u) * (1 + seed % 3, 2, 3)
    elif kind % 4 == 2:
        points = np.stack([u[:, 0], u[:, 0] * (1 + seed % 5), 0.5 - u[:, 0]], 1)
    else:
        around, along = 2 * math.pi * u[:, 0], 2 * math.pi * u[:, 1]
        radius = 2 + 0.5 * np.cos(along)
        points = np.stack([radius * np.cos(around), 0.5 * np.sin(along), radius * np.sin(around)], 1)
    span = np.abs(points).max(1, keepdims=True)
    return Cloud(points, colors=u.astype(np.float32), normals=(points / span).astype(np.float32))


def _npy(cloud: Cloud) -> bytes:
    out = io.BytesIO()
    np.save(out, np.concatenate([cloud.points, cloud.colors], 1))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return out.getvalue()


def _ply(points: np.ndarray) -> bytes:
    """A binary PLY of float32 vertices."""
    lines = ("ply", "format binary_little_endian 1.0", f"element vertex {len(points)}",
             *(f"property float {axis}" for axis in "xyz"), "end_header\n")  # fmt: skip
    return "\n".join(lines).encode() + points.astype("<f4").tobytes()


_FORMS = (
    lambda c: c.points.astype(np.float32),
    lambda c: {"points": c.points, "colors": c.colors, "normals": c.normals},
    lambda c: torch.from_numpy(c.points),
    _npy,
    lambda c: {"points": (c.points * 50).astype(np.int64), "colors": (c.colors * 255).astype(np.uint8)},
)

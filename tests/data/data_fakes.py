"""Small encoders, views and pictures for the tests of data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from mmrep.data.reader import Reader
from mmrep.data.records import Records
from mmrep.encoder import BadSampleError, Encoder
from mmrep.views.view import View, uniform


def png(seed: int = 0, size: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class TinyImage(Encoder):
    """Reads 8 x 8 pictures; whatever PIL raises comes out as it is."""

    modality = "image"
    most_pixels = 64 * 64

    def __init__(self):
        super().__init__(None)
        self.calls = 0

    def prepare(self, raw, *, view=None, seed=0):
        self.calls += 1
        with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as image:
            if image.width * image.height > self.most_pixels:
                raise BadSampleError("decompression bomb", f"{image.size}")
            pixels = torch.from_numpy(np.array(image.convert("RGB").resize((8, 8)))).permute(2, 0, 1).float()
        return {"pixels": pixels if view is None else view.sample(pixels, seed)}


class TinyText(Encoder):
    """Bytes of a string, padded with zeros."""

    modality = "text"

    def __init__(self):
        super().__init__(None)
        self.calls = 0

    def prepare(self, raw, *, view=None, seed=0):
        self.calls += 1
        text = raw if view is None else view.sample(raw, seed)
        text = text[0] if isinstance(text, list) else text
        if not isinstance(text, str):
            raise BadSampleError("wrong type", f"expected text, got {type(text).__name__}")
        if not text.strip():
            raise BadSampleError("empty text")
        return {"ids": torch.tensor(list(text.encode()))}

    def collate(self, items):
        longest = max(len(item["ids"]) for item in items)
        return {"ids": torch.stack([F.pad(item["ids"], (0, longest - len(item["ids"]))) for item in items])}


class Noise(View):
    """Acts on single samples."""

    def __init__(self):
        super().__init__(None)

    def sample(self, decoded, seed):
        return decoded + uniform(torch.tensor([seed]), 1)


class Choice(View):
    def __init__(self):
        super().__init__(None)

    def sample(self, decoded, seed):
        return decoded[int(uniform(torch.tensor([seed]), 1) * len(decoded))]


class Flip(View):
    """Acts on batches only."""

    def __init__(self):
        super().__init__(None)

    def batch(self, inputs, seeds):
        return {"pixels": inputs["pixels"].flip(-1)}, {}


def make_source(n: int, **columns) -> Records:
    """``n`` samples: every picture there, every third caption missing."""
    return Records.from_lists(
        image=[png(i) for i in range(n)],
        caption=[None if i % 3 == 2 else [f"number {i}", f"№ {i}"] for i in range(n)],
        id=[f"s{i}" for i in range(n)],
        group=[i // 2 for i in range(n)],
        **columns,
    )


def make_reader(**options) -> Reader:
    options = {"views": {"image": [Noise(), Flip()], "caption": [Choice()]}, "seed": 3, "group": True, **options}
    return Reader({"image": TinyImage(), "caption": TinyText()}, **options)


def same(a, b) -> bool:
    """Whether two batches are bitwise equal."""

    def equal(x, y):
        return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)

    return (
        (a.ids, a.labels, a.keys, a.quarantined) == (b.ids, b.labels, b.keys, b.quarantined)
        and torch.equal(a.seeds, b.seeds)
        and (torch.equal(a.group, b.group) if a.group is not None else b.group is None)
        and equal(a.present, b.present)
        and all(a_.keys() == b_.keys() for a_, b_ in ((a.inputs, b.inputs), (a.items, b.items)))
        and all(equal(x, y) for f in a.inputs for x, y in zip(a.inputs[f], b.inputs[f], strict=True))
        and all(equal(x, y) for f in a.items for x, y in zip(a.items[f], b.items[f], strict=True))
    )


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path

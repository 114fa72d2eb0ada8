"""Every modality's plain description: one length for ragged inputs, finite, and told apart by what it describes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmrep.config import component

ENCODERS = {
    "audio-spectrogram": {"width": 32, "depth": 1, "heads": 2},
    "audio-wave": {"width": 32, "depth": 1, "heads": 2},
    "point-patch": {"width": 32, "depth": 1, "heads": 2},
    "series-patch": {"width": 32, "depth": 1, "heads": 2},
    "series-patch any": {"channels": "any", "width": 32, "depth": 1, "heads": 2},
    "graph-gnn": {"width": 32, "depth": 1},
    "graph-gnn molecule": {"input": "molecule", "width": 32, "depth": 1},
    "video-transformer": {"width": 32, "depth": 1, "heads": 2},
    "image-vit": {"width": 32, "depth": 1, "heads": 2},
}


def encoder(name: str):
    return component("encoders", name.split()[0], **ENCODERS[name]).build()


@pytest.mark.parametrize("name", ENCODERS)
def test_it_has_one_length_and_is_finite(name):
    built = encoder(name)
    rows = [built.summary(built.prepare(raw)) for raw in built.examples(6, 0)]
    assert len({tuple(row.shape) for row in rows}) == 1
    assert rows[0].ndim == 1
    assert all(row.dtype == torch.float32 and bool(row.isfinite().all()) for row in rows)
    assert (torch.stack(rows).std(0) > 0).any()


def nearest(name: str, query, *others) -> int:
    built = encoder(name)
    key = built.summary(built.prepare(query))
    return int(torch.stack([(built.summary(built.prepare(o)) - key).norm() for o in others]).argmin())


def tone(hertz: float, seconds: float):
    return np.sin(2 * np.pi * hertz * np.arange(int(16000 * seconds)) / 16000).astype(np.float32), 16000


def test_like_is_nearest_to_like():
    assert nearest("audio-spectrogram", tone(440, 0.5), tone(2000, 0.5), tone(440, 0.8)) == 1
    random = np.random.default_rng(0)
    ball, stick = random.normal(size=(200, 3)), random.normal(size=(200, 3)) * [9, 0.1, 0.1]
    turned = random.normal(size=(300, 3)) * [0.1, 0.1, 9]
    assert nearest("point-patch", stick, ball, turned) == 1  # whatever way it lies
    rising = np.linspace(0, 1, 50)
    assert nearest("series-patch", rising, rising[::-1].copy(), np.linspace(0, 1, 33)) == 1
    assert nearest("graph-gnn molecule", "CCO", "c1ccccc1", "CCCO") == 1
    dark, light = np.zeros((4, 32, 32, 3), np.uint8), np.full((6, 32, 32, 3), 250, np.uint8)
    assert nearest("video-transformer", light, dark, np.full((3, 32, 32, 3), 240, np.uint8)) == 1


def test_a_gap_in_a_series_is_bridged():
    whole = np.linspace(0, 1, 65, dtype=np.float32)
    gap = whole.copy()
    gap[20:30] = np.nan
    built = encoder("series-patch")
    torch.testing.assert_close(*(built.summary(built.prepare(s)) for s in (whole, gap)), atol=1e-5, rtol=0)

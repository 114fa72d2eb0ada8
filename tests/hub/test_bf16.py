"""A bridge's model in bf16 is as near to float32 as the library's own, and equal where both compute the same."""

from __future__ import annotations

import contextlib

import pytest
import torch

import mmrep
from tests.hub.library_calls import KINDS

SAME = {
    "clip", "siglip", "metaclip2", "altclip", "chinese-clip", "siglip2", "align", "xclip", "pe_video", "gpt2", "llama",
    "vit", "dinov2-registers", "clip-vision", "clip-projected", "mae", "hiera", "swin", "convnext", "ast",
    "timesformer", "vivit",
}  # fmt: skip
"""Both make the same operations of one value alone. Others pool in bf16 here and in float32 there, or the reverse."""
ONLY_CAST = {"timesfm"}
"""The library's own network joins float32 to bf16 and fails; it runs under autocast."""
FACTOR = 2
"""Of two distances that are each the sum of as many roundings, in another order."""
TIGHT = {"atol": 2e-5, "rtol": 1e-4}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_bf16_is_the_librarys_in_bf16(kind, tmp_path):
    model, raws, call = KINDS[kind](tmp_path)
    ours = mmrep.load(tmp_path)
    with torch.no_grad():
        wanted = call(model)
        for name, raw in raws.items():  # else what follows would compare two other things
            torch.testing.assert_close(ours.encode(raw, name, convert_to_tensor=True), wanted[name], **TIGHT)
        cast = torch.autocast("cpu", torch.bfloat16) if kind in ONLY_CAST else contextlib.nullcontext()
        with cast:
            theirs = call(model if kind in ONLY_CAST else model.bfloat16())
    ours.bfloat16()
    for name, raw in raws.items():
        found = ours.encode(raw, name, convert_to_tensor=True)
        theirs_off, ours_off = distance(theirs[name], wanted[name]), distance(found, wanted[name])
        assert 1e-4 < theirs_off
        assert ours_off < FACTOR * theirs_off, name
        if kind in SAME:
            alone = ours.encode(raw, name, batch_size=1, convert_to_tensor=True)
            assert torch.equal(alone, theirs[name]), name

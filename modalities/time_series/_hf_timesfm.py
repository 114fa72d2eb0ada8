"""TimesFM (arXiv:2310.10688), versions 1, 2 and 2.5: a decoder of patches, one channel at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrep.tokens import Encoding, Grid, Inputs, Tokens

CLASSES = {"timesfm": "TimesFmModel", "timesfm2_5": "TimesFm2_5Model"}


class TimesFM:
    """The library's model, its parts called one after the other as its ``forward`` does.

    Every channel is a series of its own. What comes before its first observed value is padding, as the library pads in
    front; later gaps are bridged by straight lines, as TimesFM's authors do, and a gap at the end keeps the last value.
    A patch knows its own past alone, so tokens can be dropped: those that are kept keep their places.

    Args:
        model: the library's decoder, without its forecasting heads.
        config: of the model.
        frequency: of versions 1 and 2, how often their steps are: 0 (high, up to days), 1 (weeks, months), 2 (longer).
    """

    largest = 1e9  # its float32 squares what a flat first patch has blown up

    def __init__(self, model: Any, config: Any, frequency: int) -> None:
        self.model, self.patch, self.frequency = model, int(config.patch_length), frequency
        self.newer = config.model_type == "timesfm2_5"
        sizes = 1 if self.newer else config.freq_size
        if frequency >= sizes:
            raise ValueError(f"frequency={frequency}: this model knows {', '.join(map(str, range(sizes)))}")

    def steps(self, longest: int) -> int:
        """Steps of whole patches that hold a series of ``longest``; the library pads to its context, to no effect."""
        return max(1, -(-longest // self.patch)) * self.patch

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``values`` and ``observed`` [B, L, C] to the embeddings of all patches of each channel, [B, C * n, D]."""
        B, L, C = inputs["values"].shape
        observed = inputs["observed"].transpose(1, 2).flatten(0, 1)
        values, missing = bridged(inputs["values"].float().transpose(1, 2).flatten(0, 1), observed)
        embed = self._newer if self.newer else self._older
        embedded = embed(values.view(B * C, -1, self.patch), missing.view(B * C, -1, self.patch))
        valid = ~missing.view(B, C, -1, self.patch).all(-1)
        steps = inputs["valid"].view(B, 1, -1, self.patch)
        times = (inputs["times"].float().view(B, 1, -1, self.patch) * steps).sum(-1) / steps.sum(-1).clamp_min(1)
        channel = torch.arange(C, device=times.device, dtype=times.dtype)[:, None]
        coords = torch.stack([times.expand(valid.shape), channel.expand(valid.shape)], -1).flatten(1, 2)
        grid = Grid(
            coords, valid.flatten(1), torch.zeros_like(valid.flatten(1)),
            tuple(valid.shape[1:]) if bool(valid.all()) else None,
        )  # fmt: skip
        return Tokens(embedded.view(B, C * (L // self.patch), -1), grid)

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        """The library's blocks over the kept patches; each sees those of its channel that are not after it."""
        kept, places = tokens.keep(keep), _places(tokens.grid)
        if keep is not None:
            places = places.gather(1, keep.clamp_min(0))
        values, valid, channel = kept.values, kept.grid.valid, kept.grid.coords[..., 1]
        seen = valid[:, None, :] & (channel[:, :, None] == channel[:, None, :])
        seen = seen & (places[:, None, :] <= places[:, :, None])
        seen = seen | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)  # padding: of nothing, no softmax
        mask = torch.zeros(seen.shape, dtype=values.dtype, device=values.device)
        mask = mask.masked_fill(~seen, torch.finfo(values.dtype).min)[:, None]
        told: dict[str, Any] = {"paddings": None}  # it would zero what the MLP makes of padding, which nobody sees
        if self.newer:
            told = {"position_embeddings": self.model.rotary_emb(values, places), "position_ids": places}
        asked: dict[int, Tensor] = {}
        for number, block in enumerate(self.model.layers, start=1):
            values = block(values, attention_mask=mask, **told)
            asked[number] = values
        return Encoding(Tokens(values, kept.grid), layers=tuple(asked[number] for number in layers))

    def _older(self, patches: Tensor, missing: Tensor) -> Tensor:
        """Versions 1 and 2: scaled by the first patch that has three values, then positions and frequency added."""
        model, padding = self.model, missing.to(patches.dtype)
        scaled, _ = model._forward_transform(patches, padding)
        both = torch.cat([scaled * (1 - padding), padding], -1)
        embedded = model.input_ff_layer(both.to(model.input_ff_layer.input_layer.weight.dtype))
        if model.config.use_positional_embedding:
            table = model.position_emb(embedded.shape[1]).expand(len(embedded), -1, -1)
            embedded = embedded + model._timesfm_shift_padded_seq(padding.amin(-1), table).to(embedded.dtype)
        return embedded + model.freq_emb(torch.full((len(embedded), 1), self.frequency, device=embedded.device))

    def _newer(self, patches: Tensor, missing: Tensor) -> Tensor:
        """Version 2.5: each patch scaled by the mean and deviation of all up to it."""
        model, zeros = self.model, patches.new_zeros(len(patches))
        count, mean, deviation = zeros, zeros, zeros
        history: list[tuple[Tensor, Tensor]] = []
        for i in range(patches.shape[1]):
            count, mean, deviation = model._update_running_stats(count, mean, deviation, patches[:, i], missing[:, i])
            history.append((mean, deviation))
        means, deviations = (torch.stack(parts, 1) for parts in zip(*history, strict=True))
        scaled = model._revin(patches, means, deviations, reverse=False, mask=missing)
        return model.input_ff_layer(torch.cat([scaled, missing.to(scaled.dtype)], -1))


def bridged(values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Straight lines over what is not observed.

    Args:
        values: float [B, L].
        observed: bool [B, L].

    Returns:
        The values, the last observed one behind it, 0 before the first; and bool [B, L], where it is before the first.
    """
    L = values.shape[1]
    at = torch.arange(L, device=values.device).expand_as(observed)
    before = torch.where(observed, at, -1).cummax(1).values
    after = torch.where(observed, at, L).flip(1).cummin(1).values.flip(1)
    missing = before < 0
    last = after >= L
    start = values.gather(1, before.clamp_min(0))
    stop = torch.where(last, start, values.gather(1, after.clamp_max(L - 1)))
    part = (at - before).to(values.dtype) / (after - before).clamp_min(1).to(values.dtype)
    return torch.where(missing, 0.0, start + torch.where(last, 0.0, part) * (stop - start)), missing


def _places(grid: Grid) -> Tensor:
    """How many patches of its channel stand before each: int64 [B, N]; of padding 0."""
    coords, valid = grid.coords, grid.valid
    channels = int(coords[..., 1].max()) + 1 if coords.numel() else 1
    return (valid.unflatten(1, (channels, -1)).long().cumsum(2) - 1).clamp_min(0).flatten(1)

"""wav2vec 2.0, HuBERT and WavLM: networks that read waveforms of any length, as transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.modalities.audio._mel import refuse_masks
from mmrep.tokens import Encoding, Grid, Inputs, Tokens, keep_special

KINDS = ("wav2vec2", "hubert", "wavlm")


class WaveTrunk(nn.Module):
    """One of the three; their parts are called one after the other, as the library's ``forward`` does.

    A clip in a padded batch is what the library makes of it alone. Models with ``feat_extract_norm: group`` (the base
    sizes) normalise each channel over time, which in the library includes the padding and changes the result; here the
    statistics are those of the clip's own frames. Dropped tokens are zero before the convolution that gives positions,
    as padding is, so they leave no trace in their neighbours. LayerDrop and the random masks of pretraining are off.
    """

    supports = frozenset({"tokens", "drop_tokens", "layers"})
    pooled_width = None
    waves = True
    max_seconds = 30.0  # of attention; the architectures have no limit of their own
    epsilon = 1e-7  # of standardising, as in ``Wav2Vec2FeatureExtractor``

    def __init__(self, model: Any, config: Any, extractor: Any) -> None:
        super().__init__()
        if getattr(config, "add_adapter", False):
            raise ValueError(
                f"a {config.model_type} model with add_adapter is not supported: its last layers are a decoder's"
            )
        if hasattr(model, "masked_spec_embed"):
            del model.masked_spec_embed  # of the random masks; it would get no gradient
        self.model, self.config, self.extractor = model, config, extractor
        self.width, self.depth = config.hidden_size, config.num_hidden_layers
        self.rate = extractor.sampling_rate
        self.stride, self.field = 1, 1  # of one frame, in samples
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            self.field += (kernel - 1) * self.stride
            self.stride *= stride
        self.shortest = self.field

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of the transformer."""
        return list(self.model.encoder.layers)

    def prepared(self, wave: Tensor) -> Tensor:
        """A clip, float32 [1, T], as the extractor fills it up: not at all."""
        return wave

    def frames(self, lengths: Tensor, layers: int | None = None) -> Tensor:
        """Frames of clips of ``lengths`` samples, after all convolutions or the first ``layers``."""
        sizes = list(zip(self.config.conv_kernel, self.config.conv_stride, strict=True))
        for kernel, stride in sizes[:layers]:
            lengths = (lengths - kernel) // stride + 1
        return lengths

    def length(self, item: Inputs) -> int:
        """The number of frames."""
        return int(self.frames(torch.tensor(item["wave"].shape[1])))

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``wave`` [B, 1, T] and ``lengths`` [B] to projected frames [B, N, D], without positions."""
        refuse_masks(inputs, self.config.model_type)
        lengths = inputs["lengths"]
        values = inputs["wave"][:, 0]
        if self.extractor.do_normalize:
            values = _standardised(values, lengths, self.epsilon)
        values = self._project(self._convolve(values[:, None].to(next(self.model.parameters()).dtype), lengths).mT)
        at = torch.arange(values.shape[1], device=values.device)
        valid = at < self.frames(lengths)[:, None]
        coords = ((at * self.stride + (self.field - 1) / 2) / self.rate)[:, None].expand(len(values), -1, -1)
        shape = (len(at),) if bool(valid.all()) else None
        return Tokens(values, Grid(coords, valid, torch.zeros_like(valid), shape))

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        """Positions, then the transformer over the kept frames."""
        encoder, stable = self._encoder, self.config.do_stable_layer_norm
        present = tokens.grid.valid
        if keep is not None:
            keep = keep_special(keep, tokens.grid)
            # One place more than there are, where empty slots go.
            N = present.shape[1]
            named = present.new_zeros(len(present), N + 1).scatter_(1, torch.where(keep < 0, N, keep), True)
            present = present & named[:, :N]
        values = tokens.values * present[..., None]
        values = values + encoder.pos_conv_embed(values)
        kept = Tokens(values, tokens.grid).keep(keep)
        values = kept.values if stable else encoder.layer_norm(kept.values)
        values, asked = self._layers(encoder.dropout(values), kept.grid, tokens, keep, layers)
        values = encoder.layer_norm(values) if stable else values
        return Encoding(Tokens(values, kept.grid), layers=asked)

    @property
    def _encoder(self) -> Any:
        """What has ``pos_conv_embed``, ``layer_norm``, ``dropout`` and ``layers``."""
        return self.model.encoder

    def _project(self, values: Tensor) -> Tensor:
        """What the convolutions give, [B, N, C], to [B, N, D]."""
        values = self.model.feature_projection(values)
        return values[0] if isinstance(values, tuple) else values  # HuBERT returns no second value

    def _layers(
        self, values: Tensor, grid: Grid, full: Tokens, keep: Tensor | None, layers: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        wavlm = self.config.model_type == "wavlm"
        visible = grid.valid | ~grid.valid.any(1, keepdim=True)
        mask: Tensor | None = None if bool(visible.all()) else visible
        bias = self._relative_positions(full, keep).flatten(0, 1) if wavlm else None
        if mask is not None and not wavlm:
            mask = additive(mask, values.dtype)
        asked: dict[int, Tensor] = {}
        for number, layer in enumerate(self.model.encoder.layers, start=1):
            if wavlm:
                values, bias = layer(values, attention_mask=mask, position_bias=bias)
            else:
                values = layer(values, attention_mask=mask)
            if number in layers:
                asked[number] = values
        return values, tuple(asked[number] for number in layers)

    def _relative_positions(self, full: Tokens, keep: Tensor | None) -> Tensor:
        """WavLM's biases between the kept frames: [B, heads, K, K]."""
        B, N = full.grid.valid.shape
        bias = self._encoder.layers[0].attention.compute_bias(N, N)
        bias = bias[None].expand(B, -1, -1, -1)
        if keep is not None:
            rows = torch.arange(B, device=keep.device)[:, None, None]
            at = keep.clamp_min(0)
            bias = bias.permute(0, 2, 3, 1)[rows, at[:, :, None], at[:, None, :]].permute(0, 3, 1, 2)
        return bias

    def _convolve(self, values: Tensor, lengths: Tensor) -> Tensor:
        """[B, 1, T] to [B, C, N]; the library's layers, but for the statistics of a GroupNorm."""
        for number, layer in enumerate(self.model.feature_extractor.conv_layers, start=1):
            if isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
                values = layer.conv(values)
                values = layer.activation(group_norm(values, self.frames(lengths, number), layer.layer_norm))
            else:
                values = layer(values)
        return values


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool [B, N], True may be attended to, to what transformers' layers add to attention scores: [B, 1, N, N]."""
    N = visible.shape[1]
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None, None, :].expand(-1, 1, N, -1)


def _standardised(values: Tensor, lengths: Tensor, epsilon: float) -> Tensor:
    """Each clip of [B, T] to mean 0 and variance 1."""
    inside = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    n = lengths[:, None]
    centred = (values - (values * inside).sum(1, keepdim=True) / n) * inside
    return centred / (centred.square().sum(1, keepdim=True) / n + epsilon).sqrt()


def group_norm(values: Tensor, frames: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of [B, C, T] with one group a channel, over the first ``frames`` [B] of each row; in float32."""
    with torch.autocast(values.device.type, enabled=False):
        wide = values.float()
        inside = torch.arange(values.shape[2], device=values.device) < frames[:, None, None]
        n = frames[:, None, None]
        centred = wide - (wide * inside).sum(2, keepdim=True) / n
        variance = (centred * inside).square().sum(2, keepdim=True) / n
        out = centred * (variance + norm.eps).rsqrt() * norm.weight[:, None].float() + norm.bias[:, None].float()
    return out.to(values.dtype)

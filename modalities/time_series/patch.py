"""A patch transformer for time series that keeps amplitude (PatchTST, arXiv:2211.14730; NuTime, arXiv:2310.07402).

In a recipe::

    encoder: {type: series-patch, channels: 3, patch: 16, width: 192, depth: 6, heads: 3}
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.time_series._base import Cut, SeriesEncoder
from mmrep.modalities.time_series._normalization import FILE, Normalization, learn
from mmrep.modalities.time_series._scalars import ScalarEmbedding
from mmrep.modalities.time_series._stats import standardize
from mmrep.modalities.time_series.decode import LARGEST
from mmrep.tokens import Content, Grid, Inputs, Tokens
from mmrep.transformer_encoder import TransformerEncoder

Positive = Annotated[float, Field(gt=0)]
SCALES = tuple(10.0**power for power in range(-4, 5))


@config
class SeriesPatchConfig:
    """Fields of a ``series-patch``.

    channels: C, or "any" (each token then knows its own channel only, not which one it is). max_channels: most channels
    if any are allowed. channel_tokens: one token for each channel of a window, rather than one for all of them; the
    default is to do so if ``channels`` is "any". max_length: most steps of a series. cut: of a longer one keep the
    start or the end, or refuse it. normalize: "none" takes values as they are, which `amplitude` can deal with; "fit"
    uses each channel's mean and spread in the training split; "series" those of each series itself, whose offset and
    scale are then lost. patch: steps of a window, at least 2. stride: steps from one window to the next, at most
    ``patch``; None: ``patch``. amplitude: embed each window's mean and spread beside its shape; without them series
    that differ in offset and scale only are the same. scales: those of `ScalarEmbedding`. scalar_width: its width.
    irregular: embed how the steps of a window are spaced in time. time_scale: time from one step to the next, in the
    unit of the times (seconds for dates); None learns the median from the training split. width: D, even. depth, heads,
    mlp_ratio: size of the transformer. class_token: put a class token in front. registers: number of register tokens
    (arXiv:2309.16588). dropout, drop_path: probabilities; drop_path rises linearly with depth. layer_scale: initial
    value, or None for none.
    """

    channels: Annotated[int, Field(ge=1)] | Literal["any"] = 1
    max_channels: Annotated[int, Field(ge=1)] = 64
    channel_tokens: bool | None = None
    max_length: Annotated[int, Field(ge=1)] = 4096
    cut: Cut = "refuse"
    normalize: Literal["none", "fit", "series"] = "none"
    patch: Annotated[int, Field(ge=2)] = 16
    stride: Annotated[int, Field(ge=1)] | None = None
    amplitude: bool = True
    scales: tuple[Positive, ...] = SCALES
    scalar_width: Annotated[int, Field(ge=2)] = 32
    irregular: bool = False
    time_scale: Positive | None = 1.0
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 192
    depth: Annotated[int, Field(ge=1)] = 6
    heads: Annotated[int, Field(ge=1)] = 3
    mlp_ratio: Positive = 4.0
    class_token: bool = True
    registers: Annotated[int, Field(ge=0)] = 0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    layer_scale: Positive | None = None

    def __post_init__(self) -> None:
        if self.channels == "any" and self.channel_tokens is False:
            raise ValueError("channels='any' needs a token for each channel: leave channel_tokens out, or set it true")
        if self.stride is not None and self.stride > self.patch:
            raise ValueError(f"stride={self.stride} is more than patch={self.patch}: steps between would be lost")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if not self.scales:
            raise ValueError("scales: give at least one; amplitude: false does without them")

    @property
    def learns(self) -> bool:
        """Whether something must be learned before the encoder can be built."""
        return self.normalize == "fit" or self.time_scale is None


class SeriesPatch(TransformerEncoder, SeriesEncoder):
    """Windows of a series to tokens; only the tokens that are kept are computed.

    Of each window and channel the encoder sees the *shape* (the observed values, standardised by their own mean and
    spread), which values are observed, and mean and spread themselves through `ScalarEmbedding`; all that goes through
    one linear map. Windows are cut by steps; the last may be partly padding. A window without a single observed value
    makes no token (it is not valid).

    Tokens are the class token (if any), the registers (if any), then the windows in order; with ``channel_tokens`` all
    windows of the first channel, then of the next. Positions, the sines of Vaswani et al. (arXiv:1706.03762, section
    3.5) at the mean time of the window over ``time_scale`` times stride, are added before any token is dropped.
    Coordinates are that time (in its own unit, from the start of the series), and with ``channel_tokens`` the channel.
    """

    Config = SeriesPatchConfig
    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: SeriesPatchConfig, files: Path | None = None) -> None:
        super().__init__(config, files)
        self.channels, self.max_channels = config.channels, config.max_channels
        self.max_length, self.cut = config.max_length, config.cut
        self.width, self.depth = config.width, config.depth
        self.patch, self.stride = config.patch, config.stride or config.patch
        self.channel_tokens = config.channels == "any" if config.channel_tokens is None else config.channel_tokens
        self.normalization = _normalization(config, files)
        self.time_scale = config.time_scale or self.normalization.interval
        # Not in the state: they belong to the files, and a checkpoint that disagreed with them would win silently.
        self.register_buffer("mean", torch.tensor(self.normalization.mean), persistent=False)
        self.register_buffer("std", torch.tensor(self.normalization.std), persistent=False)
        self.mean: Tensor
        self.std: Tensor

        scalar = config.scalar_width if config.amplitude else 0
        features = 2 * config.patch + 2 * scalar
        if not self.channel_tokens:
            assert isinstance(config.channels, int)
            features *= config.channels
        self.moments = (
            nn.ModuleList(ScalarEmbedding(scalar, config.scales) for _ in range(2)) if config.amplitude else None
        )
        self.spacing = None
        if config.irregular:
            self.spacing = ScalarEmbedding(config.scalar_width, config.scales)
            features += config.patch + config.scalar_width
        self.embedding = nn.Linear(features, config.width)
        self.channel_embedding = None
        if self.channel_tokens and isinstance(config.channels, int):
            self.channel_embedding = nn.Parameter(0.02 * torch.randn(config.channels, 1, config.width))
        self.transformer = Transformer(
            config.width, config.depth, config.heads, config.mlp_ratio, config.dropout, config.drop_path,
            layer_scale=config.layer_scale,
        )  # fmt: skip
        self.norm = nn.LayerNorm(config.width)
        # One parameter for class token and registers: they differ in nothing but their place.
        count = config.class_token + config.registers
        self.special = nn.Parameter(0.02 * torch.randn(1, count, config.width)) if count else None

    @classmethod
    def fit(cls, config: SeriesPatchConfig, samples: Iterable[Any], folder: Path) -> None:
        """Learn channel means and spreads and the usual interval into ``folder/normalization.json``, if asked for."""
        if config.learns:
            learn(samples, config.channels if isinstance(config.channels, int) else None).save(folder)

    def normalize(self, values: Tensor, observed: Tensor) -> Tensor:
        """Values [B, L, C] as ``normalize`` of the config says, float32; never beyond what float32 can hold."""
        if self.config.normalize == "series":
            return standardize(values, observed, dim=1)[0]
        if self.config.normalize == "fit":
            return ((values - self.mean) / self.std).clamp(-LARGEST, LARGEST)
        return values

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``values``, ``observed`` [B, L, C], ``times``, ``valid`` [B, L] to tokens [B, special + windows (* C), D]."""
        observed, valid = inputs["observed"], inputs["valid"]
        values = self.normalize(inputs["values"].float(), observed)
        valid, observed, values, times = (
            self._windows(part) for part in (valid, observed, values, inputs["times"].float())
        )  # [B, n, P], [B, n, C, P], [B, n, C, P], [B, n, P]
        shape, *moments = standardize(values, observed, dim=-1)
        spaced, centre, spread = standardize(times, valid, dim=-1)
        features = [shape, observed.float()]
        if self.moments is not None:
            features += [embed(part[..., 0]) for embed, part in zip(self.moments, moments, strict=True)]
        windows = torch.cat(features, -1)  # [B, n, C, F]
        windows = windows.transpose(1, 2) if self.channel_tokens else windows.flatten(2)
        if self.spacing is not None:
            scaled = spread[..., 0] / self.time_scale
            spacing = torch.cat([spaced, self.spacing(scaled)], -1)
            if self.channel_tokens:
                spacing = spacing[:, None].expand(-1, windows.shape[1], -1, -1)
            windows = torch.cat([windows, spacing], -1)
        values = self.embedding(windows)
        position = sincos(centre[..., 0] / (self.time_scale * self.stride), self.width).to(values.dtype)
        places = (position[:, None] if self.channel_tokens else position).expand_as(values)
        values = values + places
        if self.channel_embedding is not None:
            channel = self.channel_embedding.to(values.dtype)
            values, places = values + channel, places + channel
        return self._with_special(values, places, self._grid(observed.any(-1), valid, centre[..., 0]))

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the values of each window, [B, N, patch] or, of all channels, [B, N, C * patch].

        Their units are those of ``normalize``; where that is "none", the mean and spread of each channel of the series:
        a window keeps its offset and scale, which its shape alone does not have. What was not observed is zero.
        """
        observed, values = inputs["observed"], self.normalize(inputs["values"].float(), inputs["observed"])
        if self.config.normalize == "none":
            values = standardize(values, observed, dim=1)[0]
        cut = [self._windows(part) for part in (values.masked_fill(~observed, 0.0), observed)]  # [B, n, C, P]
        cut = [part.transpose(1, 2).flatten(1, 2) if self.channel_tokens else part.flatten(2) for part in cut]
        front = 0 if self.special is None else self.special.shape[1]
        values, seen = (F.pad(part, (0, 0, front, 0)) for part in cut)
        return Content(values, seen)

    def save_files(self, folder: Path) -> None:
        """Write what was learned, if anything was."""
        if self.config.learns:
            self.normalization.save(folder)

    def no_weight_decay(self) -> set[str]:
        """Class token, registers, channel embedding and the tables of the scalar embeddings."""
        names = {name for name in ("special", "channel_embedding") if getattr(self, name) is not None}
        return names | {name for name, _ in self.named_parameters() if name.startswith(("moments.", "spacing."))}

    def _windows(self, steps: Tensor) -> Tensor:
        """[B, L, …] to [B, n, …, P], padded with zeros on the right."""
        length = steps.shape[1]
        count = 1 + max(0, -(-(length - self.patch) // self.stride))
        padding = (count - 1) * self.stride + self.patch - length
        padded = F.pad(steps, (0, 0) * (steps.ndim - 2) + (0, padding))
        return padded.unfold(1, self.patch, self.stride)

    def _grid(self, seen: Tensor, valid: Tensor, centre: Tensor) -> Grid:
        """The geometry of the windows: ``seen`` bool [B, n, C], ``valid`` bool [B, n, P], ``centre`` [B, n]."""
        B, n, C = seen.shape
        # A later window is needed only where the ones before it have not reached the end: of overlapping windows those
        # that would start inside of a short series do not exist when it is alone.
        fresh = valid[:, :, self.patch - self.stride :].any(-1)
        fresh[:, :1] = True
        exists = (seen & fresh[..., None]).transpose(1, 2) if self.channel_tokens else (seen.any(-1) & fresh)[:, None]
        rows = exists.shape[1]
        time = centre[:, None].expand(B, rows, n)
        channel = torch.arange(rows, device=centre.device, dtype=centre.dtype)[:, None].expand_as(time)
        coords = torch.stack([time, channel] if self.channel_tokens else [time], -1).flatten(1, 2)
        shape = (C, n) if self.channel_tokens else (n,)
        regular = bool(exists.all())
        exists = exists.flatten(1)
        return Grid(coords, exists, torch.zeros_like(exists), shape if regular else None)

    def _with_special(self, values: Tensor, places: Tensor, grid: Grid) -> Tokens:
        values, places = values.flatten(1, -2), places.flatten(1, -2)
        if self.special is None:
            return Tokens(values, grid, places)
        B, count, _ = self.special.expand(values.shape[0], -1, -1).shape
        front = self.special.to(values.dtype).expand(B, -1, -1)
        values, places = (torch.cat([front, part], 1) for part in (values, places))
        coords = torch.cat([grid.coords.new_zeros(B, count, grid.coords.shape[-1]), grid.coords], 1)
        marks = torch.ones(B, count, dtype=torch.bool, device=values.device)
        valid = torch.cat([marks, grid.valid], 1)
        special = torch.cat([marks, grid.special], 1)
        return Tokens(values, Grid(coords, valid, special, grid.shape), places)


def sincos(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of real-valued places [...]: float32 [..., width], all sines first.

    The frequencies are w_i = 10000^(-2i / width), i from 0 (arXiv:1706.03762, section 3.5).
    """
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float32, device=places.device) * 2 / width)
    angle = places.float()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def _normalization(config: SeriesPatchConfig, files: Path | None) -> Normalization:
    if not config.learns:
        return Normalization((0.0,), (1.0,), 1.0)
    if files is None or not (files / FILE).is_file():
        asked = "normalize 'fit'" if config.normalize == "fit" else "time_scale null"
        raise ValueError(
            f"{asked} is learned from training series, and there is no learned {FILE}"
            f"{'' if files is None else f' in {files}'}: train through a recipe, or call "
            "SeriesPatch.fit(config, series, folder) and pass files=folder"
        )
    return Normalization.load(files)

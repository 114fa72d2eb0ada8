"""Hugging Face encoders of time series: PatchTST (arXiv:2211.14730), PatchTSMixer (arXiv:2306.09364), TimesFM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.encoder import BadSampleError
from mmrep.hub.pretrained import load_pretrained, locate, rebuild
from mmrep.modalities.time_series._base import Cut, SeriesEncoder, pad
from mmrep.modalities.time_series._hf_timesfm import CLASSES, TimesFM
from mmrep.modalities.time_series._stats import standardize
from mmrep.tokens import Encoding, Grid, Inputs, Tokens
from mmrep.views import View

_CLASSES = {"patchtst": "PatchTSTModel", "patchtsmixer": "PatchTSMixerModel", **CLASSES}


@config
class HFSeriesConfig:
    """path: a folder, a hub id, or `package:name/folder` for a folder inside an installed Python package.

    revision: hub branch, tag or commit. local_files_only: never touch the network. cut: what to keep of a series that
    is longer than the model's context: its end, as forecasters do, its start, or refuse it. pad: where a shorter one
    gets steps that are not observed. fill: what stands at steps that are not observed; `zero` is what the library's
    users give it, `mean` (of the channel's observed values) keeps gaps from looking like jumps to zero. TimesFM has its
    own way with gaps and is padded on the left. frequency: of TimesFM 1 and 2, see `TimesFM`.
    """

    path: str
    revision: str | None = None
    local_files_only: bool = False
    cut: Cut = "end"
    pad: Literal["left", "right"] = "left"
    fill: Literal["zero", "mean"] = "zero"
    frequency: Annotated[int, Field(ge=0)] = 0


class HFSeries(SeriesEncoder):
    """A Hugging Face PatchTST, PatchTSMixer or TimesFM without its head, the library's own scaling included.

    TimesFM is told of in `mmrep.modalities.time_series._hf_timesfm`: it reads any number of channels, each alone, up to
    its context length, and its tokens (patches, channel by channel) can be dropped.

    Of the others: a checkpoint of any task will do (pretraining, prediction, classification, regression); its
    random masking of the input is left out. Every series is brought to the model's context length; times do not
    reach the model. Tokens are the class token of each channel (if the model has them), then all patches of the
    first channel, of the next, and so on; their values before `encode` are the library's embeddings, positions
    included. A patch without an observed value is not valid, but the model has no mask and attends to it, as in the
    library. Coordinates are the mean time of the patch's valid steps, and the channel. Since attention runs without
    a mask inside each channel, their tokens cannot be dropped.
    """

    Config = HFSeriesConfig
    # What TimesFM can do; an instance narrows it to what its model can.
    supports = frozenset({"tokens", "drop_tokens", "layers"})
    largest = 1e15  # the library squares in float32

    def __init__(self, config: HFSeriesConfig, files: Path | None = None) -> None:
        super().__init__(config, files)
        if files is not None and (files / "config.json").is_file():
            self.model, self.hf_config = rebuild(files, _choose)
        else:
            self.model, self.hf_config, _ = load_pretrained(
                locate(config.path), _choose, noun="time series", revision=config.revision,
                local_files_only=config.local_files_only,
            )  # fmt: skip
        self.max_length, self.cut = self.hf_config.context_length, config.cut
        self.mixer = self.hf_config.model_type == "patchtsmixer"
        self.forecaster: TimesFM | None = None
        if self.hf_config.model_type in CLASSES:
            self._as_forecaster(config)
            return
        if config.frequency:
            raise ValueError(f"frequency={config.frequency}: a {self.hf_config.model_type!r} model has no such thing")
        self.supports = self.supports - {"drop_tokens"}
        self.channels = self.hf_config.num_input_channels
        self.width = self.hf_config.d_model
        self.depth = len(self._blocks)
        self.class_token = not self.mixer and self.hf_config.use_cls_token

    def _as_forecaster(self, config: HFSeriesConfig) -> None:
        if config.pad != "left" or config.fill != "zero":
            raise ValueError(
                f"pad={config.pad!r}, fill={config.fill!r}: TimesFM is padded on the left, and its gaps are bridged by "
                "straight lines; leave both out"
            )
        self.forecaster = TimesFM(self.model, self.hf_config, config.frequency)
        self.channels, self.largest = "any", TimesFM.largest
        self.width, self.depth = self.hf_config.hidden_size, len(self._blocks)

    def layer_modules(self) -> list[nn.Module]:
        """See `Encoder.layer_modules`."""
        return list(self._blocks)

    @property
    def _blocks(self) -> Any:
        if self.forecaster is not None:
            return self.model.layers
        return self.model.encoder.mlp_mixer_encoder.mixers if self.mixer else self.model.encoder.layers

    @property
    def _patchify(self) -> Any:
        return self.model.patching if self.mixer else self.model.patchifier

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """See `SeriesEncoder.prepare`; at least one observed value must lie in a patch of the model.

        Patches are laid from the end, so a context length that they do not fill loses its first steps.
        """
        item = super().prepare(raw, view=view, seed=seed)
        if self.forecaster is None and not self._patchify(self.collate([item])["observed"]).any():
            raise BadSampleError("all missing", "nothing is observed in the steps that the model's patches cover")
        return item

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad to the context length: ``values`` and ``observed`` [B, L, C], ``times`` and ``valid`` [B, L].

        TimesFM's batches are padded to the patches of their longest.
        """
        length = self.max_length
        if self.forecaster is not None:
            length = self.forecaster.steps(max((len(item["times"]) for item in items), default=1))
        return pad(items, length, left=self.config.pad == "left")

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Scale, cut into patches and embed, by the library: tokens [B, (class +) C * patches, D]."""
        if not len(inputs["values"]):
            blank = {key: value.new_ones(1, *value.shape[1:]) for key, value in inputs.items()}
            if self.forecaster is not None:
                return _no_rows(self.tokenize(blank))
            blank["values"] = blank["values"].expand(-1, -1, int(self.channels))
            blank["observed"] = blank["observed"].expand(-1, -1, int(self.channels))
            return _no_rows(self.tokenize(blank))
        if self.forecaster is not None:
            return self.forecaster.tokenize(inputs)
        values, observed = inputs["values"].to(next(self.model.parameters()).dtype), inputs["observed"]
        if self.config.fill == "mean":
            values = torch.where(observed, values, standardize(values, observed, dim=1)[1])
        scaled, _, _ = self.model.scaler(values, observed.to(values.dtype))
        encoder, patches = self.model.encoder, self._patchify(scaled)
        embedded = encoder.patcher(patches) if self.mixer else encoder.embedder(patches)
        if encoder.positional_encoder is not None:
            embedded = encoder.positional_encoder(embedded)
        return Tokens(self._flat(embedded), self._grid(inputs))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Run the library's blocks; see `Encoder.encode`."""
        self.check_request(keep, layers)
        if not len(tokens.values):
            B, N, D = 1, *tokens.values.shape[1:]
            marks = tokens.grid.valid.new_ones(B, N)
            where = Grid(tokens.grid.coords.new_zeros(B, N, 2), marks, ~marks)
            encoding = self.encode(Tokens(tokens.values.new_zeros(B, N, D), where), layers=layers)
            return Encoding(_no_rows(encoding.tokens), layers=tuple(layer[:0] for layer in encoding.layers))
        if self.forecaster is not None:
            return self.forecaster.encode(tokens, keep, layers)
        hidden = self._square(tokens.values)
        asked: dict[int, Tensor] = {}
        for number, block in enumerate(self._blocks, start=1):
            hidden = block(hidden) if self.mixer else block(hidden)[0]
            if number in layers:
                asked[number] = self._flat(hidden)
        return Encoding(Tokens(self._flat(hidden), tokens.grid), layers=tuple(asked[n] for n in layers))

    def save_files(self, folder: Path) -> None:
        """Write the model's own config.json."""
        self.hf_config.save_pretrained(folder)

    def _flat(self, hidden: Tensor) -> Tensor:
        """The library's [B, C, (1 +) n, D] to tokens [B, N, D], class tokens in front."""
        if not self.class_token:
            return hidden.flatten(1, 2)
        return torch.cat([hidden[:, :, 0], hidden[:, :, 1:].flatten(1, 2)], 1)

    def _square(self, values: Tensor) -> Tensor:
        """The inverse of `_flat`."""
        C = int(self.channels)
        if not self.class_token:
            return values.unflatten(1, (C, -1))
        return torch.cat([values[:, :C, None], values[:, C:].unflatten(1, (C, -1))], 2)

    def _grid(self, inputs: Inputs) -> Grid:
        seen = self._patchify(inputs["observed"]).any(-1)  # [B, C, n]
        steps = self._patchify(inputs["valid"][..., None])[:, 0]  # [B, n, P]
        times = self._patchify(inputs["times"].float()[..., None])[:, 0]
        time = (times * steps).sum(-1) / steps.sum(-1).clamp_min(1)
        time = time[:, None].expand(seen.shape)
        channel = torch.arange(seen.shape[1], device=time.device, dtype=time.dtype)[:, None].expand_as(time)
        coords = torch.stack([time, channel], -1).flatten(1, 2)
        shape = tuple(seen.shape[1:]) if bool(seen.all()) else None
        valid = seen.flatten(1)
        special = torch.zeros_like(valid)
        if self.class_token:
            marks = torch.ones(len(valid), seen.shape[1], dtype=torch.bool, device=valid.device)
            valid, special = torch.cat([marks, valid], 1), torch.cat([marks, special], 1)
            coords = torch.cat([coords.new_zeros(*marks.shape, 2), coords], 1)
        return Grid(coords, valid, special, shape)


def _choose(config: Any) -> tuple[Any, Any]:
    """The transformers class to build, and its config."""
    import transformers

    if config.model_type not in _CLASSES:
        raise ValueError(
            f"a {config.model_type!r} checkpoint is no time series encoder that hf-series knows; it knows "
            f"{', '.join(_CLASSES)}"
        )
    return getattr(transformers, _CLASSES[config.model_type]), config


def _no_rows(tokens: Tokens) -> Tokens:
    """Tokens without their rows; every parameter keeps a path to them, along which flow zeros."""
    where = tokens.grid
    return Tokens(tokens.values[:0], Grid(where.coords[:0], where.valid[:0], where.special[:0]))

"""Mean and standard deviation of log-mel values, learned from training samples and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrep.encoder import BadSampleError
from mmrep.modalities.audio._base import AudioEncoder
from mmrep.modalities.audio._mel import LogMel

FILE = "log_mel.json"
MAX_CLIPS = 5000
_SMALLEST = 1e-3  # of a standard deviation: a band that is always at the floor stays 0


def learn(config: Any, reader: AudioEncoder, samples: Iterable[Any], folder: Path) -> None:
    """Measure the log-mel frames of at most 5000 clips, every frame alike; write ``folder/log_mel.json``.

    Clips that cannot be read are left out; the loader quarantines them.

    Raises:
        ValueError: no clip can be read.
    """
    mel = LogMel(config)
    count, total, squares = 0, torch.zeros(config.mels).double(), torch.zeros(config.mels).double()
    clips = 0
    for raw in samples:
        try:
            wave = reader.prepare(raw)["wave"]
        except BadSampleError:
            continue
        frames = mel(wave[None]).double().flatten(0, 2)
        # Sums about a fixed point near the values, so that no digits are lost.
        frames = frames - config.mean
        count, total, squares = count + len(frames), total + frames.sum(0), squares + frames.square().sum(0)
        clips += 1
        if clips >= MAX_CLIPS:
            break
    if not count:
        raise ValueError(f"standardize={config.standardize!r}: none of the training samples is audio that can be read")
    if config.standardize == "global":
        count, total, squares = count * config.mels, total.sum(0, keepdim=True), squares.sum(0, keepdim=True)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(_SMALLEST)
    write_statistics(mean + config.mean, std, folder)


def write_statistics(mean: Tensor, std: Tensor, folder: Path) -> None:
    """Write ``folder/log_mel.json``; float32 values come back as they were."""
    values = {"mean": mean.float().tolist(), "std": std.float().tolist()}
    (folder / FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_statistics(config: Any, files: Path | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 [1] or [mels], as the config says.

    Raises:
        ValueError: they are to be learned, and the file is missing or of another number of bands.
    """
    if config.standardize == "given":
        return torch.tensor([config.mean]), torch.tensor([config.std])
    if files is None or not (files / FILE).is_file():
        raise ValueError(
            f"standardize={config.standardize!r} is learned from training samples, and there is no learned {FILE}"
            f"{'' if files is None else f' in {files}'}: train through a recipe, call AudioSpectrogram.fit(config, "
            "samples, folder) and pass files=folder, or set standardize: given"
        )
    values = json.loads((files / FILE).read_text(encoding="utf-8"))
    expected = 1 if config.standardize == "global" else config.mels
    mean, std = torch.tensor(values["mean"]), torch.tensor(values["std"])
    if mean.shape != (expected,) or std.shape != (expected,):
        raise ValueError(f"{files / FILE} has {len(mean)} means and {len(std)} deviations, expected {expected} of each")
    return mean, std

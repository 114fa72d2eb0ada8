"""Silero VAD: an independent slow twin, and the package's own models where they are installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import component
from mmrep.modalities.audio._signals import signal
from mmrep.modalities.audio.silero import Silero

LENGTHS = [1, 511, 512, 513, 4_000]


def build(**fields) -> Silero:
    torch.manual_seed(0)
    return component("encoders", "silero", **fields).build().eval()


def waves(lengths=LENGTHS) -> list[np.ndarray]:
    kinds = ("noise", "chirp", "tone")
    return [signal(kinds[i % 3], n, i).astype(np.float32) / (1 << 15) for i, n in enumerate(lengths)]


def theirs(encoder: Silero) -> dict[str, Tensor]:
    """The weights by the names of the package's file; the Fourier transform written out again, term by term."""
    at, frequency = np.arange(256), np.arange(129)[:, None]
    hann = np.sin(np.pi * at / 256) ** 2
    turns = np.exp(-2j * np.pi * frequency * at / 256) * hann
    basis = torch.from_numpy(np.concatenate([turns.real, turns.imag])).float()[:, None]
    own = encoder.state_dict()
    names = {f"conv{i + 1}": f"convolutions.{i}" for i in range(4)} | {"final_conv": "speech"}
    state = {f"{name}.{part}": own[f"{here}.{part}"] for name, here in names.items() for part in ("weight", "bias")}
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        state[f"lstm_cell.{part}"] = own[f"recurrent.lstm.{part}_l0"]
    return {key: value.clone() for key, value in {"stft_conv.weight": basis, **state}.items()}


def twin(weights: dict[str, Tensor], wave: np.ndarray) -> tuple[Tensor, Tensor]:
    """States [N, D] and probabilities [N], chunk after chunk, in fp64."""
    w = {key: value.double() for key, value in weights.items()}
    heard = np.concatenate([np.zeros(64), wave, np.zeros(-len(wave) % 512)])
    state = memory = torch.zeros(w["lstm_cell.weight_hh"].shape[1], dtype=torch.float64)
    states, chances = [], []
    for start in range(0, len(heard) - 64, 512):
        chunk = heard[start : start + 576]
        x = torch.from_numpy(np.pad(chunk, (0, 64), mode="reflect"))[None]
        real, imaginary = F.conv1d(x, w["stft_conv.weight"], stride=128).chunk(2)
        x = (real**2 + imaginary**2) ** 0.5
        for number, stride in zip((1, 2, 3, 4), (1, 2, 2, 1), strict=True):
            x = F.conv1d(x, w[f"conv{number}.weight"], w[f"conv{number}.bias"], stride=stride, padding=1).clamp_min(0)
        gates = w["lstm_cell.weight_ih"] @ x[:, 0] + w["lstm_cell.bias_ih"]
        gates = gates + w["lstm_cell.weight_hh"] @ state + w["lstm_cell.bias_hh"]
        let, forget, new, out = gates.chunk(4)
        memory = forget.sigmoid() * memory + let.sigmoid() * new.tanh()
        state = out.sigmoid() * memory.tanh()
        states.append(state)
        chances.append((w["final_conv.weight"][0, :, 0] @ state.clamp_min(0) + w["final_conv.bias"][0]).sigmoid())
    return torch.stack(states), torch.stack(chances)


@torch.no_grad()
def encoded(encoder: Silero, clips: list[np.ndarray]):
    return encoder(encoder.collate([encoder.prepare((clip, 16_000)) for clip in clips]))


@torch.no_grad()
def compare(encoder: Silero, weights: dict[str, Tensor]):
    clips = waves()
    out = encoded(encoder, clips)
    for i, clip in enumerate(clips):
        states, chances = twin(weights, clip)
        n = len(states)
        assert out.tokens.grid.valid[i].sum() == n == -(-len(clip) // 512)
        torch.testing.assert_close(out.tokens.values[i, :n].double(), states, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.extra["speech"][i, :n].double(), chances, rtol=1e-4, atol=1e-5)
        pooled = (chances[:, None] * states).sum(0) / chances.sum()
        torch.testing.assert_close(out.pooled[i].double(), pooled, rtol=1e-4, atol=1e-5)
    assert out.tokens.grid.coords[0, :2, 0].tolist() == pytest.approx([0.016, 0.048])


def test_a_padded_batch_is_the_slow_twin_of_each_clip():
    encoder = build(width=8)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    compare(encoder, theirs(encoder))


def test_a_checkpoint_is_read_and_a_saved_model_needs_it_no_more(tmp_path):
    one = build(width=8)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    save_file(theirs(one), tmp_path / "weights.safetensors")
    other = build(width=8, checkpoint=str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(value, one.state_dict()[key]) for key, value in other.state_dict().items())
    with pytest.raises(ValueError, match="does not fit a network of this config"):
        build(width=10, checkpoint=str(tmp_path / "weights.safetensors"))
    (tmp_path / "saved").mkdir()
    other.save_files(tmp_path / "saved")
    (tmp_path / "weights.safetensors").unlink()
    again = Silero(other.config, files=tmp_path / "saved")
    assert again.state_dict().keys() == other.state_dict().keys()


@pytest.fixture
def data() -> Path:
    spec = find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("silero-vad is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def test_the_packages_weights_are_read(data: Path):
    from safetensors.torch import load_file

    weights = load_file(data / "silero_vad_16k.safetensors")
    compare(build(checkpoint="package:silero_vad/data/silero_vad_16k.safetensors"), weights)


def test_probabilities_are_those_of_the_packages_model(data: Path, tmp_path):
    """Its TorchScript model has other weights than its file of safetensors; they are put in under that one's names."""
    model = torch.jit.load(data / "silero_vad.jit")
    named = {f"encoder.{i}.reparam_conv": f"conv{i + 1}" for i in range(4)}
    named |= {"stft.forward_basis_buffer": "stft_conv.weight", "decoder.rnn": "lstm_cell"}
    named |= {"decoder.decoder.2": "final_conv"}
    state = {}
    for key, value in model._model.state_dict().items():
        for old, new in named.items():
            key = key.replace(old, new)
        state[key] = value.clone().contiguous()
    save_file(state, tmp_path / "weights.safetensors")
    out = encoded(build(checkpoint=str(tmp_path / "weights.safetensors")), waves())
    for i, clip in enumerate(waves()):
        model.reset_states()
        padded = F.pad(torch.from_numpy(clip), (0, -len(clip) % 512))
        with torch.no_grad():
            want = torch.cat([model(chunk[None], 16_000)[0] for chunk in padded.split(512)])
        torch.testing.assert_close(out.extra["speech"][i, : len(want)], want, rtol=1e-4, atol=1e-5)

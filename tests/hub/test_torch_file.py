"""Files of torch become safetensors: tensors alone, by order into another library; what holds more is refused."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from mmrep.hub.torch_file import WeightsFileError, convert, in_order, read_weights


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_tensors_alone_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"b": torch.randn(2, 3), "a": torch.arange(3)}
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "training.ckpt")
    for name in ("plain.pth", "training.ckpt"):
        found = read_weights(tmp_path / name)
        assert list(found) == ["b", "a"]
        assert all(torch.equal(found[key], state[key]) for key in state)
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsFileError, match="could run any program"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsFileError, match="no state dict of tensors, but list"):
        read_weights(tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pth").read_bytes()[:300])
    with pytest.raises(WeightsFileError, match="cannot be read as tensors alone"):
        read_weights(tmp_path / "cut.pt")
    for name, message in [("no.pt", "no file"), ("a.npz", "allowed are"), ("package:nothing_here/a.pt", "pip install")]:
        (tmp_path / "a.npz").touch()
        with pytest.raises(WeightsFileError, match=message):
            read_weights(name)


def test_torchvisions_network_becomes_timms(tmp_path):
    """The same network by two libraries: other names, one order."""
    import timm
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    theirs = mobilenet_v2()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    assert convert(tmp_path / "tv.pth", tmp_path / "out.safetensors", like="timm:mobilenetv2_100") > 262
    model = timm.create_model("mobilenetv2_100").eval()
    model.load_state_dict(load_file(tmp_path / "out.safetensors"))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), theirs.eval()(pixels), atol=1e-5, rtol=1e-4)
    with pytest.raises(FileExistsError, match="choose another name"):
        convert(tmp_path / "tv.pth", tmp_path / "out.safetensors")


def test_another_network_is_refused():
    state = {"x": torch.zeros(2, 3), "y": torch.zeros(4)}
    with pytest.raises(WeightsFileError, match="2 tensors, and the network has 1"):
        in_order(state, {"a": torch.zeros(2, 3)})
    with pytest.raises(WeightsFileError, match="and b, which has its place, is"):
        in_order(state, {"a": torch.zeros(2, 3), "b": torch.zeros(5)})

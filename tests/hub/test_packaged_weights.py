"""Weights inside an installed package, read straight into a timm encoder."""

from __future__ import annotations

import sys

import pytest
import torch

from mmrep.config import component


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "toy_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    sys.modules.pop("toy_weights", None)


def build(path):
    return component("encoders", "timm", model="test_efficientnet", size=32, checkpoint=path).build()


def test_names_of_another_implementation_are_matched_by_order(package):
    import timm

    torch.manual_seed(1)
    whole = timm.create_model("test_efficientnet").state_dict()
    torch.save({f"layer{i}": value for i, value in enumerate(whole.values())}, package / "weights.pth")
    with pytest.raises(ValueError, match="tensors, and the network has"):  # its counters are named as none
        build("package:toy_weights/weights.pth")
    named = {f"layer{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(whole.items())}
    torch.save(named, package / "weights.pth")
    found = build("package:toy_weights/weights.pth").trunk.model.state_dict()
    assert found
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_what_is_not_there_and_what_holds_more_than_tensors_is_refused(package):
    with pytest.raises(ValueError, match="no package 'toy_weight' is installed"):
        build("package:toy_weight/weights.pth")
    with pytest.raises(ValueError, match="there is no file"):
        build("package:toy_weights/other.pth")
    torch.save({"a": print}, package / "weights.pth")
    with pytest.raises(ValueError, match="tensors alone"):
        build("package:toy_weights/weights.pth")

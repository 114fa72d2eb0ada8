"""Code of a checkpoint is run when the caller says so, and never otherwise."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import mmrep
from mmrep.config import component, parse
from mmrep.hub import remote_code
from mmrep.model import Model, ModelConfig
from tests.hub import custom_text

TEXTS = ["w1 w2 w3", "w9"]


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies code to a folder of its cache; of these tests it is another."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        patch.syspath_prepend(place)
        for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)  # another test's, which would be looked into instead
        yield


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the code makes where it runs."""
    monkeypatch.setenv("CUSTOM_TEXT_MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    custom_text.write(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def wanted(folder: Path) -> torch.Tensor:
    """The mean over tokens, by hand: begin, words, end."""
    from safetensors.torch import load_file

    w = load_file(folder / "model.safetensors")
    rows = [[1, 4, 5, 6, 59], [1, 12, 59]]
    return torch.stack([
        torch.tanh(w["table.weight"][row] @ w["layers.0.weight"].T + w["layers.0.bias"]).mean(0) for row in rows
    ])  # fmt: skip


def test_nothing_runs_unless_it_is_asked_for(folder: Path, mark: Path):
    with pytest.raises(ValueError, match=r"own repository .*unasked.*trust_remote_code=True"):
        mmrep.load(folder)
    with pytest.raises(ValueError, match=r"mmrep.load\(…, trust_remote_code=True\)"):
        component("encoders", "hf-text", path=str(folder)).build()
    for modality in ("image", "audio", "video", "series"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            component("encoders", f"hf-{modality}", path=str(folder)).build()
    assert not mark.exists()


def test_asked_for_it_runs(folder: Path, mark: Path):
    model = mmrep.load(folder, trust_remote_code=True)
    assert mark.exists()
    np.testing.assert_allclose(model.encode(TEXTS), wanted(folder), atol=1e-6)
    assert model.config.towers["text"].encoder.config.trust_remote_code
    assert "drop_tokens" not in model.tower("text").encoder.supports
    assert not remote_code.permitted(), "it is over with the call"


def test_a_saved_model_brings_its_code_and_needs_the_word_again(folder: Path, mark: Path, tmp_path: Path):
    model = mmrep.load(folder, trust_remote_code=True)
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "saved")
    mark.unlink()
    with pytest.raises(ValueError, match="A config alone cannot allow that"):
        mmrep.load(tmp_path / "saved")
    with pytest.raises(ValueError, match="A config alone cannot allow that"):
        mmrep.load(tmp_path / "saved", check_fingerprint=False)
    assert not mark.exists()
    again = mmrep.load(tmp_path / "saved", trust_remote_code=True)
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    again.save_pretrained(tmp_path / "twice")
    twice = mmrep.load(tmp_path / "twice", trust_remote_code=True)
    np.testing.assert_array_equal(twice.encode(TEXTS), model.encode(TEXTS))


def test_a_saved_model_whose_config_hides_its_code_is_refused(folder: Path, mark: Path, tmp_path: Path):
    """What says ``false`` runs nothing, whatever lies in its files."""
    mmrep.load(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    mark.unlink()
    path = tmp_path / "saved" / "config.json"
    document = json.loads(path.read_text())
    document["model"]["towers"]["text"]["encoder"]["trust_remote_code"] = False
    path.write_text(json.dumps(document))
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match="trust_remote_code"):
            mmrep.load(tmp_path / "saved", **options)
    assert not mark.exists()


def test_a_config_alone_runs_nothing(folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = {"type": "hf-text", "path": str(folder), "trust_remote_code": True}
    config = parse(ModelConfig, {"dim": 8, "towers": {"text": {"encoder": encoder}}})
    with pytest.raises(ValueError, match="MMREP_TRUST_REMOTE_CODE=1"):
        Model(config)
    for value in ("0", "", "true"):
        monkeypatch.setenv("MMREP_TRUST_REMOTE_CODE", value)
        with pytest.raises(ValueError, match="MMREP_TRUST_REMOTE_CODE=1"):
            Model(config)
    assert not mark.exists()
    monkeypatch.setenv("MMREP_TRUST_REMOTE_CODE", "1")
    Model(config)
    assert mark.exists()


@pytest.mark.parametrize("revision", [None, "main", "0123456"])
def test_code_of_the_hub_needs_a_commit(revision: str | None):
    with (
        remote_code.asked(True),
        pytest.raises(ValueError, match="only run at a commit that you name"),
    ):
        component("encoders", "hf-text", path="org/name", revision=revision, trust_remote_code=True,
                  local_files_only=True).build()  # fmt: skip


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_not_run(place: str, folder: Path, mark: Path):
    document = json.loads((folder / place).read_text())
    document["auto_map"] = {"AutoTokenizer": ["other/place--tokens.Tokens", None]}
    document["auto_map"] |= {"AutoModel": "modeling_custom.CustomModel"} if place == "config.json" else {}
    (folder / place).write_text(json.dumps(document))
    with pytest.raises(ValueError, match="code is in another repository"):
        mmrep.load(folder, trust_remote_code=True)
    assert not mark.exists()


def test_pickles_are_refused_all_the_same(folder: Path, mark: Path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin"):
        mmrep.load(folder, trust_remote_code=True)
    assert not mark.exists()


def test_a_model_that_is_not_of_text_is_refused(folder: Path, mark: Path):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="text alone"):
        mmrep.load(folder, trust_remote_code=True)
    assert not mark.exists()


def test_an_adapter_for_such_a_model_is_refused_and_runs_nothing(folder: Path, mark: Path, tmp_path: Path):
    pytest.importorskip("peft")
    (tmp_path / "adapter").mkdir()
    options = {"peft_type": "LORA", "target_modules": ["0"], "base_model_name_or_path": str(folder)}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(options))
    (tmp_path / "adapter/adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="not run for an adapter"):
        mmrep.load(tmp_path / "adapter", trust_remote_code=True)
    with pytest.raises(ValueError, match="unasked"):
        mmrep.load(tmp_path / "adapter")
    assert not mark.exists()

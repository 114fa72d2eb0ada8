"""Saved models: round trip, card, fingerprint, and every kind of folder that must be refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import mmrep
from mmrep.config import component
from mmrep.hub.folder import ModelFolderError, load
from mmrep.model import Model, ModelConfig, TemperatureConfig, TowerConfig
from tests import toys  # noqa: F401

VALUES = [[1.0], [0.5, -1.0, 2.0]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    tower = TowerConfig(encoder=component("encoders", "toy"), pool=component("pools", "last"))
    return Model(ModelConfig(dim=6, towers={"a": tower}, temperatures={"pair": TemperatureConfig(scale=20, bias=-5)}))


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_round_trip_is_bitwise(model, saved):
    again = mmrep.load(saved)
    assert again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    np.testing.assert_array_equal(again.encode(VALUES), model.eval().encode(VALUES))
    assert not again.training


def test_from_pretrained_is_the_same_as_load(saved):
    np.testing.assert_array_equal(Model.from_pretrained(saved).encode(VALUES), load(saved).encode(VALUES))


def test_the_folder_holds_no_pickle_and_has_card_config_weights_fingerprint(saved):
    assert {p.name for p in saved.iterdir() if p.is_file()} == {
        "README.md", "config.json", "fingerprint.json", "model.safetensors"}  # fmt: skip
    card = (saved / "README.md").read_text()
    assert "library_name: mmrep" in card
    assert "| a | numbers | toy | last |" in card


def test_a_saved_model_can_be_saved_again_over_itself(model, saved):
    with torch.no_grad():
        model.tower("a").projector.map.weight.add_(1.0)
    model.save_pretrained(saved)
    np.testing.assert_array_equal(load(saved).encode(VALUES), model.eval().encode(VALUES))


def test_a_missing_folder_is_named():
    with pytest.raises(ModelFolderError, match=r"there is no folder './nowhere'"):
        load("./nowhere")


def test_a_folder_without_config_is_no_model_and_a_run_is_pointed_to_its_model(saved, tmp_path):
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        load(tmp_path)
    saved.rename(tmp_path / "model")
    with pytest.raises(ModelFolderError, match=r"did you mean its model, '.*model'\?"):
        load(tmp_path)


def test_a_foreign_config_is_refused_with_what_it_is(saved):
    (saved / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ModelFolderError, match=r"a transformers model \(bert\).*hf-text"):
        load(saved)


def test_broken_json_is_refused(saved):
    (saved / "config.json").write_text('{"format": ')
    with pytest.raises(ModelFolderError, match="not valid JSON"):
        load(saved)


def test_a_newer_format_is_refused_with_the_upgrade(saved):
    document = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(ModelFolderError, match=r"format version 99.*pip install -U mmrep"):
        load(saved)


def test_an_unknown_encoder_in_the_config_has_its_path_and_near_match(saved):
    text = (saved / "config.json").read_text().replace('"toy"', '"toi"')
    (saved / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match=r"towers\.a\.encoder\.type: unknown encoder 'toi'.*'toy'"):
        load(saved)


def test_a_pickle_only_folder_is_refused_with_the_reason(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFolderError, match=r"pytorch_model\.bin, which are pickles"):
        load(saved)


@pytest.mark.parametrize("keep", [0, 4, 0.5, -1])
def test_truncated_weights_are_refused(saved, keep):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep if keep >= 0 else len(data) - 1])
    with pytest.raises(ModelFolderError, match="damaged or was cut short"):
        load(saved)


def test_weights_of_another_shape_are_refused_by_name(saved):
    text = re.sub(r'"dim": 6', '"dim": 7', (saved / "config.json").read_text())
    (saved / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match=r"wrong shape: towers\.a\.projector\.map\.weight"):
        load(saved)


def test_changed_weights_fail_the_fingerprint_unless_accepted(saved):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    weights["towers.a.encoder.embed.weight"] *= 1.5
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"tower a \(off by .*does not give the embeddings"):
        load(saved)
    assert load(saved, check_fingerprint=False).dim == 6


def test_another_pool_in_the_config_fails_the_fingerprint(saved):
    text = (saved / "config.json").read_text().replace('"last"', '"mean"')
    (saved / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match="fingerprint"):
        load(saved)


def test_a_missing_or_broken_fingerprint_is_refused(saved):
    (saved / "fingerprint.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="cannot be compared"):
        load(saved)
    (saved / "fingerprint.json").unlink()
    with pytest.raises(ModelFolderError, match=r"has no fingerprint\.json"):
        load(saved)


def test_it_loads_in_another_process_to_the_same_embeddings(model, saved, tmp_path):
    expected = model.eval().encode(VALUES)
    code = f"""
        import numpy as np, mmrep
        from tests import toys
        np.save({str(tmp_path / "out.npy")!r}, mmrep.load({str(saved)!r}).encode({VALUES!r}))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-5, atol=1e-6)


def test_push_to_hub_uploads_the_folder_through_the_real_client(model, monkeypatch):
    from huggingface_hub import HfApi

    seen = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kw: type("R", (), {"repo_id": repo_id})())
    monkeypatch.setattr(
        HfApi, "upload_folder",
        lambda self, *, folder_path, repo_id, **kw: seen.update(
            repo=repo_id, files=sorted(p.name for p in __import__("pathlib").Path(folder_path).iterdir())),
    )  # fmt: skip
    model.push_to_hub("someone/toy")
    assert seen["repo"] == "someone/toy"
    assert {"config.json", "model.safetensors", "fingerprint.json", "README.md"} <= set(seen["files"])

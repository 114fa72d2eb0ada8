"""Loading from a hub that is served on loopback, by the client's real code path, and every way to fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mmrep
from tests.hub import custom_text
from tests.hub.layouts import open_clip_folder, timm_folder
from tests.hub.loopback import COMMIT, Hub, Repo
from tests.hub.loopback_driver import TEXTS, picture
from tests.hub.peft_folders import adapter
from tests.modalities.text import tiny_hf

ROOT = Path(__file__).parents[2]
SCENARIOS = {
    "plain": {"name": "org/plain"},
    "scheme": {"name": "hf:org/plain", "revision": COMMIT},
    "ours": {"name": "org/ours"},
    "no revision": {"name": "org/plain", "revision": "v9"},
    "no repository": {"name": "hf:org/none"},
    "no token": {"name": "org/private"},
    "adapter without a token": {"name": "org/adapter_open", "base": "org/private"},
    "token": {"name": "org/private", "token": "hf_right"},
    "gated": {"name": "org/gated"},
    "in trouble": {"name": "org/trouble"},
    "down": {"name": "org/down"},
    "cut": {"name": "org/cut"},
    "slow": {"name": "org/slow"},
    "forged": {"name": "org/forged"},
    "no weights": {"name": "org/pickle"},
    "no config": {"name": "org/bare"},
    "timm without a token": {"name": "org/timm"},
    "timm": {"name": "org/timm", "revision": "main", "token": "hf_right", "raw": "picture"},
    "timm by its scheme": {"name": "timm:org/timm_open", "raw": "picture"},
    "open_clip": {"name": "org/open_clip", "revision": COMMIT, "token": "hf_right", "raw": "picture"},
    "open_clip without options": {"name": "org/open_clip_open", "raw": "picture"},
    "open_clip by its scheme": {"name": "open_clip:hf-hub:org/open_clip", "token": "hf_right", "raw": "picture"},
    "open_clip of no such revision": {"name": "open_clip:hf-hub:org/open_clip@v9", "token": "hf_right"},
    "open_clip of another layout": {"name": "open_clip:hf-hub:org/plain"},
    "timm of pickles": {"name": "timm:org/pickle"},
    "adapter": {"name": "hf:org/adapter", "token": "hf_right"},
    "adapter by its own scheme": {"name": "peft:org/adapter_open", "revision": "main"},
    "adapter with another base": {"name": "org/adapter_lost", "base": "org/plain"},
    "adapter of none": {"name": "org/adapter_lost"},
    "adapter of a gated base": {"name": "org/adapter_gated"},
    "adapter of no such revision": {"name": "org/adapter_old"},
    "adapter of pickles": {"name": "org/adapter_pickle"},
    "code": {"name": "org/code"},
    "code asked for": {"name": "org/code", "trust_remote_code": True},
    "code of another repository": {"name": "org/foreign", "trust_remote_code": True},
}


def run(hub: Hub, jobs: list[dict], folder: Path, **environment: str) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.hub.loopback_driver", str(folder / "jobs.json"), str(folder / "out.json")]
    outside = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env={**outside, **settings, **environment}, timeout=300)
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    model, tokenizer = tiny_hf.make("bert")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(bert, tmp_path_factory):
    """Every scenario once, and what the hub saw of it."""
    folder = tmp_path_factory.mktemp("hub")
    mmrep.load(bert).save_pretrained(folder / "ours")
    weights, size = "model.safetensors", (bert / "model.safetensors").stat().st_size
    for name in ("pickle", "bare"):
        (folder / name).mkdir()
    (folder / "pickle" / "config.json").write_text((bert / "config.json").read_text())
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "bare" / weights).write_bytes((bert / weights).read_bytes())
    timm_folder(folder / "timm")
    open_clip_folder(folder / "open_clip")
    custom_text.write(folder / "code")
    custom_text.write(folder / "foreign", repository="other/place--")
    adapter(bert, folder / "adapter", target_modules=["query", "dense"], use_dora=True)
    bases = {"adapter": "org/private", "adapter_open": "org/plain", "adapter_lost": "org/none",
             "adapter_gated": "org/gated", "adapter_old": "org/plain", "adapter_pickle": "org/plain"}  # fmt: skip
    for name, base in bases.items():
        copied = shutil.copytree(folder / "adapter", folder / "hub" / name)
        said = json.loads((copied / "adapter_config.json").read_text())
        said |= {"base_model_name_or_path": base, "revision": {"adapter_old": "v9", "adapter": COMMIT}.get(name)}
        (copied / "adapter_config.json").write_text(json.dumps(said))
    (folder / "hub" / "adapter_pickle" / "adapter_model.safetensors").rename(
        folder / "hub" / "adapter_pickle" / "adapter_model.bin"
    )
    repos = {
        **{f"org/{name}": Repo(folder / "hub" / name) for name in bases},
        "org/plain": Repo(bert), "org/ours": Repo(folder / "ours"), "org/private": Repo(bert, token="hf_right"),
        "org/gated": Repo(bert, gated=True), "org/trouble": Repo(bert, fail={weights: 1}),
        "org/down": Repo(bert, fail={weights: 99}), "org/cut": Repo(bert, cut={weights: size // 2}),
        "org/slow": Repo(bert, slow=0.05), "org/forged": Repo(bert, forged={weights: b"x" * size}),
        "org/pickle": Repo(folder / "pickle"), "org/bare": Repo(folder / "bare"),
        "org/timm_open": Repo(folder / "timm"), "org/open_clip_open": Repo(folder / "open_clip"),
        "org/timm": Repo(folder / "timm", token="hf_right"), "org/code": Repo(folder / "code"),
        "org/open_clip": Repo(folder / "open_clip", token="hf_right"), "org/foreign": Repo(folder / "foreign"),
        "org/adapter": Repo(folder / "hub" / "adapter", token="hf_right"),
    }  # fmt: skip
    with Hub(repos) as hub:
        found = run(hub, [dict(job) for job in SCENARIOS.values()], folder)
        seen = dict(hub.log)
        offline = [{"name": "org/plain"}, {"name": "org/other"}, {"name": "org/adapter_open"}]
        away = run(hub, offline, folder, HF_HUB_OFFLINE="1")
        assert dict(hub.log) == seen, "nothing is asked when offline"
    places = {name: folder / name for name in ("timm", "open_clip", "code", "adapter")}
    last = {"offline": away[0], "never seen": away[1], "adapter offline": away[2]}
    return {**dict(zip(SCENARIOS, found, strict=True)), **last}, seen, places


GOOD = ("plain", "scheme", "ours", "token", "in trouble", "cut", "slow", "offline")


@pytest.mark.parametrize("name", GOOD)
def test_what_arrives_is_the_model(world, bert, name):
    found = world[0][name]
    assert "error" not in found, found
    wanted = mmrep.load(bert).encode(TEXTS)
    np.testing.assert_allclose(found["vectors"], wanted, atol=1e-6)
    np.testing.assert_allclose(found["again"], wanted, atol=1e-6)


def test_the_config_names_the_repository_and_the_commit_but_no_folder(world):
    encoder = world[0]["plain"]["config"]["towers"]["text"]["encoder"]
    assert encoder["path"] == "org/plain"
    assert encoder["revision"] == COMMIT


@pytest.mark.parametrize(("name", "message"), [
    ("no revision", "has no revision 'v9': give a branch, tag or commit"),
    ("no repository", "the hub shows no such repository: check the name; if it is private, give token="),
    ("no token", "if it is private, give token="),
    ("gated", "is gated: accept its conditions"),
    ("down", "could not be downloaded: Server error '500"),
    ("forged", "was damaged on its way"),
    ("no weights", "has no safetensors weights, only pytorch_model.bin"),
    ("no config", "is no saved model"),
    ("never seen", "is not in the local cache"),
    ("timm without a token", "if it is private, give token="),
    ("open_clip of no such revision", "has no revision 'v9'"),
    ("open_clip of another layout", "it is not in the layout of open_clip"),
    ("timm of pickles", "has no safetensors weights, only pytorch_model.bin"),
    ("adapter without a token", "an adapter for 'org/private', which cannot be loaded: there is no folder"),
    ("adapter of none", "an adapter for 'org/none', which cannot be loaded: there is no folder 'org/none',"),
    ("adapter of none", "Another copy of that model, a folder say, is named with base="),
    ("adapter of a gated base", "which cannot be loaded: 'org/gated' is gated: accept its conditions"),
    ("adapter of no such revision", "for 'org/plain' at revision 'v9', which cannot be loaded: 'org/plain' has no rev"),
    ("adapter of pickles", "has no adapter_model.safetensors, only adapter_model.bin: reading a pickle can run any"),
    ("code", "mmrep.load(…, trust_remote_code=True)"),
    ("code of another repository", "its code is in another repository (other/place--configuration_custom.CustomConfig"),
])  # fmt: skip
def test_what_fails_says_what_to_do(world, name, message):
    assert message in world[0][name].get("error", "nothing failed")


def test_faults_were_really_met(world):
    found, seen, _ = world
    assert seen["GET", "model.safetensors", 500] == 1 + 3  # one and success; three attempts and none
    assert not any(name.endswith(".bin") for _, name, _ in seen), "pickles are not downloaded"
    assert found["slow"]["seconds"] > 0.3


@pytest.mark.parametrize(("name", "folder"), [
    ("timm", "timm"), ("timm by its scheme", "timm_open"), ("open_clip", "open_clip"),
    ("open_clip by its scheme", "open_clip"), ("open_clip without options", "open_clip_open"),
])  # fmt: skip
def test_repositories_of_other_layouts_come_by_our_own_download(world, name, folder):
    found = world[0][name]
    assert "error" not in found, found
    wanted = mmrep.load(world[2][folder.removesuffix("_open")]).encode([picture()], "image")
    np.testing.assert_allclose(found["vectors"], wanted, atol=1e-5)
    np.testing.assert_allclose(found["again"], wanted, atol=1e-5)
    for tower in found["config"]["towers"].values():
        assert tower["encoder"]["model"] == f"hf-hub:org/{folder}@{COMMIT}"
    if folder.endswith("_open"):
        np.testing.assert_allclose(found["afresh"], wanted, atol=1e-5)


@pytest.mark.parametrize(("name", "base"), [
    ("adapter", "org/private"), ("adapter by its own scheme", "org/plain"), ("adapter with another base", "org/plain"),
    ("adapter offline", "org/plain"),
])  # fmt: skip
def test_an_adapter_and_its_base_come_from_two_repositories(world, bert, name, base):
    found = world[0][name]
    assert "error" not in found, found
    wanted = mmrep.load(world[2]["adapter"]).encode(TEXTS)
    assert np.abs(wanted - mmrep.load(bert).encode(TEXTS)).max() > 1e-3
    np.testing.assert_allclose(found["vectors"], wanted, atol=1e-6)
    np.testing.assert_allclose(found["again"], wanted, atol=1e-6)
    encoder = found["config"]["towers"]["text"]["encoder"]
    assert (encoder["path"], encoder["revision"]) == (base, COMMIT)


def test_code_of_a_repository_is_run_when_asked_for_and_its_commit_is_recorded(world):
    found = world[0]["code asked for"]
    assert "error" not in found, found
    wanted = mmrep.load(world[2]["code"], trust_remote_code=True).encode(TEXTS)
    np.testing.assert_allclose(found["vectors"], wanted, atol=1e-6)
    np.testing.assert_allclose(found["again"], wanted, atol=1e-6)
    encoder = found["config"]["towers"]["text"]["encoder"]
    assert (encoder["path"], encoder["revision"], encoder["trust_remote_code"]) == ("org/code", COMMIT, True)

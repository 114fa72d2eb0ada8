"""A whole run on a tiny world: it learns, it resumes, it quarantines, it refuses, it is found again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import mmrep
from mmrep.config import ConfigError
from mmrep.data.limited import Limited
from mmrep.data.quarantine import TooManyBadSamples
from mmrep.recipe import read_recipe
from mmrep.run import Run, open_run
from tests.world import make_world, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    run = Run(read_recipe(str(write_recipe(folder))), folder / "run")
    return run, run.train(command="mmrep train recipe.yaml")


def figures(results, name, who, direction=None):
    return next(r for r in results[name]["rows"] if r["who"] == who and r.get("direction") == direction)


def test_it_learns_far_above_chance_and_above_the_untrained_model(trained):
    _, results = trained
    for direction in ("caption→image", "image→caption"):
        model, before, chance = (
            figures(results, "retrieval", w, direction)["R@1"] for w in ("model", "untrained", "chance")
        )
        assert chance == pytest.approx(1 / 16)
        assert model > 5 * chance
        assert model > before


def test_every_kind_of_evaluation_reports_the_model_beside_its_reference(trained):
    _, results = trained
    assert figures(results, "zero-shot", "chance")["top1"] == pytest.approx(0.25)
    assert figures(results, "knn", "model")["accuracy"] > figures(results, "knn", "majority class")["accuracy"]
    assert figures(results, "probe", "model")["accuracy"] > figures(results, "probe", "majority class")["accuracy"]
    assert json.loads((trained[0].folder / "evaluation.json").read_text()) == json.loads(json.dumps(results))


def test_the_run_folder_opens_to_the_same_model_and_figures(trained):
    run, results = trained
    again = open_run(run.folder)
    assert again.recipe == run.recipe
    assert json.loads(json.dumps(again.evaluate(["retrieval"]))) == {
        "retrieval": json.loads(json.dumps(results))["retrieval"]
    }


def test_the_saved_model_embeds_like_the_trained_one(trained):
    run, _ = trained
    model = mmrep.load(run.folder / "model")
    a = model.encode({"image": [run.folder.parent / "red-disc-1.png"], "text": ["a red disc", "a blue bar"]})
    assert model.similarity(a["image"], a["text"]).argmax().item() == 0
    card = (run.folder / "model" / "README.md").read_text()
    assert "mmrep train recipe.yaml" in card
    assert "caption→image" in card


def test_metrics_are_written_and_the_loss_goes_down(trained):
    lines = [json.loads(line) for line in (trained[0].folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 61, 5))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert {"lr", "grad_norm", "scale/default", "contrastive/loss", "epoch"} <= set(lines[0])


def test_the_untrained_model_is_the_same_every_time(trained):
    a, b = trained[0].untrained(), open_run(trained[0].folder).untrained()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_folder_that_holds_a_run_is_not_overwritten_nor_mixed(trained, tmp_path):
    run, _ = trained
    with pytest.raises(ConfigError, match="holds a run already: add --resume"):
        Run(run.recipe, run.folder).train()
    other = read_recipe(str(run.folder), ["optim.lr=0.1"])
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.005 there, 0\.1 here"):
        Run(other, run.folder).train(resume=True)
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        Run(run.recipe, tmp_path).train()


def test_resuming_a_run_gives_the_weights_and_metrics_of_a_straight_one(trained, tmp_path, monkeypatch):
    run, _ = trained
    folder = tmp_path / "run"
    first = Run(run.recipe, folder)
    stop_at(monkeypatch, 33)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    monkeypatch.undo()
    Run(run.recipe, folder).train(resume=True)
    a, b = (mmrep.load(f / "model").state_dict() for f in (run.folder, folder))
    assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    timing = ("seconds", "samples_per_second")
    kept = [
        [{k: v for k, v in json.loads(line).items() if k not in timing} for line in text.splitlines()]
        for text in ((f / "metrics.jsonl").read_text() for f in (run.folder, folder))
    ]
    assert kept[0] == kept[1]


def stop_at(monkeypatch, step):
    from mmrep.objectives.root import Root

    seen = []
    original = Root.after_optimizer_step

    def stop(self):
        original(self)
        seen.append(1)
        if len(seen) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Root, "after_optimizer_step", stop)


def test_broken_samples_are_skipped_counted_and_written(tmp_path):
    folder = make_world(tmp_path, broken=3)
    path = write_recipe(folder)
    Run(read_recipe(str(path), ["train.steps=6", "data.max_bad=0.2", "evaluations={}"]), folder / "run").train()
    lines = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {"broken-0", "broken-1", "broken-2"}
    assert {line["field"] for line in lines} == {"image"}


def test_too_many_broken_samples_stop_the_run_with_their_causes(tmp_path):
    folder = make_world(tmp_path, broken=10)
    path = write_recipe(folder)
    with pytest.raises(TooManyBadSamples, match="10"):
        Run(read_recipe(str(path), ["train.steps=50", "data.max_bad=0.05"]), folder / "run").train()


def test_a_missing_column_is_named_before_anything_is_trained(tmp_path):
    folder = make_world(tmp_path)
    changes = [
        "data.fields={image: image, captoin: text}",
        "objectives[0].pairs[0].between=[image, captoin]",
        "evaluations={}",
    ]
    recipe = read_recipe(str(write_recipe(folder)), changes)
    with pytest.raises(ConfigError, match=r"captoin.*did you mean 'caption'"):
        Run(recipe, folder / "run").train()


def test_a_frozen_tower_with_a_caption_view_trains_from_its_memo(tmp_path):
    folder = make_world(tmp_path)
    path = write_recipe(folder)
    overrides = [
        "train.steps=4",
        "model.towers.text.frozen=true",
        "data.views={caption: [text-choice]}",
        "data.cache=true",
    ]
    results = Run(read_recipe(str(path), overrides), folder / "run").train()
    assert np.isfinite(figures(results, "retrieval", "model", "caption→image")["R@5"])


def test_raw_baselines_equal_a_plain_loop_and_lookup_needs_every_group_in_training(trained):
    run, _ = trained
    from mmrep.evaluate.baselines import lookup, nearest_input

    test = run.encoded("test")
    pixels = [run.model.tower("image").encoder.prepare(s.fields["image"])["pixels"].flatten().float() / 255
              for s in test.samples]  # fmt: skip
    train = list(run.train_source.stream())
    seen = [
        run.model.tower("image").encoder.prepare(s.fields["image"])["pixels"].flatten().float() / 255 for s in train
    ]
    items, queries = lookup(run.untrained(), run.train_source, test, ("image", "image"))
    for i in range(len(test)):
        own = seen[next(j for j, s in enumerate(train) if s.group == test.samples[i].group)]
        expected = torch.stack([-((own - x) ** 2).sum() / 2 for x in pixels])
        torch.testing.assert_close(torch.from_numpy(items @ queries[i]), expected, rtol=1e-4, atol=1e-3)
    assert lookup(run.untrained(), Limited(run.train_source, 5), test, ("image", "image")) is None

    items, queries = nearest_input(
        run.untrained(), run.train_source, test, near=("image", "image"), described=("caption", "text")
    )
    described = run.untrained().eval().tower("text")
    for i in range(len(test)):
        nearest = train[int(torch.stack([((pixels[i] - y) ** 2).sum() for y in seen]).argmin())]
        item = described.encoder.collate([described.encoder.prepare(nearest.fields["caption"])])
        vector = torch.nn.functional.normalize(described.features(item), dim=1)[0].detach()
        torch.testing.assert_close(torch.from_numpy(items[i]), vector, rtol=1e-4, atol=1e-5)
    assert queries.shape == items.shape


def test_micro_batches_train_the_same_model(tmp_path):
    """Several steps of SGD, four parts a batch: the loss, the temperature and every weight, as computed at once."""
    folder = make_world(tmp_path / "world")
    sgd = {"optimizer": "sgd", "lr": 0.1}
    train = {"steps": 4, "batch_size": 16, "precision": "fp32", "workers": 0, "log_every": 1, "save_every": None}
    states, logs = [], []
    for name, micro in (("whole", None), ("parts", 4)):
        recipe = read_recipe(str(write_recipe(folder, train={**train, "micro_batch": micro}, optim=sgd)))
        run = Run(recipe, tmp_path / name)
        run.train()
        states.append(run.model.state_dict())
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    moved = Run(read_recipe(str(folder / "recipe.yaml"))).untrained().state_dict()
    assert any(not torch.allclose(states[0][key], value, rtol=1e-3) for key, value in moved.items())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_an_evaluation_that_fails_does_not_lose_the_model(tmp_path, monkeypatch):
    folder = make_world(tmp_path)
    run = Run(read_recipe(str(write_recipe(folder, train={"steps": 2, "batch_size": 16}))), folder / "run")
    monkeypatch.setattr(Run, "evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    monkeypatch.undo()
    assert open_run(folder / "run").evaluate(["retrieval"])


def test_a_run_without_a_model_is_not_evaluated_as_if_it_had_one(tmp_path):
    folder = make_world(tmp_path)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(write_recipe(folder).read_text())
    with pytest.raises(ConfigError, match=r"(?s)no trained model yet.*--resume"):
        open_run(folder / "run")


def test_probes_stand_beside_the_untrained_model_and_may_use_few_labels(trained):
    run, _ = trained
    few = {"type": "linear-probe", "data": "test", "field": "image", "baselines": ["untrained"]}
    recipe = read_recipe(str(run.folder), [f"evaluations={{few: {few | {'per_class': 2}}, all: {few}}}"])
    results = Run(recipe, run.folder).evaluate()
    rows = {(name, row["who"]): row for name, result in results.items() for row in result["rows"]}
    assert {who for _, who in rows} == {"model", "untrained", "majority class"}
    assert rows["all", "untrained"] != rows["all", "model"]
    assert rows["few", "model"] != rows["all", "model"]

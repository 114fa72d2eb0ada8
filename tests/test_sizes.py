"""What is said of a run's size before it begins."""

from __future__ import annotations

from mmrep.describe import describe
from mmrep.recipe import read_recipe
from mmrep.run import Run
from tests.world import make_world, recipe


def made(folder):
    data = recipe(make_world(folder))
    data["model"]["towers"]["text"]["adapter"] = {"type": "lora"}
    data["model"]["towers"]["image"]["frozen"] = 1
    group = {"match": "model.towers.text.*", "lr": 2, "begin": 0.3}
    data["optim"] = {**data["optim"], "layer_decay": 0.5, "groups": [group]}
    data["train"] = {**data["train"], "steps": 4}
    return read_recipe({**data, "evaluations": {}})


def test_parameters_adapters_and_learning_rates_are_said_before_the_first_step(tmp_path):
    recipe, said = made(tmp_path / "world"), []
    Run(recipe, tmp_path / "run").train(tell=lambda text: said.append((text, (tmp_path / "run/checkpoints").exists())))
    ((text, begun),) = said
    assert not begun
    per_layer = 8 * (32 + 96) + 8 * (32 + 32) + 2 * 8 * (32 + 128)
    lines = dict(line.split(": ", 1) for line in text.splitlines())
    assert lines["tower text"].endswith(
        f"{per_layer + 512:,} trained (encoder {per_layer:,}, projector 512); adapter lora: {per_layer:,}"
    )
    assert lines["tower image"] == "5,520 parameters, 3,936 trained (encoder 3,680, projector 256)"
    assert lines["all towers"].endswith(f"{per_layer + 512 + 3936:,} trained")
    assert lines["learning rate 0.01 (x 2), from 30 % of the run"] == "512 parameters, weight decay 0.01 on 512"
    assert lines["learning rate 0.005, from 30 % of the run"].startswith(f"{per_layer:,} parameters")  # half of twice
    assert lines["learning rate 0.0025 (x 0.5)"] == "3,680 parameters, weight decay 0.01 on 3,584"
    assert lines["learning rate 0.005"] == "257 parameters, weight decay 0.01 on 256"  # projector and temperature
    assert describe(Run(recipe)).endswith(text)

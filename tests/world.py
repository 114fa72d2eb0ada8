"""A tiny image-text world on disk: coloured shapes on grey, with their names; a recipe that learns it in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (40, 60, 230), "yellow": (230, 220, 40)}
SHAPES = ("disc", "square", "bar", "frame")


def draw(colour: str, shape: str, shift: int = 0) -> Image.Image:
    picture = Image.new("RGB", (24, 24), (128, 128, 128))
    pen, box = ImageDraw.Draw(picture), (5 + shift, 5, 18 + shift, 18)
    fill = COLOURS[colour]
    if shape == "disc":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "bar":
        pen.rectangle((box[0], 10, box[2], 13), fill=fill)
    else:
        pen.rectangle(box, outline=fill, width=2)
    return picture


def make_world(folder: Path, *, broken: int = 0) -> Path:
    """Write pictures and ``data.jsonl`` (train: shifts 0 and 2; test: shift 1); returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for colour in COLOURS:
        for shape in SHAPES:
            for shift in (0, 1, 2):
                name = f"{colour}-{shape}-{shift}.png"
                draw(colour, shape, shift).save(folder / name)
                split = "test" if shift == 1 else "train"
                row = {
                    "image": name,
                    "caption": f"a {colour} {shape}",
                    "label": shape,
                    "group": f"{colour}-{shape}",
                    "id": name,
                }
                lines[split].append(row)
    for i in range(broken):
        (folder / f"broken-{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
        lines["train"].append(
            {"image": f"broken-{i}.png", "caption": "broken", "label": "disc", "group": f"b{i}", "id": f"broken-{i}"}
        )
    for split, rows in lines.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """The recipe of the tiny world, as plain data."""
    source = {"type": "table", "paths": ["image"], "label": "label", "group": "group", "id": "id"}
    cnn, transformer = {"type": "image-cnn"}, {"type": "text-transformer", "tokenizer": "bytes"}
    templates = {"templates": ["a red {}"]}
    data: dict[str, Any] = {
        "about": "Coloured shapes.",
        "data": {
            "train": {**source, "files": str(folder / "train.jsonl")},
            "fields": {"image": "image", "caption": "text"},
            "evaluation": {"test": {**source, "files": str(folder / "test.jsonl")}},
        },
        "model": {
            "dim": 16,
            "towers": {
                "image": {"encoder": {**cnn, "size": 16, "widths": [8, 16], "depths": [1, 1], "norm": "group"}},
                "text": {"encoder": {**transformer, "width": 32, "depth": 1, "heads": 2, "max_length": 24}},
            },
        },
        "objectives": [{"type": "contrastive", "pairs": [{"between": ["image", "caption"]}]}],
        "train": {"steps": 60, "batch_size": 16, "precision": "fp32", "workers": 0, "log_every": 5, "save_every": 20},
        "optim": {"lr": 5e-3, "weight_decay": 0.01},
        "evaluations": {
            "retrieval": {"type": "retrieval", "data": "test", "between": ["caption", "image"]},
            "zero-shot": {"type": "zero-shot", "data": "test", "field": "image", "text": "caption", **templates},
            "knn": {"type": "knn", "data": "test", "field": "image", "k": 3},
            "probe": {"type": "linear-probe", "data": "test", "field": "image"},
        },
    }  # fmt: skip
    return {**data, **changes}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """`recipe` as a YAML file in ``folder``."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **changes), sort_keys=False))
    return path

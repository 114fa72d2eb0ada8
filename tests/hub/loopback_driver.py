"""What test_loopback runs in a process of its own: huggingface_hub reads the hub's address when it is imported."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TEXTS = ["w1 w2 w3", "w9 w4"]


def picture() -> Image.Image:
    """Noise, always the same."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8))


def attempt(name: str, raw: str = "text", **options: Any) -> dict[str, Any]:
    """What became of loading: embeddings and config, or the message."""
    import mmrep
    from mmrep.config import dump, parse
    from mmrep.model import Model, ModelConfig

    begin = time.monotonic()
    raws: Any
    raws, tower = (TEXTS, "text") if raw == "text" else ([picture()], "image")
    try:
        model = mmrep.load(name, **options)
    except ValueError as error:
        return {"error": str(error), "seconds": time.monotonic() - begin}
    asked: dict[str, Any] = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = mmrep.load(folder, **asked).encode(raws, tower)
    found = {"vectors": _listed(model.encode(raws, tower)), "again": _listed(again), "config": dump(model.config)}
    if raw == "picture" and "token" not in options:
        # As a recipe that names what this one is recorded as, at its commit.
        made = Model(parse(ModelConfig, found["config"])).eval()
        found["afresh"] = _listed(made.encode(raws, tower))
    return found | {"seconds": time.monotonic() - begin}


def _listed(vectors: Any) -> list[list[float]]:
    return np.asarray(vectors).tolist()


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([attempt(job.pop("name"), **job) for job in jobs]))

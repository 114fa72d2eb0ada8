"""What test_loopback runs in a process of its own: huggingface_hub reads the hub's address when it is imported."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEXTS = ["w1 w2 w3", "w9 w4"]


def attempt(name: str, **options: Any) -> dict[str, Any]:
    """What became of loading: embeddings and config, or the message."""
    import mmrep
    from mmrep.config import dump
    from mmrep.hub.fetch import ModelFolderError

    begin = time.monotonic()
    try:
        model = mmrep.load(name, **options)
    except ModelFolderError as error:
        return {"error": str(error), "seconds": time.monotonic() - begin}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = mmrep.load(folder).encode(TEXTS).tolist()
    found = {"vectors": model.encode(TEXTS).tolist(), "again": again, "config": dump(model.config)}
    return found | {"seconds": time.monotonic() - begin}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([attempt(job.pop("name"), **job) for job in jobs]))

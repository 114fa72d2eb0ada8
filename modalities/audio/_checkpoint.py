"""An encoder of ours whose network somebody trained and published under other names of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from mmrep.hub.torch_file import WeightsFileError, read_weights
from mmrep.modalities.audio._base import AudioEncoder

_FILE = "checkpoint.json"


class Checkpointed(AudioEncoder):
    """An encoder whose config has a ``checkpoint``: a file of weights to begin with, or None.

    A subclass has `own_name` and calls `begin` when its network is built. A saved model holds the weights itself, so it
    only notes where they came from, and needs that file no more.
    """

    def own_name(self, key: str) -> str | None:
        """What a tensor of the file is called here; None where there is no use for it."""
        raise NotImplementedError

    def begin(self, files: Path | None) -> None:
        """Read the checkpoint, unless this is a saved model.

        Raises:
            ValueError: the file cannot be read, or is of another network.
        """
        path = self.config.checkpoint
        if path is None or (files is not None and (files / _FILE).is_file()):
            return
        state = {self.own_name(key): value for key, value in read_weights(path).items()}
        try:
            self.load_state_dict({key: value for key, value in state.items() if key is not None})
        except RuntimeError as error:
            raise WeightsFileError(f"checkpoint {path!r} does not fit a network of this config: {error}") from error

    def save_files(self, folder: Path) -> None:
        """Note where the weights came from, if from a file."""
        if self.config.checkpoint is not None:
            document = json.dumps({"begun_with": self.config.checkpoint}, indent=1)
            (folder / _FILE).write_text(document + "\n", encoding="utf-8")

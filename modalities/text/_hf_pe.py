"""The text part of Perception Encoder's audio, video and audio-video models (PE-AV), as transformers has it."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

Space = Literal["audio", "video", "audio_video"]
SPACES: dict[str, tuple[Space, ...]] = {
    "pe_audio": ("audio",),
    "pe_video": ("video",),
    "pe_audio_video": ("audio", "video", "audio_video"),
}
"""By model type, what texts can be compared with: each has a head of its own."""
CLASS = "PETextPart"


@cache
def pe_class(space: Space) -> Any:
    """A class that takes the text model and one of its heads out of a whole checkpoint."""
    from transformers import AutoModel
    from transformers.models.pe_audio.modeling_pe_audio import PeAudioPreTrainedModel
    from transformers.models.pe_audio_video.modeling_pe_audio_video import PeAudioVideoPreTrainedModel
    from transformers.models.pe_video.modeling_pe_video import PeVideoPreTrainedModel

    # The class of the library names the place of its parts in an audio-video checkpoint.
    base: Any = {
        "audio": PeAudioPreTrainedModel, "video": PeVideoPreTrainedModel, "audio_video": PeAudioVideoPreTrainedModel
    }[space]  # fmt: skip

    class PETextPart(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.text_model = AutoModel.from_config(config.text_config)
            setattr(self, f"text_{space}_head", pe_head(config.text_config.hidden_size))
            self.post_init()

    return PETextPart


def pe_head(width: int) -> Any:
    """A fresh head."""
    from transformers.models.pe_audio_video.modeling_pe_audio_video import PeAudioVideoContrastiveHead

    return PeAudioVideoContrastiveHead(width, width)


def space_of(kind: str, asked: str | None, source: str) -> Space:
    """Which head is meant.

    Raises:
        ValueError: none is named where there are several, or one that is not there.
    """
    spaces = SPACES[kind]
    if asked is None and len(spaces) == 1:
        return spaces[0]
    if asked not in spaces:
        raise ValueError(f"path {source!r} is a {kind} model: space={asked!r}; its texts have {', '.join(spaces)}")
    return asked  # pyright: ignore[reportReturnType]


def pe_config(config: Any, space: Space) -> Any:
    """The config that the class of ``space`` is built from."""
    if config.model_type != "pe_audio_video" or space == "audio_video":
        return config
    return config.audio_config if space == "audio" else config.video_config

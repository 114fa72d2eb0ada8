"""Prompts and instructions in front of a text (E5, arXiv:2212.03533; INSTRUCTOR, arXiv:2212.09741)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from mmrep.config import config
from mmrep.encoder import BadSampleError
from mmrep.registry import UnknownNameError, near
from mmrep.tokens import Grid

_KEYS = ("text", "prompt", "instruction")


@config
class Prompts:
    r"""What is put in front of a text; the fields that all text encoders share.

    prompt: in front of every text that brings none of its own and for which none is chosen. prompts: by name, such as
    ``{query: "query: ", document: "passage: "}``, for ``Model.encode(…, prompt_name="query")``. instruction: how the
    ``instruction`` of a value becomes its prompt, such as ``"Instruct: {instruction}\nQuery: "``. prompt_pooled: false
    leaves the prompt's tokens out of every pool, once they have been attended to.
    """

    prompt: str = ""
    prompts: dict[str, str] = field(default_factory=dict[str, str])
    instruction: str = "{instruction}"
    prompt_pooled: bool = True

    def __post_init__(self) -> None:
        if "{instruction}" not in self.instruction:
            raise ValueError(f"instruction: {self.instruction!r} has no {{instruction}} in it to put the words at")


def split(raw: Any, how: Prompts) -> tuple[Any, str]:
    """The text of a raw value, still to be decoded, and the prompt that goes in front of it.

    Args:
        raw: a text, or a dict with ``text`` and, if it likes, ``prompt`` (as it is) or ``instruction``.
        how: the encoder's prompts.

    Raises:
        BadSampleError: a dict of other keys, or with a prompt that is no string.
    """
    if not isinstance(raw, Mapping):
        return raw, how.prompt
    given = cast("Mapping[str, Any]", raw)
    unknown = [key for key in given if key not in _KEYS]
    if unknown or "text" not in given:
        raise BadSampleError("not text", f"a dict with {list(given)[:5]}; allowed: text, and prompt or instruction")
    told = {key: given[key] for key in ("prompt", "instruction") if given.get(key) is not None}
    if len(told) > 1 or not all(isinstance(value, str) for value in told.values()):
        raise BadSampleError("not text", f"prompt or instruction must be one string, got {told!r}"[:120])
    if "instruction" in told:
        return given["text"], how.instruction.replace("{instruction}", told["instruction"])
    return given["text"], told.get("prompt", how.prompt)


def choose(raw: Any, how: Prompts, name: str | Sequence[str] | None, prompt: str | None) -> Any:
    """A raw value with the prompt that a caller chose; one that it brings itself stays.

    Args:
        raw: the value.
        how: the encoder's prompts.
        name: one of ``how.prompts``; of several names the first that is there, or no prompt if none is.
        prompt: the prompt itself; goes before a name.

    Raises:
        UnknownNameError: there is no prompt of that single name.
    """
    if prompt is None and isinstance(name, str):
        if name not in how.prompts:
            known = ", ".join(how.prompts) or "none; set `prompts` in the encoder's config, or give prompt="
            raise UnknownNameError(f"unknown prompt {name!r}{near(name, how.prompts) or '.'} Known: {known}")
        prompt = how.prompts[name]
    elif prompt is None:
        prompt = next((how.prompts[one] for one in name or () if one in how.prompts), None)
    if prompt is None or (isinstance(raw, Mapping) and any(raw.get(key) is not None for key in _KEYS[1:])):
        return raw
    return {"text": raw["text"] if isinstance(raw, Mapping) and "text" in raw else raw, "prompt": prompt}


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike: the prompt's, of a prompt alone and in front of a text.

    Not the prompt's own length: its last tokens may join with the text's first.
    """
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class PromptGrid(Grid):
    """A grid that knows which tokens are the prompt's: bool [B, N]."""

    prompt: Tensor | None = None

    def select(self, index: Tensor) -> Grid:
        """See `Grid.select`."""
        assert self.prompt is not None
        chosen = super().select(index)
        prompt = self.prompt.gather(1, index.clamp_min(0)) & (index >= 0)
        return PromptGrid(chosen.coords, chosen.valid, chosen.special, chosen.shape, chosen.edges, prompt)

    def repeat(self, times: int) -> Grid:
        """See `Grid.repeat`."""
        assert self.prompt is not None
        grid = super().repeat(times)
        prompt = self.prompt.repeat_interleave(times, 0)
        return PromptGrid(grid.coords, grid.valid, grid.special, grid.shape, grid.edges, prompt)


def without_prompt(grid: Grid) -> Grid:
    """The grid of an encoding: tokens of a prompt that is not to be pooled are no longer valid."""
    if not isinstance(grid, PromptGrid) or grid.prompt is None:
        return grid
    return Grid(grid.coords, grid.valid & ~grid.prompt, grid.special, grid.shape, grid.edges)

"""What can be chosen of a masked objective, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field as default
from typing import Annotated, Literal

from pydantic import Field

from mmrep.config import Component, Of, component, config
from mmrep.encoder import unsupported
from mmrep.objectives.objective import ObjectiveConfig
from mmrep.predictors.predictor import Predictor
from mmrep.registry import near
from mmrep.targets.target import Target
from mmrep.tower import Tower


@config
class MaskedConfig(ObjectiveConfig):
    """field: whose tokens are predicted. view: which of its views. target_view: the view that the target reads, if
    another; its tokens sit in the same places (the clean reading of a corrupted one).

    input: what the encoder reads: only the ``visible`` tokens (MAE, I-JEPA), or all of them with a learned
    ``mask-token`` in the hidden places (SimMIM, BEiT, HuBERT), or ``unplaced``: the visible ones, and the hidden ones
    with a learned vector instead of their position (DropPos).

    mask, predictor, target: see their registries; mask: null hides nothing and predicts everything, of a reading that a
    view has corrupted. tied: masks of objectives with one word here are drawn from the same numbers: fields of one
    geometry hide the same places, or, with the mask ``complement``, each what the other shows. everywhere: what is
    visible is predicted too. loss: by name; None = the target's first. negatives, temperature: of the loss
    ``contrastive`` alone; the distractors of a token are other hidden tokens of its sample, so many drawn with
    replacement, or ``all``.

    condition: the view's parameters that the predictor is told, and how many figures each has: ``{crop: 4}``.
    alternatives: so many other samples' conditions are tried instead, to report as ``mrr`` how high the right one
    ranks; each costs a pass of the predictor. given: other fields of the sample, all of whose tokens the predictor gets
    too. own: it also gets the visible tokens of the field itself; false = everything hidden is predicted from the given
    fields alone.

    agreement: of several masks of a sample (``masks: 2``), the weight of ``1 - cos`` between what is predicted of a
    token under two that both hide it (Point-CMAE, arXiv:2407.05862).
    """

    field: str
    view: int = 0
    target_view: int | None = None
    input: Literal["visible", "mask-token", "unplaced"] = "visible"
    mask: Annotated[Component | None, Of("masks")] = default(default_factory=lambda: component("masks", "random"))
    tied: str | None = None
    everywhere: bool = False
    predictor: Annotated[Component, Of("predictors")] = default(
        default_factory=lambda: component("predictors", "transformer")
    )
    target: Annotated[Component, Of("targets")] = default(default_factory=lambda: component("targets", "content"))
    loss: str | None = None
    condition: dict[str, Annotated[int, Field(ge=1)]] = default(default_factory=dict[str, int])
    alternatives: Annotated[int, Field(ge=0)] = 0
    given: tuple[str, ...] = ()
    own: bool = True
    agreement: Annotated[float, Field(ge=0)] = 0.0
    negatives: Annotated[int, Field(ge=1)] | Literal["all"] = 100
    temperature: Annotated[float, Field(gt=0)] = 0.1
    weight: Annotated[float, Field(ge=0)] = 1.0


def check_tower(config: MaskedConfig, tower: Tower, name: str) -> None:
    """Refuse, with a ValueError, a tower called ``name`` that cannot be trained like this."""
    if tower.frozen:
        raise ValueError(f"tower {name!r} is frozen: nothing would learn from its hidden tokens")
    needs = {"visible": ["drop_tokens"], "mask-token": ["mask_token"], "unplaced": ["drop_tokens", "mask_token"]}
    for need in needs[config.input] if config.mask is not None else ["tokens"]:
        if need not in tower.encoder.supports:
            raise ValueError(unsupported(tower.encoder, need))


def problems_of(config: MaskedConfig, target: Target, predictor: Predictor) -> Iterator[str]:
    """What of the config does not go together, in words."""
    allowed = target.losses
    if config.loss is not None and config.loss not in allowed:
        hint = near(config.loss, allowed)
        yield f"loss: {config.loss!r} does not fit this target{hint} One of: {', '.join(allowed)}"
    if config.field in config.given:
        yield f"given: {config.field!r} is what is predicted"
    if not config.own and (not config.given or config.input != "visible"):
        yield "own: false predicts from `given` fields alone: name some, and use input: visible"
    if config.agreement and (config.mask is None or getattr(config.mask.config, "masks", 1) < 2):
        yield "agreement: compares what several masks of a sample hide; use mask: {type: random, masks: 2}"
    if config.input == "unplaced" and not predictor.needs_hidden:
        yield (
            f"predictor: {config.predictor.type!r} is told where tokens are, which input: unplaced hides; use "
            "predictor: {type: tokenwise}"
        )
    if predictor.blanks and (config.everywhere or config.mask is None):
        yield (
            f"predictor: {config.predictor.type!r} knows nothing of the places that it predicts, and these are "
            "all; use transformer or tokenwise"
        )
    if config.alternatives and not config.condition:
        yield "alternatives: there is no condition to try others of; name the view's parameters in `condition`"
    if config.mask is None and config.input != "visible":
        yield f"input: {config.input} hides nothing without a mask"
    if config.everywhere and config.input == "unplaced":
        yield "everywhere: the visible tokens have their positions, which would be predicted; leave it out"
    if predictor.needs_hidden and config.input == "visible" and config.mask is not None:
        yield (
            f"predictor: {config.predictor.type!r} reads the encoder's output at the hidden places, which input: "
            "visible does not compute; use input: mask-token, or predictor: {type: transformer}"
        )

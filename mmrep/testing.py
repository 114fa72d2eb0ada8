"""Contract checks for components, shipped so that third parties run them too.

In a test::

    from mmrep.testing import check_encoder, check_loss, check_mask, check_tuple_loss
    check_encoder(MyEncoder)

Each check is one function that raises AssertionError with what it saw. A check that a component cannot pass is listed
in ``expected_failures`` with the reason; it must then fail, so that a silent fix is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mmrep._encoder_checks import ENCODER_CHECKS
from mmrep._encoder_subject import Subject
from mmrep._loss_checks import LOSS_CHECKS, LossSubject
from mmrep._mask_checks import MASK_CHECKS, MaskSubject
from mmrep._tuple_loss_checks import TUPLE_LOSS_CHECKS, TupleLossSubject
from mmrep.encoder import Encoder
from mmrep.masks.masker import Masker
from mmrep.registry import near

__all__ = [
    "ENCODER_CHECKS",
    "LOSS_CHECKS",
    "MASK_CHECKS",
    "TUPLE_LOSS_CHECKS",
    "check_encoder",
    "check_loss",
    "check_mask",
    "check_tuple_loss",
]


def check_encoder(
    encoder: Encoder | type[Encoder],
    *,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Run every check of the encoder contract on the encoder's own examples.

    Args:
        encoder: an instance (it is copied), or a class whose config has defaults for every field.
        expected_failures: check name to the reason why it cannot pass; it must fail.
        only: names of the checks to run, of `ENCODER_CHECKS`. None: all.
        **options: of `mmrep._encoder_subject.Subject`: ``n`` examples, ``seed``, ``tolerance`` and ``no_gradient``
            (patterns of names of parameters that get no gradient, with the reason).

    Raises:
        AssertionError: naming encoder, check and what was seen; all failing checks at once.
        ValueError: a check name that does not exist.
    """
    subject = Subject(encoder, **options)
    _run(subject.name, subject, ENCODER_CHECKS, only, expected_failures)


def check_loss(
    loss: nn.Module,
    *,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Run every check of the paired-loss contract: ``forward(a, b, *, scale, bias, negatives, group, valid, world)``.

    Args:
        loss: the built loss; it is given a bias if its ``needs_bias`` is true.
        expected_failures: check name to the reason why it cannot pass; it must fail.
        only: names of the checks to run, of `LOSS_CHECKS`. None: all.
        **options: of `mmrep._loss_checks.LossSubject`: number of pairs ``n``, ``dim``, ``seed``, ``scale``, ``bias``.

    Raises:
        AssertionError: naming loss, check and what was seen; all failing checks at once.
        ValueError: a check name that does not exist.
    """
    subject = LossSubject(loss, **options)
    _run(subject.name, subject, LOSS_CHECKS, only, expected_failures)


def check_tuple_loss(
    loss: nn.Module,
    *,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Run every check of the tuple-loss contract, `mmrep.losses._tuples.TupleLoss`.

    Args:
        loss: the built loss; a copy is checked, in eval mode.
        expected_failures: check name to the reason why it cannot pass; it must fail.
        only: names of the checks to run, of `TUPLE_LOSS_CHECKS`. None: all.
        **options: of `mmrep._tuple_loss_checks.TupleLossSubject`: number of tuples ``n`` and of ``fields``, ``dim``,
            ``seed``, ``scale``.

    Raises:
        AssertionError: naming loss, check and what was seen; all failing checks at once.
        ValueError: a check name that does not exist.
    """
    subject = TupleLossSubject(loss, **options)
    _run(subject.name, subject, TUPLE_LOSS_CHECKS, only, expected_failures)


def check_mask(
    masker: Masker,
    *,
    expected_failures: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Run every check of the masker contract, `mmrep.masks.masker.Masker`, on grids of each kind that it takes.

    Args:
        masker: the built masker.
        expected_failures: check name to the reason why it cannot pass; it must fail.
        only: names of the checks to run, of `MASK_CHECKS`. None: all.
        **options: of `mmrep._mask_checks.MaskSubject`: number of ``draws``, ``seed``.

    Raises:
        AssertionError: naming masker, check and what was seen; all failing checks at once.
        ValueError: a check name that does not exist.
    """
    subject = MaskSubject(masker, **options)
    _run(subject.name, subject, MASK_CHECKS, only, expected_failures)


def _run(
    name: str,
    subject: Any,
    checks: Mapping[str, Callable[[Any], None]],
    only: Sequence[str] | None,
    expected_failures: Mapping[str, str] | None,
) -> None:
    expected = dict(expected_failures or {})
    for asked in (*(only or ()), *expected):
        if asked not in checks:
            raise ValueError(f"there is no check {asked!r}{near(asked, checks)}; checks: {', '.join(checks)}")
    problems: list[str] = []
    for check in only or checks:
        try:
            with torch.random.fork_rng(devices=[]):
                checks[check](subject)
        except Exception as error:  # whatever a third party's code raises is a failed check, reported with the others
            if check not in expected:
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                problems.append(f"{name}, check {check!r}: {kind}{error}")
        else:
            if check in expected:
                problems.append(
                    f"{name}, check {check!r}: passes, though expected to fail ({expected[check]}); unlist it"
                )
    if problems:
        raise AssertionError("\n".join(problems))

"""Options that name something in the data, checked against what it holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mmrep.registry import near


def wrong_names(key: str, values: Sequence[str], known: Collection[str], noun: str) -> list[str]:
    """What is wrong with a list of names, one line each: names that do not exist or occur twice.

    Args:
        key: the config key that holds them.
        values: the names that the user gives.
        known: the names that exist.
        noun: what they name, for the message.
    """
    shown = ", ".join(sorted(known))
    unknown = [value for value in dict.fromkeys(values) if value not in known]
    problems = [f"{key}: no {noun} {value!r}{near(value, known) or '.'} There are: {shown}" for value in unknown]
    twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    return problems + [f"{key}: {value!r} is named twice" for value in twice]

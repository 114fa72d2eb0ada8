"""What a molecule is used as, where its name says so: international names of drugs and pesticides end in a stem.

The stems are those of the World Health Organization's list of nonproprietary names (INN) and of the ISO common names of
pesticides; a class is kept here if a dozen names of `molecules` have it. A stem is given for what a molecule does, and
what does the same is mostly built alike: it is a label of structure that neither size nor composition tells.
"""

from __future__ import annotations

import re

ENDS = {
    "amphetamine": ("amphetamine", "amfetamine"),
    "anti-inflammatory": ("profen", "fenac"),
    "barbiturate": ("barbital", "barbitone"),
    "benzodiazepine": ("azepam", "azolam"),
    "beta blocker": ("olol",),
    "butyrophenone": ("peridol", "perone"),
    "carbamate": ("carb",),
    "conazole": ("conazole",),
    "local anaesthetic": ("caine",),
    "nitroimidazole": ("nidazole",),
    "opioid": ("orphan", "orphanol", "orphine", "morphone", "codone"),
    "organophosphate": ("fos", "phos", "thion"),
    "penicillin": ("cillin",),
    "phenothiazine": ("promazine", "perazine", "phenazine"),
    "pyrethroid": ("thrin",),
    "steroid": ("sterone", "cortisone", "cortolone", "methasone", "nisolone", "nisone"),
    "thiazide": ("thiazide",),
    "urea": ("uron",),
}
"""Ends of names, by class."""

STARTS = {
    "cephalosporin": ("cef", "cephac", "cephalor", "cephalot", "cephap", "cephr"),
    "sulfonamide": ("sulfa",),
}
"""Beginnings of names, by class."""

OTHERS = {
    "apomorphine", "bacimethrin", "cephalotaxine", "chlorfenac", "chromocarb", "ditiocarb", "magnolol", "nithiazide",
    "octaethylporphine", "phenazine", "porphine", "stanozolol", "sulfallate", "sulfamide", "thiadiazinthion",
    "xantocillin",
}  # fmt: skip
"""Names that have a stem by chance."""


def use_of(name: str | None) -> str | None:
    """The class that the stem of a common name says; None if it has none, or is not one word of letters."""
    if name is None or not re.fullmatch("[a-z]+", name) or name in OTHERS or name.endswith("piperazine"):
        return None
    ends = [known for known, stems in ENDS.items() if name.endswith(stems)]
    return next(iter([*ends, *(known for known, stems in STARTS.items() if name.startswith(stems))]), None)

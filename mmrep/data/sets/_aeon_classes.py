"""What the classes of the UCR and UEA archive mean, in a few words of English.

The archives describe their classes in prose and number them. Where a number is not beside its meaning in the file that
the package carries, the order of that prose is taken; those are marked "order". ItalyPowerDemand could be checked: the
evening peak of class 1 comes two hours earlier, as it does in winter. UnitTest is a part of the archive's Chinatown,
whose classes are recalled and not in the file.
"""

from __future__ import annotations

from collections.abc import Mapping

# Data set → what is measured, and class → phrase.
CLASSES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "ItalyPowerDemand": (
        "electric power demand in Italy over a day",
        {"1": "a day from October to March", "2": "a day from April to September"},
    ),
    "GunPoint": (  # order
        "position of a moving hand",
        {"1": "a hand draws a gun from a holster and aims", "2": "a hand points with the index finger"},
    ),
    "BasicMotions": (
        "acceleration and rotation of a smart watch",
        {"Standing": "standing still", "Running": "running", "Walking": "walking", "Badminton": "playing badminton"},
    ),
    "ArrowHead": (  # order
        "outline of a stone projectile point",
        {"0": "an Avonlea arrowhead", "1": "a Clovis arrowhead", "2": "an arrowhead of mixed type"},
    ),
    "OSULeaf": (  # order
        "outline of a leaf",
        {
            "1": "leaf of vine maple, Acer circinatum",
            "2": "leaf of Rocky Mountain maple, Acer glabrum",
            "3": "leaf of bigleaf maple, Acer macrophyllum",
            "4": "leaf of box elder, Acer negundo",
            "5": "leaf of Oregon white oak, Quercus garryana",
            "6": "leaf of California black oak, Quercus kelloggii",
        },
    ),
    "ACSF1": (  # order
        "power consumption of a home appliance",
        {
            "0": "a mobile phone charger",
            "1": "a coffee machine",
            "2": "a desktop computer with a monitor",
            "3": "a fridge or freezer",
            "4": "a hi-fi system",
            "5": "a lamp",
            "6": "a laptop charger",
            "7": "a microwave oven",
            "8": "a printer",
            "9": "a television",
        },
    ),
    "JapaneseVowels": (
        "a spoken pair of Japanese vowels",
        {str(n): f"male speaker number {n}" for n in range(1, 10)},
    ),
    "PickupGestureWiimoteZ": (
        "acceleration of a game controller that is picked up",
        {str(n): f"person number {n}" for n in range(1, 11)},
    ),
    "UnitTest": (
        "pedestrians in a shopping street over a day",
        {"1": "a day at the weekend", "2": "a working day"},
    ),
}


def phrase(dataset: str, label: str, *, with_topic: bool) -> str:
    """A class in words.

    Args:
        dataset: name of the data set; ``JapaneseVowels_eq`` has the classes of ``JapaneseVowels``.
        label: the class, as the file writes it.
        with_topic: also say what is measured, to tell the classes of several data sets apart.
    """
    topic, phrases = CLASSES.get(dataset.removesuffix("_eq"), (dataset, {}))
    words = phrases.get(label, f"class {label}")
    return f"{topic}: {words}" if with_topic else words

"""Texts: the examples of text encoders, and values at the edge of what a text may be."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

SENTENCES = (
    "A dog runs along the beach.",
    "Zwei rote Äpfel liegen auf dem Tisch.",
    "Un chat dort au soleil.",
    "La niña abre el libro.",
    "Кошка смотрит в окно.",
    "夜空に花火が上がる。",
    "山上有一座小屋",
    "قارب صغير في البحر",
    "एक पीली बस",
    "Smiling face with open mouth 😀",
    "the number 42, twice: 42",
    "Tree",
)
"""Sentences in several languages and scripts."""


def examples(n: int, seed: int, max_length: int) -> list[str]:
    """Texts of one to four sentences in several languages; the third is longer than ``max_length`` tokens."""
    generator = random.Random(seed)
    texts = [" ".join(generator.sample(SENTENCES, 1 + i % 4)) for i in range(n)]
    return [f"{text} {' '.join(SENTENCES)}" * (1 + max_length // 40) if i == 2 else text
            for i, text in enumerate(texts)]  # fmt: skip


def oddities(seed: int) -> dict[str, Any]:
    """Values at and past the edge of what a text may be, by what is odd about them."""
    word = SENTENCES[seed % len(SENTENCES)]
    return {
        "no characters": "",
        "no bytes": b"",
        "blanks": " \t\n\u3000\u00a0",
        "one character": "a",
        "one emoji of seven code points": "👩\u200d👩\u200d👧\u200d👦",
        "control characters": "\x00\x01\x07\x1b\x7f",
        "a byte order mark": "\ufeff",
        "marks without width": "\u200b\u200d\u2060",
        "combining marks alone": "\u0301\u0308\u20dd",
        "a letter under a hundred marks": "a" + "\u0301" * 100,
        "right to left": "\u202e" + word + "\u202c שלום",
        "private and unassigned": "\ue000\U0010ffff\ufffe",
        "a lone surrogate": "half \ud83d of it",
        "wrong UTF-8": b"\xff\xfe\x00a",
        "UTF-8 cut in a character": word.encode() + "é".encode()[:1],
        "a million characters": (word + " ") * (1_000_000 // (len(word) + 1)),
        "a million letters without a blank": "a" * 1_000_000,
        "names of special tokens": "<s></s><pad>[CLS][SEP][PAD]<|endoftext|><|startoftext|><mask>",
        "a number": 42,
        "not a number": float("nan"),
        "nothing": None,
        "an empty list": [],
        "a list of blanks": ["", " "],
        "None in a list": [word, None],
        "a number in a list": [word, 7],
        "a list in a list": [[word]],
        "an array of strings": np.array([word, ""], dtype=object),
        "an array of numbers": np.arange(3),
        "a dict": {"caption": word},
    }

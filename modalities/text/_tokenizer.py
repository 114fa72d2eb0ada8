"""Tokenizers of our own text transformer: raw bytes, or a sentencepiece model learned from the captions.

sentencepiece: Kudo and Richardson, arXiv:1808.06226; unigram: Kudo, arXiv:1804.10959; BPE: Sennrich et al.,
arXiv:1508.07909.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from mmrep.encoder import BadSampleError
from mmrep.modalities.text._base import read_text

FILE = "tokenizer.model"
PAD, UNKNOWN, BEGIN, END = range(4)
"""Ids that mean the same in every tokenizer here."""
MAX_BYTES = 4000  # sentencepiece leaves out longer training sentences, silently
MAX_SENTENCES = 2_000_000  # more do not change the pieces, and it holds all of them in memory


class Tokenizer(Protocol):
    """Text to ids, without special tokens."""

    size: int

    def __call__(self, text: str) -> list[int]:
        """The ids of one text."""
        ...


class ByteTokenizer:
    """One token a UTF-8 byte: nothing to learn and nothing unknown, but long."""

    size = 4 + 256

    def __init__(self, lowercase: bool) -> None:
        self.lowercase = lowercase

    def __call__(self, text: str) -> list[int]:
        """The ids of one text: each byte plus 4."""
        return [4 + byte for byte in (text.casefold() if self.lowercase else text).encode()]


class SentencePiece:
    """A learned sentencepiece model.

    Args:
        folder: holds ``tokenizer.model``.
    """

    def __init__(self, folder: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.proto = (folder / FILE).read_bytes()
        try:
            self.processor: Any = SentencePieceProcessor(model_proto=self.proto)
        except RuntimeError as error:
            raise ValueError(f"{folder / FILE} is no sentencepiece model, or was cut short: {error}") from error
        self.size = self.processor.get_piece_size()

    def __call__(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.processor.encode(text)


def learn(
    samples: Iterable[Any],
    folder: Path,
    *,
    algorithm: Literal["unigram", "bpe"],
    vocab_size: int,
    lowercase: bool,
    character_coverage: float,
) -> None:
    """Learn a sentencepiece model and write ``tokenizer.model``; the same samples give the same bytes.

    Args:
        samples: raw values as `read_text` accepts them; all texts of a list are learned from. Missing, empty and
            unreadable values are left out.
        folder: where to write.
        algorithm: how pieces are chosen.
        vocab_size: pieces at most; fewer if the text does not offer so many.
        lowercase: fold case; text is normalised to NFKC in any case.
        character_coverage: share of the text's characters that get a piece of their own; rarer ones are spelled in
            bytes, so that nothing is unknown.

    Raises:
        ValueError: no text, or more distinct characters than ``vocab_size`` holds.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    texts = list(_sentences(samples))
    if not texts:
        raise ValueError("tokenizer: the training samples hold no text to learn a vocabulary from")
    try:
        SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(texts), model_writer=model, model_type=algorithm, vocab_size=vocab_size,
            character_coverage=character_coverage, byte_fallback=True, hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            pad_id=PAD, unk_id=UNKNOWN, bos_id=BEGIN, eos_id=END,
            num_threads=1,  # the sums of several threads depend on their order, and so would the pieces
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        if "required_chars" not in str(error):
            raise
        raise ValueError(
            f"tokenizer: vocab_size {vocab_size} is too small for 256 bytes, 4 special pieces and each character of "
            f"the training text: raise vocab_size or lower character_coverage ({error})"
        ) from error
    (folder / FILE).write_bytes(model.getvalue())


def _sentences(samples: Iterable[Any]) -> Iterator[str]:
    count = 0
    for raw in samples:
        try:
            read = read_text(raw["text"] if isinstance(raw, Mapping) and "text" in raw else raw)
        except BadSampleError:
            continue  # the loader quarantines it; a tokenizer needs no report of it
        for text in [read] if isinstance(read, str) else read:
            for line in text.splitlines():
                if line.strip():
                    yield line.strip().encode()[:MAX_BYTES].decode(errors="ignore")
                    count += 1
        if count >= MAX_SENTENCES:
            return

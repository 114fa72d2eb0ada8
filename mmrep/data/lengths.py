"""How long the samples of a field are, known before the first batch."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mmrep.config import ConfigError
from mmrep.data.reader import failure
from mmrep.data.sample import Sample
from mmrep.data.source import Source, is_missing
from mmrep.encoder import Encoder

logger = logging.getLogger(__name__)


def measured(source: Source, field: str, encoder: Encoder) -> Tensor:
    """Prepare the field of every record once, without views, and keep the lengths.

    A view that chooses among texts may read a longer one. A missing or unreadable value has length 0.

    Args:
        source: a map-style source.
        field: the field.
        encoder: what reads it.

    Returns:
        int64 [len(source)], in the units of `Encoder.length` (tokens, frames, points).

    Raises:
        ConfigError: a stream, or an encoder whose samples all have one length.
    """
    _refuse_streams(source)
    if type(encoder).length is Encoder.length:
        raise ConfigError([f"bucket_by: all samples of {field!r} have one length, as {type(encoder).__name__} sees it"])
    logger.info("measuring the length of %r in %d samples", field, len(source))
    return torch.tensor([_length(source, index, field, encoder) for index in range(len(source))])


def from_column(source: Source, column: str) -> Tensor:
    """The lengths that a column states: whole numbers; missing = 0.

    Raises:
        ConfigError: a stream, no such column, or a value that is no length.
    """
    _refuse_streams(source)
    source.require_columns([column], "lengths")
    values = [0 if is_missing(value) else value for value in source.column(column)]
    try:
        found = [int(value) for value in values]
        wrong = [value for value, number in zip(values, found, strict=True) if number < 0 or number != float(value)]
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError([f"lengths: column {column!r} holds lengths, whole numbers from 0: {error}"]) from error
    if wrong:
        raise ConfigError([f"lengths: column {column!r} holds lengths, whole numbers from 0; got {wrong[0]!r}"])
    return torch.tensor(found)


def _length(source: Source, index: int, field: str, encoder: Encoder) -> int:
    record = source.record(index)
    raw = record.fields.get(field) if isinstance(record, Sample) else None
    if raw is None:
        return 0
    try:
        return encoder.length(encoder.prepare(raw))
    except Exception as error:  # counted when the sample is read
        failure(error, record.id, field)
        return 0


def _refuse_streams(source: Source) -> None:
    if source.streaming:
        raise ConfigError(["bucket_by: needs a map-style source; what a stream holds is not known before it is read"])

"""Numbers and times out of text, a value at a time: one that is neither makes no other invalid."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

NULLS = pa.array([*pacsv.ConvertOptions().null_values, r"\N"], pa.large_string())
"""What stands for a missing number or time in text; MySQL and Hive write the last."""

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?$"
_WHOLE = r"^[+-]?[0-9]{1,18}$"  # fits int64
_TIME = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}(:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?"
    r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)?)?$"
)
_ZONE = r"[T ].*(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"


def numbers_of(text: pa.Array) -> pa.Array:
    """[n] int64 where every number is whole, else float64; null where there is none."""
    text = pc.utf8_trim_whitespace(text)
    text = _where(pc.match_substring_regex(text, _NUMBER), text)
    if pc.all(pc.match_substring_regex(text, _WHOLE)).as_py():
        return text.cast(pa.int64())
    return text.cast(pa.float64())


def times_of(text: pa.Array) -> pa.Array:
    """[n] timestamps in microseconds of UTC, of ISO 8601 dates and times; null where there is none.

    What is finer than a microsecond is cut off; without a zone a time is taken as UTC.
    """
    text = pc.utf8_trim_whitespace(text)
    text = pc.replace_substring_regex(text, r"(\.[0-9]{6})[0-9]+", r"\1")
    text = pc.replace_substring_regex(text, r" ?(UTC|GMT)$", "Z")
    text = pc.replace_substring_regex(text, r" ([+-][0-9]{2}(:?[0-9]{2})?)$", r"\1")
    text = _where(pc.match_substring_regex(text, _TIME), text)
    zoned = pc.match_substring_regex(text, _ZONE)
    utc = pa.timestamp("us", "UTC")
    with_zone = cast_or_null(_where(zoned, text), utc)
    without = cast_or_null(_where(pc.invert(zoned), text), pa.timestamp("us"))
    return pc.coalesce(with_zone, without.cast(pa.int64()).cast(utc))


def guess(text: pa.Array) -> pa.Array:
    """Text as what all of it is: numbers, times or booleans; else as it stands."""
    null = pc.is_in(text, value_set=NULLS)
    known = _where(pc.invert(null), text)
    if known.null_count == len(known):
        return text
    found: Any
    for found in (numbers_of(known), times_of(known), _booleans_of(known)):
        if found.null_count == known.null_count:
            return found
    return text


def cast_or_null(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Values cast to `kind`, null where one cannot be.

    Arrow's cast fails as a whole; halving finds the few that make it fail.
    """
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        if len(values) == 1:
            return pa.nulls(1, kind)
    half = len(values) // 2
    halves = values.slice(0, half), values.slice(half)
    return pa.concat_arrays([cast_or_null(part, kind) for part in halves])


def _booleans_of(text: pa.Array) -> pa.Array:
    low = pc.utf8_lower(text)
    return _where(pc.is_in(low, value_set=pa.array(["true", "false"], low.type)), low).cast(
        pa.bool_()
    )


def _where(mask: pa.Array, values: pa.Array) -> pa.Array:
    """Values where `mask` is true, null elsewhere."""
    return pc.if_else(mask, values, pa.scalar(None, values.type))

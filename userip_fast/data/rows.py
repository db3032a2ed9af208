"""What the rows of a log say: item, rating and time of each, and which of them are bad."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.errors import DataError
from userip_fast.data.arrow import to_numpy
from userip_fast.data.histories import Items, Mask, Rows
from userip_fast.data.report import RowChecks
from userip_fast.data.sources import Source
from userip_fast.data.values import numbers_of, times_of

logger = logging.getLogger("userip_fast")


@dataclass(frozen=True)
class Columns:
    """Which columns of the log mean what."""

    user: str
    item: str
    rating: str | None
    time: str | None


def check_rows(
    log: Source,
    rows: NDArray[np.int64],
    columns: Columns,
    users: pa.Array,
    item_keys: pa.Array,
    items: Items,
    checks: RowChecks,
) -> Rows:
    """Finds each row's item, rating and time, and notes in `checks` which rows are bad.

    Args:
        users, item_keys: [n] keys of `rows`.
    """
    place = to_numpy(pc.fill_null(pc.index_in(item_keys, value_set=items.keys), -1))
    checks.start(log, rows)
    checks.lose(log)
    again = log.repeats_header(columns.user, columns.item)[rows]
    checks.add("header again", columns.user, again, log.column(columns.user).take(rows))
    checks.add("null key", columns.user, to_numpy(pc.is_null(users)), users)
    checks.add("null key", columns.item, to_numpy(pc.is_null(item_keys)), item_keys)
    checks.add("unknown item", columns.item, place < 0, item_keys)
    empty = np.append(items.empty, False)[place]
    checks.add("empty text", columns.item, empty, item_keys)
    ratings = times = None
    if columns.rating is not None:
        ratings, values = _ratings(log, columns.rating, rows, checks)
        checks.add("rating is not a number", columns.rating, ~np.isfinite(ratings), values)
    if columns.time is not None:
        times, invalid, strange, values = _times(log, columns.time, rows, checks)
        checks.add("time is not valid", columns.time, invalid, values)
        rule = f"time is not in {checks.time_unit}, as most are"
        checks.add(rule, columns.time, strange, values)
    return Rows(place, ratings, times)


def _ratings(
    log: Source, name: str, rows: NDArray[np.int64], checks: RowChecks
) -> tuple[NDArray[np.float32], pa.Array]:
    written = values = log.column(name).take(rows)
    if pa.types.is_large_string(values.type):
        values = numbers_of(values)
        if not _some_parsed(log, name, written, values, checks):
            values = written
    kind = values.type
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(f"{log.name}: rating column {name!r} is {kind}, not a number")
    floats = pc.fill_null(values.cast(pa.float32(), safe=False), np.float32("nan"))
    return to_numpy(floats), written


def _some_parsed(
    log: Source, name: str, text: pa.Array, values: pa.Array, checks: RowChecks
) -> bool:
    """Whether a column of text is one of numbers or times at all: if not, it is refused as such.

    In CSV all is text, so that one bad value does not make a column anything.
    """
    if values.null_count < len(values):
        checks.parsed.add(name)
    return not log.typed or name in checks.parsed or text.null_count == len(text)


_UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
_LARGEST = np.array([1e11, 1e14, 1e17, 9.2e18])  # of each: 3,169 years; of int64 the last


def _times(
    log: Source, name: str, rows: NDArray[np.int64], checks: RowChecks
) -> tuple[NDArray[np.int64], Mask, Mask, pa.Array]:
    """Microseconds since 1970, where they are not valid, and where in another unit than most.

    The unit of the first source whose numbers were looked at is that of all.
    """
    written = values = log.column(name).take(rows)
    if pa.types.is_large_string(values.type):
        numbers = numbers_of(values)
        times = times_of(values)
        values = numbers if numbers.null_count < times.null_count else times
        if not _some_parsed(log, name, written, values, checks):
            values = written
    kind = values.type
    none = np.zeros(len(rows), bool)
    try:
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            null = to_numpy(pc.is_null(values))
            filled = to_numpy(pc.fill_null(values, pa.scalar(0, kind)))
            return (*_numbers_since_1970(filled, null, name, checks), written)
        if pa.types.is_timestamp(kind):
            unit = pa.timestamp("us", tz=kind.tz)
            whole = values.cast(unit, safe=False).cast(pa.int64())
        elif pa.types.is_date(kind) or pa.types.is_large_string(kind):
            whole = values.cast(pa.timestamp("us")).cast(pa.int64())
        elif pa.types.is_null(kind):
            whole = values.cast(pa.int64())
        else:
            raise DataError(f"{log.name}: time column {name!r} is {kind}, not a time")
    except pa.ArrowInvalid as e:
        raise DataError(
            f"{log.name}: time column {name!r} of type {kind} must hold numbers since 1970, "
            f"timestamps or dates ({e})"
        ) from e
    return to_numpy(pc.fill_null(whole, 0)), to_numpy(pc.is_null(whole)), none, written


def _numbers_since_1970(
    numbers: NDArray[Any], null: Mask, name: str, checks: RowChecks
) -> tuple[NDArray[np.int64], Mask, Mask]:
    """As `_times`, of integers or floats; what stands where a null is does not matter."""
    unit = np.searchsorted(_LARGEST, np.abs(numbers.astype(np.float64)), side="right")
    invalid = null | (unit == len(_UNITS))  # NaN too, which sorts last
    found = np.bincount(unit[~invalid], minlength=len(_UNITS))
    if checks.time_unit is None and found.any():
        checks.time_unit = _UNITS[int(found.argmax())]
        if checks.time_unit != "seconds":
            logger.warning("column %r: times are read as %s since 1970", name, checks.time_unit)
    own = _UNITS.index(checks.time_unit or "seconds")
    strange = ~invalid & (unit != own)
    fine = np.where(invalid | strange, 0, numbers)
    if own == 0 and np.issubdtype(fine.dtype, np.floating):
        return np.round(fine.astype(np.float64) * 1e6).astype(np.int64), invalid, strange
    whole = fine.astype(np.int64)
    micros = whole * 10 ** (6 - 3 * own) if own < 3 else whole // 1000
    return micros, invalid, strange

"""`read_interactions`: files to checked `Interactions`, every bad row accounted for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.data.arrow import to_numpy
from userip_fast.data.filters import RowFilter
from userip_fast.data.interactions import Interactions, ReadAs
from userip_fast.data.report import NUM_EXAMPLES, BadRows, RowChecks
from userip_fast.data.sources import Source, TableLike, read_source
from userip_fast.data.text import TextTemplate
from userip_fast.data.textfiles import TextForm, text_form
from userip_fast.data.values import numbers_of, times_of
from userip_fast.errors import DataError
from userip_fast.keys import hash_keys, key_order, mix64, seeded

logger = logging.getLogger("userip_fast")

Mask = NDArray[np.bool_]

DEFAULT_TEXT = "{title}"


def read_interactions(
    interactions: TableLike,
    items: TableLike | None = None,
    *,
    user: str = "user_id",
    item: str = "item_id",
    rating: str | None = None,
    time: str | None = None,
    text: str = DEFAULT_TEXT,
    filter: str | None = None,
    on_bad: str = "error",
    min_history: int = 1,
    seed: int = 0,
    sep: str | None = None,
    encoding: str | None = None,
    header: str | Sequence[str] | None = None,
    items_header: str | Sequence[str] | None = None,
) -> Interactions:
    """Reads and checks an interaction log and its items.

    Args:
        interactions: A file of CSV, JSON lines or Parquet (RecBole's .inter too; text may be packed
            by gzip or zstd); a folder of such, or a list of files and folders; or a table in
            memory: of pandas, polars, DuckDB, Arrow, Hugging Face datasets, or whatever has
            Arrow's C stream interface. A `reviews.pickle` or its folder goes to
            `userip_fast.data.read_nete`, whose columns are fixed.
        items: The same kinds, one row per item. None: the columns of `text` are columns of the
            interactions, and an item's text is the first non-empty one seen for it.
        user, item: Key columns, integers (kept as int64) or strings; an empty string is a null.
        rating: Numeric column, or None. A rating that never varies counts as none.
        time: Column of timestamps, dates (as text by ISO 8601), or numbers since 1970, or None.
            Numbers are seconds,
            milliseconds, microseconds or nanoseconds, whichever most of them can be (up to the
            year 5138); where it is not seconds, the log says so. Events are sorted by it within a
            user, ties in file order. Without it they are in an order fixed by `seed` and the keys
            of user and item, wherever the rows stand.
        text: Item text, see `TextTemplate`.
        filter: Rows to keep, see `RowFilter`; applied before any check.
        on_bad: "error" refuses the file if any row is bad; "skip" drops bad rows. Bad is: a null
            key, an item that is not in `items`, an item whose text is empty, a null, NaN or
            infinite rating or time, or text that is none, a time in another unit than most, an item
            key that `items` holds twice (the first row is kept), a row of a CSV file that has more
            or fewer values than others or repeats the header, a line that is no JSON, text that is
            not in the encoding of the file.
            Items that nobody interacts with may have empty text.
        min_history: Users with fewer events left are dropped and listed in `report`.
        seed: Of the fixed order when there is no time.
        sep: What separates columns of a CSV log, such as ";", or "::"; items are looked at for it
            first. None: what the name says, or else gives the columns asked for, which is logged.
        encoding: Of text files, such as "latin-1". None is UTF-8, or UTF-16 with its mark.
        header: Names of the columns of a CSV log without a header line.
        items_header: The same for the items.

    Returns:
        The data; `data.report` says what was dropped and why.

    Raises:
        DataError: A file cannot be read, a column is missing or of an unusable type, a row is bad
            (unless skipped), or no user is left.
    """
    read_as = ReadAs(user, item, rating, time, text, filter, min_history)
    form = text_form(sep, encoding, header)
    items_form = replace(text_form(None, encoding, items_header, "items_header"), likely=form.sep)
    if isinstance(interactions, str | Path) and _is_nete(Path(interactions)):
        from userip_fast.data.nete import read_nete

        fixed = [
            ("user", user, ("user", "user_id")),
            ("item", item, ("item", "item_id")),
            ("rating", rating, ("rating", None)),
            ("time", time, (None,)),
        ]
        for name, column, known in fixed:
            if column not in known:
                raise DataError(
                    f"{interactions}: reviews have columns 'user', 'item' and 'rating', and no "
                    f"time; got {name}={column!r}"
                )
        reviews = read_nete(
            interactions,
            items,
            text=None if text == DEFAULT_TEXT and items is None else text,
            filter=filter,
            on_bad=on_bad,
            min_history=min_history,
            seed=seed,
            form=items_form,
        )
        return replace(reviews, read_as=read_as)
    template = TextTemplate(text)
    predicate = RowFilter(filter) if filter is not None else None
    filtered_by = predicate.columns if predicate else ()
    own_text = template.columns if items is None else ()
    wanted = [user, item, *(c for c in (rating, time) if c is not None), *filtered_by, *own_text]
    columns = list(dict.fromkeys(wanted))
    as_text = {user, item, *own_text} - {*filtered_by, rating, time}
    skip = check_on_bad(on_bad)
    log = read_source(
        interactions,
        columns,
        what="interactions",
        as_text=as_text,
        checked={c for c in (rating, time) if c is not None},
        numbers=predicate.numbers if predicate else (),
        form=form,
        skip=skip,
    )
    catalogue = None if items is None else read_items(items, item, template, items_form, skip)
    found = build_interactions(
        log,
        catalogue,
        columns=Columns(user, item, rating, time),
        template=template,
        predicate=predicate,
        on_bad=on_bad,
        min_history=min_history,
        seed=seed,
    )
    return replace(found, read_as=read_as)


def check_on_bad(on_bad: str) -> bool:
    """Whether bad rows are skipped."""
    if on_bad not in ("error", "skip"):
        raise DataError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
    return on_bad == "skip"


def read_items(
    items: TableLike, item: str, template: TextTemplate, form: TextForm | None, skip: bool
) -> Source:
    """The item table, with all its columns.

    Raises:
        DataError: See `read_source`; or the key or a column of the text is not there.
    """
    catalogue = read_source(
        items,
        None,
        what="items",
        as_text={item, *template.columns},
        needed=(item, *template.columns),
        form=form,
        skip=skip,
    )
    catalogue.require(item)
    template.check(catalogue.table.column_names, catalogue.name)
    return catalogue


def _is_nete(path: Path) -> bool:
    return path.suffix == ".pickle" or (path / "reviews.pickle").is_file()


@dataclass(frozen=True)
class Columns:
    """Which columns of the log mean what."""

    user: str
    item: str
    rating: str | None
    time: str | None


def build_interactions(
    log: Source,
    catalogue: Source | None,
    *,
    columns: Columns,
    template: TextTemplate,
    predicate: RowFilter | None,
    on_bad: str,
    min_history: int,
    seed: int,
    rows: NDArray[np.int64] | None = None,
) -> Interactions:
    """Checks rows (None: all) of sources already read, and sorts them into histories.

    The other arguments and the errors are those of `read_interactions`.
    """
    check_on_bad(on_bad)
    if min_history < 1:
        raise DataError(f"min_history must be at least 1, got {min_history}")
    checks = RowChecks()
    users, item_column = log.keys(columns.user), log.keys(columns.item)
    read = np.arange(log.table.num_rows) if rows is None else rows
    rows = read if predicate is None else read[predicate.mask(log.table)[read]]
    kept_users, kept_items = users.take(rows), item_column.take(rows)

    if catalogue is None:
        items = items_of_log(log, item_column, rows, template)
    else:
        items = items_of_catalogue(catalogue, columns.item, template, checks)
        kept_items, items = one_key_type(log, catalogue, columns.item, kept_items, items)
    checked = check_rows(log, rows, columns, kept_users, kept_items, items, checks)
    if checks.counts and on_bad == "error":
        raise checks.error()

    # Users: all that were read, so that those with every row gone are listed.
    good = np.flatnonzero(~checks.bad)
    seen = pc.unique(users.take(read)).drop_null()
    own = kept_users.take(good), checked.take(good)
    whole, short = histories(seen, *own, items, min_history, seed)
    report = BadRows(
        rows_read=len(read) + checks.rows_lost,
        rows_filtered=len(read) - len(rows),
        counts=checks.counts,
        examples=checks.examples(),
        short_users=len(short),
        short_examples=tuple(short[:NUM_EXAMPLES].to_pylist()),
        min_history=min_history,
    )
    if whole.num_users == 0:
        raise nobody_left(log.name, report)
    ratings = whole.rating
    if ratings is not None and ratings.min() == ratings.max():
        whole = replace(whole, rating=None, constant_rating=float(ratings[0]))
    return replace(whole, report=report)


def nobody_left(name: str, report: BadRows) -> DataError:
    """What to raise where no user has enough events."""
    return DataError(
        f"{name}: no user with behaviour is left (at least {report.min_history} event(s) each)\n"
        f"{report.table()}"
    )


@dataclass(frozen=True)
class Rows:
    """What the checks found in the rows of a log, [n] each.

    Attributes:
        place: Rows of the items, -1 for one that is not there.
        rating, time: As in `Interactions`; invalid where the row is bad.
    """

    place: NDArray[np.int32]
    rating: NDArray[np.float32] | None
    time: NDArray[np.int64] | None

    def take(self, rows: NDArray[np.int64]) -> Rows:
        return Rows(
            self.place[rows],
            None if self.rating is None else self.rating[rows],
            None if self.time is None else self.time[rows],
        )


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


def histories(
    seen: pa.Array,
    users: pa.Array,
    rows: Rows,
    items: Items,
    min_history: int,
    seed: int,
) -> tuple[Interactions, pa.Array]:
    """Good rows sorted into histories, and the keys of users with too few of them.

    Args:
        seen: Distinct keys of all users that were read.
        users: [n] the user of each row, in the order of the files.
        rows: [n] the rows.
    """
    hashes = hash_keys(seen)
    order = key_order(seen, hashes)
    seen, hashes = seen.take(order), hashes[order]
    event_user = to_numpy(pc.index_in(users, value_set=seen))
    lengths = np.bincount(event_user, minlength=len(seen))
    enough = lengths >= min_history

    # Events: by user, then by time, or in an order that the keys alone fix; ties as in the file.
    good = np.flatnonzero(enough[event_user])
    event_user, rows = event_user[good], rows.take(good)
    within: NDArray[Any]
    if rows.time is not None:
        within = rows.time
    else:
        within = mix64(seeded(hashes, seed)[event_user] ^ hash_keys(items.keys)[rows.place])
    rows = rows.take(np.lexsort((within, event_user)))
    kept = pa.array(~items.empty)
    new_place = np.cumsum(~items.empty, dtype=np.int32) - np.int32(1)
    found = Interactions(
        user_keys=seen.filter(pa.array(enough)),
        item_keys=items.keys.filter(kept),
        item_text=items.text.filter(kept),
        items=items.table.filter(kept),
        offsets=np.concatenate([[0], np.cumsum(lengths[enough])]).astype(np.int64),
        item_index=new_place[rows.place],
        rating=rows.rating,
        time=rows.time,
        ordered=rows.time is not None,
    )
    return found, seen.filter(pa.array(~enough))


@dataclass(frozen=True)
class Items:
    """Items with distinct keys, [I] each."""

    keys: pa.Array
    text: pa.Array
    empty: Mask
    table: pa.Table


def items_of_catalogue(
    catalogue: Source, item: str, template: TextTemplate, checks: RowChecks
) -> Items:
    keys = catalogue.keys(item)
    checks.start(catalogue, np.arange(len(keys)))
    checks.lose(catalogue)
    again = catalogue.repeats_header(item)
    checks.add("header again", item, again, catalogue.column(item))
    checks.add("null key", item, to_numpy(pc.is_null(keys)), keys)
    first = np.zeros(len(keys), bool)
    first[first_rows(keys)] = True
    checks.add("duplicate item", item, ~first, keys)
    kept = np.flatnonzero(~checks.bad)
    table = catalogue.table.take(kept)
    text = template.render(table)
    return Items(keys.take(kept), text, to_numpy(pc.equal(text, "")), table)


def items_of_log(
    log: Source, keys: pa.Array, rows: NDArray[np.int64], template: TextTemplate
) -> Items:
    """Each item by the first of its rows that has a text, or its first row."""
    text = template.render(log.table.take(rows))
    keys = keys.take(rows)
    filled = np.flatnonzero(to_numpy(pc.not_equal(text, "")))
    candidates = np.concatenate([filled, np.arange(len(rows))])
    kept = candidates[first_rows(keys.take(candidates))]
    text = text.take(kept)
    table = log.table.select(template.columns).take(rows[kept])
    return Items(keys.take(kept), text, to_numpy(pc.equal(text, "")), table)


def first_rows(keys: pa.Array) -> NDArray[np.int64]:
    """Rows at which each non-null key is seen for the first time, ascending."""
    codes = keys.dictionary_encode().indices
    _, first = np.unique(to_numpy(codes.drop_null()), return_index=True)
    return np.sort(np.flatnonzero(to_numpy(codes.is_valid()))[first])


def one_key_type(
    log: Source, catalogue: Source, item: str, keys: pa.Array, items: Items
) -> tuple[pa.Array, Items]:
    """Lets digits read from a CSV file meet item keys that the other table holds as text."""
    if keys.type == items.keys.type:
        return keys, items
    text = pa.large_string()
    if keys.type != text and not log.typed:
        return keys.cast(text), items
    if items.keys.type != text and not catalogue.typed:
        return keys, replace(items, keys=items.keys.cast(text))
    raise DataError(
        f"{log.name}: column {item!r} is {keys.type}, but it is {items.keys.type} in "
        f"{catalogue.name}; write both as integers or both as strings"
    )


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

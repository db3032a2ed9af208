"""`read_interactions`: files, or tables in memory, to checked `Interactions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from userip_fast.core.errors import DataError
from userip_fast.data.build import build_interactions, read_items
from userip_fast.data.filelist import TableLike
from userip_fast.data.filters import RowFilter
from userip_fast.data.histories import Rules
from userip_fast.data.interactions import Interactions, ReadAs
from userip_fast.data.nete import read_nete
from userip_fast.data.rows import Columns
from userip_fast.data.sources import read_source
from userip_fast.data.text import TextTemplate
from userip_fast.data.textfiles import text_form

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
    rules = Rules(on_bad, min_history, seed)
    if isinstance(interactions, str | Path) and _is_nete(Path(interactions)):
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
    log = read_source(
        interactions,
        columns,
        what="interactions",
        as_text=as_text,
        checked={c for c in (rating, time) if c is not None},
        numbers=predicate.numbers if predicate else (),
        form=form,
        skip=rules.skip,
    )
    catalogue = None if items is None else read_items(items, item, template, items_form, rules.skip)
    found = build_interactions(
        log,
        catalogue,
        columns=Columns(user, item, rating, time),
        template=template,
        predicate=predicate,
        rules=rules,
    )
    return replace(found, read_as=read_as)


def _is_nete(path: Path) -> bool:
    return path.suffix == ".pickle" or (path / "reviews.pickle").is_file()

"""`build_interactions`: tables to checked `Interactions`, every bad row accounted for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.errors import DataError
from userip_fast.data.filelist import TableLike
from userip_fast.data.filters import RowFilter
from userip_fast.data.histories import (
    Rules,
    histories,
    items_of_catalogue,
    items_of_log,
    one_key_type,
)
from userip_fast.data.interactions import Interactions
from userip_fast.data.report import NUM_EXAMPLES, BadRows, RowChecks
from userip_fast.data.rows import Columns, check_rows
from userip_fast.data.sources import Source, read_source
from userip_fast.data.text import TextTemplate
from userip_fast.data.textfiles import TextForm


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


def build_interactions(
    log: Source,
    catalogue: Source | None,
    *,
    columns: Columns,
    template: TextTemplate,
    predicate: RowFilter | None,
    rules: Rules,
    rows: NDArray[np.int64] | None = None,
) -> Interactions:
    """Checks rows (None: all) of sources already read, and sorts them into histories.

    The other arguments and the errors are those of `read_interactions`.
    """
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
    if checks.counts and not rules.skip:
        raise checks.error()

    # Users: all that were read, so that those with every row gone are listed.
    good = np.flatnonzero(~checks.bad)
    seen = pc.unique(users.take(read)).drop_null()
    own = kept_users.take(good), checked.take(good)
    whole, short = histories(seen, *own, items, rules)
    report = BadRows(
        rows_read=len(read) + checks.rows_lost,
        rows_filtered=len(read) - len(rows),
        counts=checks.counts,
        examples=checks.examples(),
        short_users=len(short),
        short_examples=tuple(short[:NUM_EXAMPLES].to_pylist()),
        min_history=rules.min_history,
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

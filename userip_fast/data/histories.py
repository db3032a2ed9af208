"""Items with their texts, and checked rows sorted into the histories of their users."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.errors import DataError
from userip_fast.core.keys import hash_keys, key_order, mix64, seeded
from userip_fast.data.arrow import to_numpy
from userip_fast.data.interactions import Interactions
from userip_fast.data.report import RowChecks
from userip_fast.data.sources import Source
from userip_fast.data.text import TextTemplate

Mask = NDArray[np.bool_]


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


@dataclass(frozen=True)
class Rules:
    """What becomes of bad rows and short histories, and how events without times are ordered; see
    `userip_fast.read_interactions`."""

    on_bad: str = "error"
    min_history: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.on_bad not in ("error", "skip"):
            raise DataError(f"on_bad must be 'error' or 'skip', got {self.on_bad!r}")
        if self.min_history < 1:
            raise DataError(f"min_history must be at least 1, got {self.min_history}")

    @property
    def skip(self) -> bool:
        """Whether bad rows are left out, or refused."""
        return self.on_bad == "skip"


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


def histories(
    seen: pa.Array,
    users: pa.Array,
    rows: Rows,
    items: Items,
    rules: Rules,
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
    enough = lengths >= rules.min_history

    # Events: by user, then by time, or in an order that the keys alone fix; ties as in the file.
    good = np.flatnonzero(enough[event_user])
    event_user, rows = event_user[good], rows.take(good)
    within: NDArray[Any]
    if rows.time is not None:
        within = rows.time
    else:
        within = mix64(seeded(hashes, rules.seed)[event_user] ^ hash_keys(items.keys)[rows.place])
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

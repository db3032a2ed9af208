"""Columns of the items table that tell what kind of item it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.data.arrow import combine

Int64 = NDArray[np.int64]
_MOST_VALUES = 256  # of an attribute
_RECURS = 5  # items with the same value: less is a name, not an attribute


@dataclass(frozen=True)
class Attribute:
    """One item column. `values` [I, L] int64 hold the values of each item, 0 for none or for one
    that is not kept; the most frequent value is 1.

    Attributes:
        distinct: Values that the column holds; the `size - 1` most frequent are kept.
        words: [size - 1] the values that are kept.
    """

    name: str
    size: int
    values: Int64
    distinct: int
    words: tuple[str, ...]


def item_attributes(items: pa.Table, names: tuple[str, ...] | None = None) -> list[Attribute]:
    """Columns [I] of items, values separated by `|`; of many values the most frequent are kept.

    Args:
        names: The columns to take whatever they hold; None takes those of text whose values recur:
            most items have one that `_RECURS` items have.
    """
    columns = items.column_names if names is None else names
    found = []
    for name in columns:
        column = combine(items[name])
        if names is None and not (
            pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        ):
            continue
        text = pc.fill_null(pc.cast(column, pa.large_string()), "")
        parts = pc.split_pattern(text, "|")
        several = pc.list_value_length(parts).to_numpy(zero_copy_only=False)
        coded = pc.dictionary_encode(pc.list_flatten(parts))
        words = coded.dictionary.to_pylist()
        code = np.asarray(coded.indices).astype(np.int64)
        row = np.repeat(np.arange(len(items)), several)
        count = np.bincount(code, minlength=len(words)) * np.array([bool(w) for w in words], int)
        distinct = int((count > 0).sum())
        if names is None:
            recurs = np.bincount(row, count[code] >= _RECURS, len(items)) > 0
            if distinct < 2 or recurs.mean() < 0.5:
                continue
        order = sorted(range(len(words)), key=lambda i: (-count[i], words[i]))
        size = min(distinct, _MOST_VALUES)
        number = np.zeros(len(words), np.int64)
        number[order[:size]] = np.arange(1, size + 1)
        table = np.zeros((len(items), int(several.max(initial=1))), np.int64)
        table[row, np.arange(len(row)) - np.repeat(np.cumsum(several) - several, several)] = number[
            code
        ]
        kept = tuple(words[i] for i in order[:size])
        found.append(Attribute(name, size + 1, table, distinct, kept))
    return found

"""Small steps between Arrow and numpy."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from numpy.typing import NDArray


def combine(column: pa.ChunkedArray) -> pa.Array:
    """One contiguous array of a table's column, dictionaries decoded, strings as large_string."""
    if pa.types.is_dictionary(column.type):
        kind = column.type.value_type
        kind = pa.large_string() if pa.types.is_string(kind) else kind
        parts = [c.dictionary.cast(kind).take(c.indices) for c in column.chunks]
        column = pa.chunked_array(parts, kind)
    if pa.types.is_string(column.type):  # whose 32-bit offsets could overflow
        column = column.cast(pa.large_string())
    array = column.combine_chunks()
    return array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)


def to_numpy(array: pa.Array) -> NDArray[Any]:
    """Values without nulls; copied where Arrow's layout is not numpy's, as for booleans."""
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

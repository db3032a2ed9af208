"""Values that go with item texts: a row a text, and their way to a Parquet file and back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from userip_fast.core.errors import FormatError
from userip_fast.prompts.packing import Int64


@dataclass(frozen=True, eq=False)
class ByText:
    """Values of T items.

    Attributes:
        texts: Of the items.
    """

    texts: list[str]

    @cached_property
    def _row(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}

    def rows_of(self, texts: Sequence[str]) -> Int64:
        """[n] rows of texts; -1 of one that is not there."""
        return np.asarray([self._row.get(text, -1) for text in texts], np.int64)

    def digest_with(self, values: npt.NDArray[Any]) -> bytes:
        """Of texts and values."""
        told = hashlib.sha256("\x1f".join(self.texts).encode())
        told.update(values.tobytes())
        return told.digest()

    def table_with(self, name: str, values: npt.NDArray[Any]) -> pa.Table:
        """Texts and values [T, ...], ready for Parquet."""
        lists = pa.FixedSizeListArray.from_arrays(
            pa.array(values.ravel()), int(np.prod(values.shape[1:]))
        )
        return pa.table({"text": pa.array(self.texts, pa.large_string()), name: lists})


def texts_and_values(table: pa.Table, name: str) -> tuple[list[str], npt.NDArray[Any]]:
    """What `ByText.table_with` was given, values as [T, width].

    Raises:
        FormatError: It is no such table.
    """
    kind = table.schema.field(name).type if name in table.column_names else pa.null()
    if not pa.types.is_fixed_size_list(kind) or "text" not in table.column_names:
        raise FormatError(f"there must be a text, and {name} as lists of equal lengths")
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    texts = table["text"].to_pylist()
    if None in texts or len(flat) != len(texts) * kind.list_size:
        raise FormatError(f"every text must have {name}")
    return texts, flat.reshape(len(texts), kind.list_size)

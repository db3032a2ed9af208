"""From user keys to rows: keys in hash order behind a directory of their hashes' top bits.

    hash -> bucket (top b bits) -> its first row -> compare with a window of 16 users -> next window

b is chosen so that a bucket holds 8 to 16 users on average: a look-up touches one line of the
directory and two or three of the keys. Everything is vectorised over the batch, nothing loops over
keys. A bucket may be of any size and hashes may collide: both cost time, never a wrong answer.
Whatever is read is checked first, see `userip_fast.bank.pages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.bank.pages import PagedArray
from userip_fast.core import _extension
from userip_fast.core.errors import ConfigError, DataError, FormatError, MismatchError
from userip_fast.core.keys import canonical_keys, hash_keys, key_order

_USERS_PER_BUCKET = 8  # at least, on average; below 16, since the number of buckets doubles
_WINDOW = 16  # users compared at once
_CHUNK = 8192  # look-ups at once: their windows take 1 MiB


class KeyTypeError(MismatchError, TypeError):
    """Keys are neither integers nor strings, or not of the bank's key type."""


def as_keys(name: str, values: Any) -> pa.Array:
    """`values` as [n] int64 or large_string keys; one integer or string counts as n = 1.

    Raises:
        KeyTypeError: They are not all integers within int64 or all valid strings, or one is null.
    """
    if isinstance(values, str | int | np.integer):
        values = [values]
    elif isinstance(values, tuple):
        values = list(values)  # not through numpy, whose strings lose trailing NULs
    elif not isinstance(values, list | pa.Array | pa.ChunkedArray):
        values = np.asarray(values)
    try:
        keys = canonical_keys(values)
    except (DataError, TypeError, OverflowError, UnicodeError) as e:
        raise KeyTypeError(f"{name}: {e}; pass integers (within int64) or strings") from e
    return keys


def keys_of_type(name: str, values: Any, kind: str | None, where: object) -> pa.Array:
    """`values` as keys of a bank with keys of `kind`; None: the bank is empty and has no type yet.

    Raises:
        KeyTypeError: See `as_keys`; or they are of the other type.
    """
    own = pa.int64() if kind == "int64" else pa.large_string()
    if isinstance(values, pa.Array) and values.type == own and values.null_count == 0:
        return values  # canonical already, as in any tight loop
    keys = as_keys(name, values)
    if kind is None:
        return keys
    if len(keys) == 0:
        return pa.array([], own)
    if keys.type != own:
        raise KeyTypeError(
            f"{name}: the bank {where} has {kind} keys, these are {key_type(keys)} (the first is "
            f"{keys[0].as_py()!r}); convert them, or see coerce_keys"
        )
    return keys


ON_UNKNOWN = ("error", "code")


def bad_on_unknown(on_unknown: object) -> ConfigError:
    """What a look-up raises where `on_unknown` is not of `ON_UNKNOWN`."""
    return ConfigError(f"on_unknown={on_unknown!r}: must be 'error' or 'code'")


def unknown_users(unknown: pa.Array, asked: int, where: str) -> DataError:
    """What a look-up of `asked` users raises where some are not in the bank."""
    return DataError(
        f"user_ids: {len(unknown)} of {asked} are not in the bank {where}: {name_some(unknown)}; "
        "on_unknown='code' gives them the reserved code"
    )


def key_type(keys: pa.Array) -> str:
    """ "int64" or "string"."""
    return "int64" if pa.types.is_integer(keys.type) else "string"


def refuse_duplicates(name: str, keys: pa.Array, hashes: NDArray[np.uint64]) -> None:
    """Checks that keys in hash order (ties by key) are unique.

    Raises:
        DataError: A key occurs more than once; the first ten are named.
    """
    tied = np.flatnonzero(hashes[1:] == hashes[:-1])
    same = _equal(keys.take(pa.array(tied)), keys.take(pa.array(tied + 1)))
    if same.any():
        twice = keys.take(pa.array(tied[same])).unique()
        raise DataError(
            f"{name}: every user must occur once; {len(twice)} occur more than once: "
            f"{name_some(twice)}"
        )


def name_some(keys: pa.Array) -> str:
    """The first ten keys, for messages."""
    shown = ", ".join(repr(k) for k in keys[:10].to_pylist())
    return shown + (", ..." if len(keys) > 10 else "")


def in_hash_order(name: str, keys: pa.Array, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The order that sorts by hash, ties by key.

    Raises:
        DataError: A key occurs more than once.
    """
    order = key_order(keys, hashes)
    refuse_duplicates(name, keys.take(pa.array(order)), hashes[order])
    return order


def directory_bits(num_users: int) -> int:
    """How many top bits of the hash choose the bucket."""
    return max(1, (num_users // _USERS_PER_BUCKET).bit_length() - 1)


def directory_dtype(num_users: int) -> str:
    return "<u4" if num_users < 2**32 else "<u8"


def build_directory(hashes: Iterable[NDArray[np.uint64]], num_users: int) -> NDArray[Any]:
    """First row of each bucket, [2**b + 1]; the last entry is the number of users.

    Args:
        hashes: All users' hashes, sorted, in pieces that are not empty.
    """
    bits = directory_bits(num_users)
    directory = np.zeros(2**bits + 1, directory_dtype(num_users))
    for piece in hashes:
        bucket = (piece >> np.uint64(64 - bits)).astype(np.int64)
        first, last = bucket[0], bucket[-1]
        directory[first + 1 : last + 2] += np.bincount(bucket - first).astype(directory.dtype)
    return np.cumsum(directory, dtype=directory.dtype)


@dataclass(frozen=True)
class HashIndex:
    """Mapped keys of a bank, searchable.

    Attributes:
        path: Folder of the generation, for messages.
        integers: [n] int64 keys, or None for string keys.
        offsets: [n + 1] int64 byte offsets of string keys, else None.
        text: UTF-8 bytes of string keys, else None.
        hashes: [n] uint64 of string keys; those of integers are computed, which is cheaper.
        directory: See `build_directory`.
    """

    path: Path
    integers: PagedArray | None
    offsets: PagedArray | None
    text: PagedArray | None
    hashes: PagedArray | None
    directory: PagedArray
    _bound: list[Any] = field(default_factory=list, compare=False, repr=False)

    def __len__(self) -> int:
        if self.integers is not None:
            return len(self.integers)
        assert self.offsets is not None
        return len(self.offsets) - 1

    def keys(self, start: int = 0, stop: int | None = None) -> pa.Array:
        """Keys `start:stop` in hash order, without a copy.

        Raises:
            FormatError: The stored keys are not what was written.
        """
        stop = len(self) if stop is None else stop
        if self.integers is not None:
            buffers = [None, pa.py_buffer(self.integers.rows(start, stop))]
            return pa.Array.from_buffers(pa.int64(), stop - start, buffers)
        assert self.offsets is not None
        assert self.text is not None
        offsets = self.offsets.rows(start, stop + 1)
        if 0 <= offsets[0] <= offsets[-1] <= len(self.text):
            self.text.rows(int(offsets[0]), int(offsets[-1]))
        # Arrow trusts offsets: without a full check, bad ones would crash it later.
        return self._text(pa.large_string(), offsets, full_check=True)

    def _text(self, kind: pa.DataType, offsets: NDArray[np.int64], full_check: bool) -> pa.Array:
        """The string keys between `offsets` as an array of `kind`, without a copy."""
        assert self.text is not None
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self.text.unchecked)]
        try:
            array = pa.Array.from_buffers(kind, len(offsets) - 1, buffers)
            array.validate(full=full_check)
        except pa.ArrowInvalid as e:
            raise FormatError(f"{self.path}: the string keys are damaged ({e})") from e
        return array

    def lookup(
        self, queries: pa.Array | NDArray[np.int64], codes: PagedArray, unknown: NDArray[np.int64]
    ) -> tuple[int, NDArray[np.int64]]:
        """How many keys are not there, and the codes of each, [n, J].

        Integer keys go through the compiled extension where it is there.

        Args:
            queries: [n] canonical keys of the bank's type; integers also as numpy array.
            codes: [users, J], C-contiguous, of the bank.
            unknown: [J], the codes of a key that is not there: one more than any stored code.

        Raises:
            FormatError: What would have to be read is damaged; names the file.
        """
        out = np.empty((len(queries), len(unknown)), np.int64)
        if (native := self._native(codes, unknown)) is not None:
            numbers = queries if isinstance(queries, np.ndarray) else queries.to_numpy()
            missing = native(np.ascontiguousarray(numbers), out)
            if missing >= 0:
                return missing, out
            # Something is damaged; below it is found again, and named.
        rows = self.find(pa.array(queries) if isinstance(queries, np.ndarray) else queries)
        known = rows >= 0
        there = rows[known]
        codes.check(there)
        found = codes.unchecked.take(there, axis=0)
        if (none := found >= unknown.astype(found.dtype)).any():
            raise FormatError(
                f"{codes.path}: holds the codes {found[none.any(1)][0].tolist()}, which must be "
                f"below {unknown.tolist()}; restore the bank from a copy"
            )
        out[:] = unknown
        out[known] = found
        return len(rows) - len(there), out

    def _native(
        self, codes: PagedArray, unknown: NDArray[np.int64]
    ) -> Callable[[NDArray[np.int64], NDArray[np.int64]], int] | None:
        """The compiled look-up in these arrays, or None where there is none."""
        if self._bound and self._bound[0] is codes and self._bound[1] is unknown:
            known: Callable[..., int] | None = self._bound[2]
            return known
        bound: Callable[..., int] | None = None
        # None also in an extension that was built before pages were checked.
        compiled = getattr(_extension.load(), "CheckedBankIndex", None)
        if compiled is not None and self.integers is not None and len(self):
            bound = compiled(
                keys=_address(self.integers),
                users=len(self),
                directory=_address(self.directory),
                row_bytes=self.directory.unchecked.itemsize,
                bits=(len(self.directory) - 1).bit_length() - 1,
                codes=_address(codes),
                code_bytes=codes.unchecked.itemsize,
                fields=len(unknown),
                unknown=unknown.ctypes.data,
            ).lookup
        self._bound[:] = codes, unknown, bound
        return bound

    def find(self, queries: pa.Array) -> NDArray[np.int64]:
        """Row of each key, [len(queries)]; -1 where the bank has no such key.

        Args:
            queries: Canonical keys of the bank's key type.

        Raises:
            FormatError: The directory or the string offsets point outside their files.
        """
        rows = np.full(len(queries), -1, np.int64)
        if len(self):
            for i in range(0, len(queries), _CHUNK):
                rows[i : i + _CHUNK] = self._find(queries[i : i + _CHUNK])
        return rows

    def _find(self, queries: pa.Array) -> NDArray[np.int64]:
        rows = np.full(len(queries), -1, np.int64)
        hashes = hash_keys(queries)
        bits = (len(self.directory) - 1).bit_length() - 1
        bucket = (hashes >> np.uint64(64 - bits)).astype(np.int64)
        self.directory.check(bucket, 2)
        start = self.directory.unchecked[bucket].astype(np.int64)
        end = self.directory.unchecked[bucket + 1].astype(np.int64)
        if ((start > end) | (end > len(self))).any():
            raise FormatError(f"{self.path}: the hash directory is damaged; restore the bank")

        stored = self.integers if self.integers is not None else self.hashes
        assert stored is not None
        wanted: NDArray[Any] = queries.to_numpy() if self.integers is not None else hashes
        # windows[r] is stored[r : r + width]. What it shows of the next bucket does no harm.
        width = min(_WINDOW, len(self))
        shape = (len(self) - width + 1, width)
        values = stored.unchecked
        windows = np.ndarray(shape, values.dtype, values.data, strides=values.strides * 2)
        left = np.flatnonzero(start < end)
        while len(left):
            first = np.minimum(start[left], shape[0] - 1)
            stored.check(first, width)
            query, place = np.nonzero(windows[first] == wanted[left, None])
            query, found = left[query], first[query] + place
            if self.integers is None:  # equal hashes are not yet equal keys
                same = self._same_text(found, queries.take(pa.array(query)))
                query, found = query[same], found[same]
            rows[query] = found
            start[left] += width
            left = left[(rows[left] < 0) & (start[left] < end[left])]
        return rows

    def _same_text(self, rows: NDArray[np.int64], queries: pa.Array) -> NDArray[np.bool_]:
        """Whether the string key at each row is the query."""
        assert self.offsets is not None
        assert self.text is not None
        self.offsets.check(rows, 2)
        offsets = self.offsets.unchecked
        start, end = offsets[rows], offsets[rows + 1]
        if ((start < 0) | (end < start) | (end > len(self.text))).any():
            raise FormatError(f"{self.path}: the string keys' offsets are damaged")
        self.text.check(start, end - start)
        # As bytes: an altered key may not be UTF-8, and then it just differs.
        stored = self._text(pa.large_binary(), offsets, full_check=False).take(pa.array(rows))
        return _equal(stored, queries.cast(pa.large_binary()))


def _address(array: PagedArray) -> tuple[int, int, int, int]:
    """Where a compiled look-up finds an array: values, bytes, sums (0: none) and pages seen."""
    sums = 0 if array.sums is None else array.sums.ctypes.data
    values = array.unchecked
    return values.ctypes.data, values.nbytes, sums, array.seen.ctypes.data


def _equal(a: pa.Array, b: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(pc.equal(a, b).to_numpy(zero_copy_only=False), dtype=np.bool_)

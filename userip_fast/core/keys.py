"""User and item keys: one canonical form, one stable hash, one order.

Users are always kept in the order of their key's hash (ties by the key itself). The shard of a user
is the top 8 bits of that hash, so hash order is also shard order: the data layer, the EM sums and
the feature bank all rely on this one order. A hash value never changes between releases or
machines: banks on disk and resumed runs depend on it. Collisions are harmless, as callers compare
keys.

Source: splitmix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.errors import DataError

NUM_SHARDS = 256
"""Virtual shards over which sums of users are reduced in a fixed order."""


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64: a bijection of 64-bit words that spreads every input bit over all output bits."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def canonical_keys(keys: Any) -> pa.Array:
    """Keys as one Arrow array of int64 or large_string, without nulls.

    Args:
        keys: A list, numpy array (integers, str) or Arrow (chunked) array of integers or strings.

    Raises:
        DataError: A key is null, or the keys are not all integers (within int64) or all strings.
    """
    try:
        array = keys if isinstance(keys, pa.Array | pa.ChunkedArray) else pa.array(keys)
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if isinstance(
            array, pa.ChunkedArray
        ):  # Arrow keeps several chunks where one would overflow
            array = pa.concat_arrays(array.cast(pa.large_string()).chunks)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        integer = pa.types.is_integer(array.type)
        text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
        if not (integer or text or (pa.types.is_null(array.type) and len(array) == 0)):
            raise DataError(f"keys must be integers or strings, these are {array.type}")
        array = array.cast(pa.large_string() if text else pa.int64())
    except pa.ArrowInvalid as e:
        raise DataError(f"keys must be all integers within int64 or all strings: {e}") from e
    if array.null_count:
        raise DataError(f"keys must not be null, {array.null_count} of {len(array)} are")
    return array


def hash_keys(keys: Any) -> NDArray[np.uint64]:
    """Stable 64-bit hashes of keys, [n].

    An integer key hashes as its int64 value (a bijection, so no two integers collide); a string by
    its UTF-8 bytes, eight at a time, then its length.

    Args:
        keys: Whatever `canonical_keys` takes.

    Raises:
        DataError: See `canonical_keys`.
    """
    array = canonical_keys(keys)
    if pa.types.is_integer(array.type):
        return mix64(array.to_numpy(zero_copy_only=False).view(np.uint64))
    return _hash_strings(array)


def _hash_strings(array: pa.Array) -> NDArray[np.uint64]:
    """One pass per 8-byte word of the longest string, over the strings that reach that far."""
    n = len(array)
    _, offset_buffer, data = array.buffers()
    if n == 0:
        return np.zeros(0, np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + n + 1]
    start, length = offsets[:-1] - offsets[0], np.diff(offsets)
    used = np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]]
    padded = np.concatenate([used, np.zeros(8, np.uint8)])
    # words[i] is the 8 bytes from position i on, little-endian whatever the machine
    words = np.ndarray((len(used) + 1,), "<u8", padded.data, strides=(1,))
    h = np.zeros(n, np.uint64)
    active = np.flatnonzero(length)
    position = 0
    while len(active):
        left = length[active] - position
        word = words[start[active] + position].astype(np.uint64)
        beyond = np.uint64(8) * (8 - np.minimum(left, 8)).astype(np.uint64)
        word = (word << beyond) >> beyond  # bytes of the next string do not count
        h[active] = mix64(h[active] ^ word)
        active = active[left > 8]
        position += 8
    return mix64(h ^ length.astype(np.uint64))


def seeded(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Hashes drawn anew by `seed`: random bits that depend on a key and the seed alone.

    The hash is mixed once more first: an integer key's hash and the mixed seed are the same
    function of small integers, and key 1 with seed 2 must not be key 2 with seed 1.
    """
    return mix64(mix64(hashes) ^ mix64(np.array([seed], np.int64).view(np.uint64)))


def shard_of(hashes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The virtual shard, 0 to 255, of each hash: its top 8 bits."""
    return (np.asarray(hashes, np.uint64) >> np.uint64(56)).astype(np.uint8)


def key_order(keys: pa.Array, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The permutation that sorts by hash, ties by key (strings by code points); stable.

    Args:
        keys: [n] canonical keys.
        hashes: [n] their `hash_keys`.
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    if (ordered[1:] == ordered[:-1]).any():
        table = pa.table({"hash": hashes, "key": keys})
        by = [("hash", "ascending"), ("key", "ascending")]
        order = pc.sort_indices(table, sort_keys=by).to_numpy().astype(np.int64)
    return order

"""Users on their way into a bank: dealt out on disk by their hash, then taken back sorted.

Memory does not depend on how many there are: some wait to be written, and one part of 256 (by the
hash's top bits) is sorted at a time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.bank.index import in_hash_order
from userip_fast.core.files import storage_errors
from userip_fast.core.keys import NUM_SHARDS, shard_of

WAITING_USERS = 1 << 17  # in memory, at most, before they go to disk


@dataclass(frozen=True)
class Users:
    """Some users of a bank.

    Attributes:
        keys: [n] canonical keys.
        hashes: [n] their hashes.
        values: [n, ...] what is known of them, by name: `codes`, in the bank's code type, and maybe
            `probabilities` and `profiles`. See `userip_fast.bank.layout`.
    """

    keys: pa.Array
    hashes: NDArray[np.uint64]
    values: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: slice) -> Users:
        values = {name: x[rows] for name, x in self.values.items()}
        return Users(self.keys[rows], self.hashes[rows], values)

    def take(self, rows: NDArray[np.int64]) -> Users:
        values = {name: x[rows] for name, x in self.values.items()}
        return Users(self.keys.take(pa.array(rows)), self.hashes[rows], values)

    @classmethod
    def concat(cls, blocks: Sequence[Users]) -> Users:
        """One or more blocks, of one key type and all with the same values."""
        if len(blocks) == 1:
            return blocks[0]
        return cls(
            pa.concat_arrays([b.keys for b in blocks]),
            np.concatenate([b.hashes for b in blocks]),
            {n: np.concatenate([b.values[n] for b in blocks]) for n in blocks[0].values},
        )

    def in_hash_order(self) -> Users:
        """Sorted by hash, ties by key.

        Raises:
            DataError: A user occurs twice.
        """
        if (self.hashes[1:] > self.hashes[:-1]).all():  # as inference delivers them
            return self
        return self.take(in_hash_order("user_keys", self.keys, self.hashes))


class Spool:
    """Users added in any order, given back in parts that follow each other in hash order.

    Args:
        folder: Where a temporary folder is made once users do not fit into memory; a name that
            `generations` sweeps up after a kill.
    """

    def __init__(self, folder: Path) -> None:
        self._parent = folder
        self._folder: Path | None = None
        self._waiting: list[Users] = []
        self._count = 0
        self.first: Users | None = None
        """Nobody, in the types of those that were added."""

    def add(self, users: Users) -> None:
        if self.first is None:
            self.first = users[:0]
        for start in range(0, len(users), WAITING_USERS):
            some = users[start : start + WAITING_USERS]
            if self._count + len(some) > WAITING_USERS:
                self._deal()
            self._waiting.append(some)
            self._count += len(some)

    def parts(self, others: int = 0) -> Iterator[tuple[int, int, Users]]:
        """(first shard, shard after the last, their users unsorted) until all shards were given.

        Args:
            others: How many users of a bank come to these, evenly: parts are as small as for all.
        """
        if self.first is None:
            return
        if self._folder is None:
            users = Users.concat([self.first, *self._waiting])
            shards = shard_of(users.hashes)
            step = NUM_SHARDS * WAITING_USERS // max(len(users) + others, 1)
            step = min(max(step, 1), NUM_SHARDS)
            for first in range(0, NUM_SHARDS, step):
                stop = min(first + step, NUM_SHARDS)
                yield first, stop, users.take(np.flatnonzero((shards >= first) & (shards < stop)))
            return
        self._deal()
        for shard in range(NUM_SHARDS):
            yield shard, shard + 1, self._read(shard)

    def clear(self) -> None:
        """Forgets everything."""
        self._waiting.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _deal(self) -> None:
        if not self._waiting:
            return
        users = Users.concat(self._waiting)
        self._waiting.clear()
        self._count = 0
        shards = shard_of(users.hashes)
        if (shards[1:] < shards[:-1]).any():
            order = np.argsort(shards, kind="stable")
            users, shards = users.take(order), shards[order]
        bounds = np.searchsorted(shards, np.arange(NUM_SHARDS + 1))
        with storage_errors(self._parent):
            if self._folder is None:
                made = tempfile.mkdtemp(dir=self._parent, prefix=".gen-000000.", suffix=".tmp")
                self._folder = Path(made)
            for shard in np.flatnonzero(np.diff(bounds)).tolist():
                table = _to_table(users[bounds[shard] : bounds[shard + 1]])
                with (
                    open(self._folder / f"{shard}", "ab") as file,
                    pa.ipc.new_stream(file, table.schema) as writer,
                ):
                    writer.write_table(table)

    def _read(self, shard: int) -> Users:
        assert self.first is not None
        assert self._folder is not None
        path, found = self._folder / f"{shard}", [self.first]
        with storage_errors(path):
            if path.exists():
                with pa.OSFile(str(path)) as file:
                    while file.tell() < file.size():
                        for batch in pa.ipc.open_stream(file):
                            found.append(_from_batch(batch, self.first))
                path.unlink()
        return Users.concat(found)


def _to_table(users: Users) -> pa.Table:
    values = {name: _rows(x) for name, x in users.values.items()}
    return pa.table({"key": users.keys, "hash": pa.array(users.hashes), **values})


def _rows(values: NDArray[Any]) -> pa.Array:
    """[n, ...] as n texts of bytes."""
    kind = pa.binary(values.shape[1] * values.itemsize)
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, buffer])


def _from_batch(batch: pa.RecordBatch, like: Users) -> Users:
    def values(name: str, kind: NDArray[Any]) -> NDArray[Any]:
        buffer = batch[name].buffers()[1]
        return np.frombuffer(buffer, kind.dtype, batch.num_rows * kind.shape[1]).reshape(
            -1, kind.shape[1]
        )

    known = {name: values(name, kind) for name, kind in like.values.items()}
    return Users(batch["key"], batch["hash"].to_numpy(), known)

"""A Parquet log larger than memory, sorted into histories on disk.

Two passes, each of bounded memory. The first checks rows batch by batch and deals them out into
parts, by the top bits of the user key's hash. The second sorts each part into histories. Parts
follow each other in hash order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from userip_fast.core.errors import DataError
from userip_fast.core.files import sha256_file, write_json
from userip_fast.core.keys import hash_keys
from userip_fast.core.sums import sealed
from userip_fast.data.arrow import combine, to_numpy
from userip_fast.data.build import nobody_left
from userip_fast.data.filelist import File
from userip_fast.data.filters import RowFilter
from userip_fast.data.histories import (
    Items,
    Rows,
    Rules,
    first_rows,
    histories,
    items_of_catalogue,
    items_of_log,
    one_key_type,
)
from userip_fast.data.interactions import Interactions, ReadAs
from userip_fast.data.report import NUM_EXAMPLES, BadRows, RowChecks
from userip_fast.data.rows import Columns, check_rows
from userip_fast.data.sources import Part, Source, check_expansion, validated
from userip_fast.data.text import TextTemplate
from userip_fast.data.textfiles import refuse_columns

_BATCH_ROWS = 1 << 16
_PART_ROWS = 1 << 16  # rows of a part, on average at most
_MAX_BITS = 13
_WAITING_ROWS = 1 << 17  # dealt out in memory before they are appended to the parts' files,
_WAITING_ROWS_PART = 512  # or so many per part


class Sorter:
    """The two passes."""

    def __init__(
        self,
        files: Sequence[File],
        name: str,
        catalogue: Source | None,
        columns: Columns,
        template: TextTemplate,
        filter: str | None,
        rules: Rules,
    ) -> None:
        self.files, self.name, self.columns, self.rules = files, name, columns, rules
        self.template, self.catalogue = template, catalogue
        self.predicate = RowFilter(filter) if filter is not None else None
        self.filter_columns = self.predicate.columns if self.predicate else ()
        self.checks = RowChecks()
        if catalogue is None:
            self.items = self._items_of_log()
        else:
            self.items = items_of_catalogue(catalogue, columns.item, template, self.checks)
        self.rows_read = self.rows_filtered = 0
        self.rows = self._count_rows()
        self.bits = max(0, min(_MAX_BITS, (self.rows // _PART_ROWS).bit_length()))
        self.waiting: list[list[pa.RecordBatch]] = [[] for _ in range(1 << self.bits)]

    def _count_rows(self) -> int:
        rows = 0
        for file in self.files:
            try:
                rows += pq.read_metadata(file.path).num_rows
            except (OSError, pa.ArrowException) as e:
                raise DataError(f"interactions: {file.path} cannot be read: {e}") from e
        return rows

    def _batches(self, names: Sequence[str]) -> Iterator[Source]:
        """The log in batches, each row traceable to its file."""
        for file, root, *_ in self.files:
            try:
                data = ds.dataset(str(file), partitioning="hive", partition_base_dir=str(root))
                refuse_columns(names, data.schema.names, file)
                check_expansion(file, names, _BATCH_ROWS)
                done = 0
                for batch in data.to_batches(
                    columns=list(names),
                    batch_size=_BATCH_ROWS,
                    batch_readahead=2,
                    fragment_readahead=1,
                    use_threads=False,
                ):
                    table = pa.Table.from_batches([batch])
                    part = Part(str(file), 0, done + 1)
                    yield validated(Source(self.name, table, (part,), True))
                    done += batch.num_rows
            except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
                raise DataError(f"interactions: {file} cannot be read: {e}") from e

    def _kept(self, log: Source) -> NDArray[np.int64]:
        if self.predicate is None:
            return np.arange(log.table.num_rows)
        return np.flatnonzero(self.predicate.mask(log.table))

    def _items_of_log(self) -> Items:
        """Each item by the first of its rows that has a text, or its first row."""
        names = [self.columns.item, *self.template.columns, *self.filter_columns]
        found = []
        for log in self._batches(list(dict.fromkeys(names))):
            keys = log.keys(self.columns.item)
            found.append(items_of_log(log, keys, self._kept(log), self.template))
            if len(found) == 64:
                found = [_combine(found)]
        return _combine(found)

    def write(self, folder: Path, key: str, read_as: ReadAs) -> None:
        c = self.columns
        wanted = [c.user, c.item, *(x for x in (c.rating, c.time) if x), *self.filter_columns]
        waiting, most = 0, max(_WAITING_ROWS, _WAITING_ROWS_PART << self.bits)
        for log in self._batches(list(dict.fromkeys(wanted))):
            waiting += self._deal(log)
            if waiting >= most:
                self._append(folder)
                waiting = 0
        self._append(folder)
        if self.checks.counts and not self.rules.skip:
            raise self.checks.error()
        parts: list[dict[str, Any]] = []
        counts = np.zeros(len(self.items.keys), np.int64)[~self.items.empty]
        ratings: dict[float, int] = {}
        short: list[Any] = []
        short_users = 0
        for at in range(1 << self.bits):
            found, few = self._sort(folder / f"part-{at:04d}.rows")
            path = folder / f"part-{at:04d}.arrow"
            _write_part(path, found)
            parts.append({"users": found.num_users, "sha256": sha256_file(path)})
            counts += np.bincount(found.item_index, minlength=len(counts))
            if found.rating is not None:
                for value, count in zip(*np.unique(found.rating, return_counts=True)):
                    ratings[float(value)] = ratings.get(float(value), 0) + int(count)
            short += few[: max(0, NUM_EXAMPLES - len(short))].to_pylist()
            short_users += len(few)
        pa.default_memory_pool().release_unused()  # it would keep what sorting took
        report = BadRows(
            rows_read=self.rows_read + self.checks.rows_lost,
            rows_filtered=self.rows_filtered,
            counts=self.checks.counts,
            examples=self.checks.examples(),
            short_users=short_users,
            short_examples=tuple(short),
            min_history=self.rules.min_history,
        )
        if sum(part["users"] for part in parts) == 0:
            raise nobody_left(self.name, report)
        there = pa.array(~self.items.empty)
        table = self.items.table.filter(there)
        for name, column in (
            ("__key", self.items.keys.filter(there)),
            ("__text", self.items.text.filter(there)),
            ("__count", pa.array(counts)),
        ):
            table = table.append_column(name, column)
        pq.write_table(table, folder / "items.parquet")
        about = {
            "key": key,
            "events": int(counts.sum()),
            "ordered": c.time is not None,
            "read_as": asdict(read_as),
            "ratings": [sorted(ratings), [ratings[v] for v in sorted(ratings)]],
            "report": asdict(report),
            "items_sha256": sha256_file(folder / "items.parquet"),
            "parts": parts,
        }
        write_json(folder / "manifest.json", sealed(about))

    def _deal(self, log: Source) -> int:
        """Checks a batch and puts its rows with the part of their user; place -1 marks bad ones."""
        c = self.columns
        rows = self._kept(log)
        self.rows_read += log.table.num_rows
        self.rows_filtered += log.table.num_rows - len(rows)
        users, item_keys = log.keys(c.user), log.keys(c.item).take(rows)
        if self.catalogue is not None:
            item_keys, self.items = one_key_type(log, self.catalogue, c.item, item_keys, self.items)
        checked = check_rows(log, rows, c, users.take(rows), item_keys, self.items, self.checks)
        place = np.full(log.table.num_rows, -1, np.int32)
        place[rows] = np.where(self.checks.bad, -1, checked.place)
        columns: dict[str, Any] = {"user": users, "place": place}
        for name, values in (("rating", checked.rating), ("time", checked.time)):
            if values is not None:
                columns[name] = np.zeros(len(place), values.dtype)
                columns[name][rows] = values
        valid = to_numpy(pc.is_valid(users))
        table = pa.table(columns).filter(pa.array(valid))
        part = np.zeros(table.num_rows, np.int64)
        if self.bits:
            hashes = hash_keys(table["user"])
            part = (hashes >> np.uint64(64 - self.bits)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        table = table.take(order)
        bounds = np.searchsorted(part[order], np.arange((1 << self.bits) + 1))
        for at in np.flatnonzero(np.diff(bounds)).tolist():
            own = table.slice(bounds[at], bounds[at + 1] - bounds[at]).combine_chunks()
            self.waiting[at] += own.to_batches()
        return int(table.num_rows)

    def _append(self, folder: Path) -> None:
        for at, batches in enumerate(self.waiting):
            if batches:
                whole = pa.Table.from_batches(batches).combine_chunks()
                with (
                    open(folder / f"part-{at:04d}.rows", "ab") as file,
                    pa.ipc.new_stream(file, whole.schema) as writer,
                ):
                    writer.write_table(whole)
                batches.clear()

    def _sort(self, path: Path) -> tuple[Interactions, pa.Array]:
        tables = []
        if path.exists():
            with pa.OSFile(str(path)) as file:
                while file.tell() < file.size():
                    tables.append(pa.ipc.open_stream(file).read_all())
            path.unlink()
        if tables:
            table = pa.concat_tables(tables, promote_options="permissive")
        else:
            table = pa.table({"user": pa.array([], pa.int64()), "place": pa.array([], pa.int32())})
        users = combine(table["user"])
        place = table["place"].to_numpy()
        good = np.flatnonzero(place >= 0)
        c = self.columns

        def column(name: str, wanted: str | None, kind: Any) -> NDArray[Any] | None:
            if wanted is None:
                return None
            return table[name].to_numpy()[good] if tables else np.zeros(0, kind)

        rows = Rows(
            place[good],
            column("rating", c.rating, np.float32),
            column("time", c.time, np.int64),
        )
        return histories(users.unique(), users.take(good), rows, self.items, self.rules)


def _combine(found: list[Items]) -> Items:
    """The items of several batches as one: the first that has a text, else the first."""
    if len(found) == 1:
        return found[0]
    keys = pa.concat_arrays([f.keys for f in found])
    text = pa.concat_arrays([f.text for f in found])
    filled = np.flatnonzero(to_numpy(pc.not_equal(text, "")))
    candidates = np.concatenate([filled, np.arange(len(keys))])
    kept = candidates[first_rows(keys.take(candidates))]
    text = text.take(kept)
    table = pa.concat_tables([f.table for f in found]).take(kept)
    return Items(keys.take(kept), text, to_numpy(pc.equal(text, "")), table)


def _write_part(path: Path, found: Interactions) -> None:
    offsets = pa.array(found.offsets, pa.int64())
    columns = {
        "user": found.user_keys,
        "events": pa.array(found.history_lengths),
        "item": pa.LargeListArray.from_arrays(offsets, pa.array(found.item_index)),
    }
    for name, values in (("rating", found.rating), ("time", found.time)):
        if values is not None:
            columns[name] = pa.LargeListArray.from_arrays(offsets, pa.array(values))
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)

"""Logs larger than memory: Parquet sorted into histories on disk, then read a block at a time.

`userip_fast.data.sorting` deals the users out into parts that follow each other in hash order, so
users `start:stop` of a stream are those of `read_interactions`.

    WORK/histories/
      manifest.json     what was read (names and SHA-256 of files; arguments) and what was found
      items.parquet     the items, which are held in memory
      part-NNNN.arrow   per user: key, items, ratings, times
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from userip_fast.core.errors import DataError, FormatError
from userip_fast.core.files import atomic_dir, lock_file, read_json, sha256_file, sweep_leftovers
from userip_fast.core.keys import hash_keys
from userip_fast.core.sums import check_seal, kept_sum
from userip_fast.data.arrow import combine, to_numpy
from userip_fast.data.build import read_items
from userip_fast.data.filelist import File, TableLike, is_path, list_files, name_of
from userip_fast.data.histories import Rules
from userip_fast.data.interactions import Interactions, ReadAs
from userip_fast.data.memory import as_arrow
from userip_fast.data.read import DEFAULT_TEXT
from userip_fast.data.report import BadRow, BadRows
from userip_fast.data.rows import Columns
from userip_fast.data.sorting import Sorter
from userip_fast.data.text import TextTemplate
from userip_fast.data.textfiles import text_form

_VERSION = 3
_KEYS = (pa.int64(), pa.large_string())
_DAMAGE = (ArithmeticError, LookupError, ValueError, OSError, pa.ArrowException)


class InteractionStream:
    """Histories on disk; stands in for `Interactions` in `fit` and `Model.infer`.

    Only items and, per part, a number are in memory. Make it with `stream_interactions`.

    Attributes:
        num_users, num_items, num_events, item_keys, item_text, items, ordered, constant_rating,
        report, read_as: As in `Interactions`.
        digest: Of all histories.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_json(folder / "manifest.json")
        try:
            check_seal(folder / "manifest.json", manifest)
            self._read_manifest(folder, manifest)
        except FormatError:
            raise
        except (*_DAMAGE, AttributeError, TypeError) as e:
            raise FormatError(f"{folder}: is damaged ({e!r}); delete it to read anew") from e

    def _read_manifest(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.key: str = manifest["key"]
        self.num_events: int = manifest["events"]
        self.ordered: bool = manifest["ordered"]
        self.read_as = ReadAs(**manifest["read_as"])
        report = dict(manifest["report"])
        report["examples"] = tuple(BadRow(**row) for row in report["examples"])
        report["short_examples"] = tuple(report["short_examples"])
        self.report = BadRows(**report)
        self._parts: list[dict[str, Any]] = list(manifest["parts"])
        numbers = [self.num_events, *(part["users"] for part in self._parts)]
        if not all(type(n) is int and n >= 0 for n in numbers) or type(self.ordered) is not bool:
            raise ValueError(f"numbers of events and users, and whether ordered: {numbers}")
        self._first = [0, *accumulate(part["users"] for part in self._parts)]
        self.digest = hashlib.sha256(
            "".join([manifest["items_sha256"], *(p["sha256"] for p in self._parts)]).encode()
        ).hexdigest()
        if sha256_file(folder / "items.parquet") != manifest["items_sha256"]:
            raise FormatError(f"{folder / 'items.parquet'}: altered; delete {folder}")
        self.items = pq.read_table(folder / "items.parquet")
        self.item_keys = self.items["__key"].combine_chunks()
        self.item_text = self.items["__text"].combine_chunks()
        kinds = _KEYS, (pa.large_string(),), (pa.int64(),)
        for name, types in zip(("__key", "__text", "__count"), kinds):
            column = self.items[name]
            if column.type not in types or column.null_count:
                raise ValueError(f"{name} of the items: {column.type}, {column.null_count} nulls")
        self._item_counts: NDArray[np.int64] = self.items["__count"].to_numpy()
        self.items = self.items.drop_columns(["__key", "__text", "__count"])
        values, counts = (np.array(x, t) for x, t in zip(manifest["ratings"], (float, np.int64)))
        if values.ndim != 1 or values.shape != counts.shape or not np.isfinite(values).all():
            raise ValueError(f"ratings: {manifest['ratings']}")
        self.constant_rating: float | None = float(values[0]) if len(values) == 1 else None
        self._ratings = values, counts
        self._opened: dict[int, Interactions] = {}

    @property
    def num_users(self) -> int:
        return int(self._first[-1])

    @property
    def num_items(self) -> int:
        return len(self.item_keys)

    @property
    def rated(self) -> bool:
        """Whether there are ratings that vary."""
        return len(self._ratings[0]) > 1

    @property
    def rating_note(self) -> str | None:
        """See `Interactions`."""
        if self.constant_rating is None:
            return None
        return f"every rating is {self.constant_rating:g}: a constant rating counts as no rating"

    def rating_counts(self) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
        """See `Interactions`."""
        return self._ratings if self.rated else None

    def item_counts(self) -> NDArray[np.int64]:
        """See `Interactions`."""
        return self._item_counts

    def users(self, start: int, stop: int) -> Interactions:
        """Histories of users `start:stop`, in memory."""
        pieces = []
        at = max(bisect_right(self._first, start) - 1, 0)
        while at < len(self._parts) and self._first[at] < stop:
            first = self._first[at]
            part = self._part(at)
            pieces.append(part.users(max(start - first, 0), min(stop - first, part.num_users)))
            at += 1
        return Interactions.concat(pieces) if pieces else self._part(0).users(0, 0)

    def head_users(self, n: int) -> Interactions:
        """The first `n` users in hash order, in memory."""
        return self.users(0, min(n, self.num_users))

    def first_at(self, hash_: int) -> int:
        """The first user, in hash order, whose key hash is at least `hash_`."""
        bits = (len(self._parts) - 1).bit_length()
        at = hash_ >> (64 - bits) if bits else 0
        if at >= len(self._parts) or hash_ >= 1 << 64:
            return self.num_users
        hashes = hash_keys(self._part(at).user_keys)
        return int(self._first[at]) + int(np.searchsorted(hashes, np.uint64(hash_)))

    def _part(self, at: int) -> Interactions:
        """A part, verified; the last few stay in memory."""
        if (found := self._opened.get(at)) is not None:
            return found
        path = self.folder / f"part-{at:04d}.arrow"
        try:
            if sha256_file(path) != self._parts[at]["sha256"]:
                raise FormatError(f"{path}: altered; delete {self.folder} to read the log anew")
            with pa.OSFile(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
            self._check_part(table, self._parts[at]["users"])
        except FormatError:
            raise
        except _DAMAGE as e:
            raise FormatError(f"{path}: cannot be read ({e}); delete {self.folder}") from e
        columns = {name: combine(table[name]) for name in table.column_names}
        lengths = columns["events"].to_numpy()
        item, rating, time = (
            _values(columns[name]) if name in columns else None
            for name in ("item", "rating", "time")
        )
        assert item is not None
        found = Interactions(
            user_keys=columns["user"],
            item_keys=self.item_keys,
            item_text=self.item_text,
            items=self.items,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            item_index=item,
            rating=rating if self.rated else None,
            time=time,
            ordered=self.ordered,
            constant_rating=self.constant_rating,
            report=self.report,
            read_as=self.read_as,
        )
        while len(self._opened) > 1:
            self._opened.pop(next(iter(self._opened)), None)
        self._opened[at] = found
        return found

    def _check_part(self, table: pa.Table, users: int) -> None:
        """Raises ValueError, or what Arrow raises, where a part is not as `_write_part` writes."""
        kinds = {"user": _KEYS, "events": (pa.int64(),), "item": (pa.large_list(pa.int32()),)}
        if self.read_as.rating is not None:
            kinds["rating"] = (pa.large_list(pa.float32()),)
        if self.read_as.time is not None:
            kinds["time"] = (pa.large_list(pa.int64()),)
        table.validate(full=True)
        if table.column_names != list(kinds) or len(table) != users:
            raise ValueError(f"columns {table.column_names} of {len(table)} users")
        for name, types in kinds.items():
            if table[name].type not in types or table[name].null_count:
                raise ValueError(f"{name}: {table[name].type}, {table[name].null_count} nulls")
        for name in list(kinds)[2:]:
            if not pc.list_value_length(table[name]).equals(table["events"]):
                raise ValueError(f"{name}: not as many values as users have events")
        item = to_numpy(combine(table["item"]).flatten())
        if len(item) and not 0 <= item.min() <= item.max() < self.num_items:
            raise ValueError(f"item: must be below {self.num_items}")

    def __repr__(self) -> str:
        return (
            f"InteractionStream({str(self.folder)!r}, {self.num_users:,} users, "
            f"{self.num_items:,} items, {self.num_events:,} events)"
        )


def _values(lists: pa.Array) -> NDArray[Any]:
    return to_numpy(lists.flatten())


def stream_interactions(
    interactions: TableLike,
    items: TableLike | None = None,
    *,
    work: str | Path,
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
) -> InteractionStream:
    """`read_interactions` for a log larger than memory: the same users, histories and checks.

    Args:
        interactions: A Parquet file, a folder of such, or a list of these.
        items: As for `read_interactions`; items are held in memory.
        work: Folder for the sorted histories, about the size of the log. Files of the same content
            that were read into it before, with the same arguments, are not sorted again. (A file's
            sum is kept by its identity, size and times: see `userip_fast.core.sums`.) Processes
            that share the folder wait for the first.

    The other arguments and what is raised are those of `read_interactions`; also:

    Raises:
        StorageError: `work` cannot be written.
    """
    rules = Rules(on_bad, min_history, seed)
    text_form(sep, encoding, header)
    if not is_path(interactions):
        raise DataError(
            f"interactions: a {type(interactions).__name__} is in memory; only Parquet files are "
            "read as a stream. Use read_interactions"
        )
    files = list_files(interactions, "interactions")
    if files[0].kind != "parquet":
        raise DataError(
            f"interactions: {name_of(interactions)} is not Parquet; only Parquet is read as a "
            "stream. Convert it, or read it into memory"
        )
    read_as = ReadAs(user, item, rating, time, text, filter, min_history)
    items_form = replace(text_form(None, encoding, items_header, "items_header"), likely=sep)
    contents = [_contents(files)]
    if items is not None and is_path(items):
        contents.append(_contents(list_files(items, "items")))
    elif items is not None:
        items = as_arrow(items, None, "the items table")
        contents.append([("", _table_sum(items))])
    arguments = [_VERSION, asdict(read_as), on_bad, seed, contents, asdict(items_form)]
    key = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()
    target = Path(work) / "histories"
    if (found := _sorted_before(target, key, read_as)) is not None:
        return found
    with lock_file(target.parent / "LOCK", math.inf, ""):
        if (found := _sorted_before(target, key, read_as)) is not None:
            return found
        sweep_leftovers(target.parent)
        columns = Columns(user, item, rating, time)
        template = TextTemplate(text)
        catalogue = None
        if items is not None:
            catalogue = read_items(items, item, template, items_form, rules.skip)
        name = name_of(interactions)
        sorter = Sorter(files, name, catalogue, columns, template, filter, rules)
        with atomic_dir(target) as tmp:
            sorter.write(tmp, key, read_as)
        return InteractionStream(target)


def _contents(files: Sequence[File]) -> list[tuple[str, str]]:
    """Folders, which may hold values of columns (`key=value`), and sum of each file."""
    found = []
    for file in files:
        try:
            folder = file.path.parent.relative_to(file.root).as_posix()
            found.append((folder, kept_sum(file.path)))
        except OSError as e:
            raise DataError(f"{file.path} cannot be read: {e}") from e
    return found


def _table_sum(table: pa.Table) -> str:
    """SHA-256 of a table in memory, in one piece whatever its chunks were."""
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _sorted_before(folder: Path, key: str, read_as: ReadAs) -> InteractionStream | None:
    """What `folder` holds, if it is whole and was made from what `key` says."""
    try:
        found = InteractionStream(folder)
    except FormatError:
        return None
    return found if (found.key, found.read_as) == (key, read_as) else None


__all__ = ["InteractionStream", "stream_interactions"]

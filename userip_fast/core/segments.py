"""The event table on disk: what an LM said of items' texts, in segments that are only ever added.

    EVENTS/<model>/000001-<SHA-256 of the file>.arrow
    EVENTS/<model>/LOCK     flock'ed by the one who reads texts with the LM and adds a segment

<model> is the beginning of the model's fingerprint: tables of several models lie beside each other,
and none is part of what a fingerprint covers. A segment is an Arrow file of one batch, a row for
each text under all W words that tell how an event went and all Z combinations of codes:

    text                    large_string
    tokens, weight          [W] int32, float64: tokens of the event, and its loss weight
    mean, step, offset      [W] float32, [W] float32, [W Z] int16:
                            log p(event | codes) = mean + step * offset

Sixteen bits are for what codes differ in, in steps of a 65,534th of an event's own range: a
thousandth of what they would cost in accuracy next to the mean. A segment has its sum for a name
and appears whole, so readers need no lock; one that is damaged is passed over with a warning, its
texts are read again, and the next writer removes it. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.core.errors import FormatError
from userip_fast.core.files import atomic_file, lock_file, open_regular, remove, sweep_leftovers

logger = logging.getLogger("userip_fast")

_FORMAT, _VERSION = "userip_fast.events", "1"
_MODEL_DIGITS = 32
_NAME = re.compile(r"(\d{6,})-([0-9a-f]{64})\.arrow")
_STEPS = 32767


@dataclass(frozen=True)
class Part:
    """N texts of an event table; shapes and types are in the module.

    Attributes:
        texts: [N] large_string.
        tokens, weight, mean, step: [N, W].
        offset: [N, W, Z].
    """

    texts: pa.Array
    tokens: NDArray[np.int32]
    weight: NDArray[np.float64]
    mean: NDArray[np.float32]
    step: NDArray[np.float32]
    offset: NDArray[np.int16]

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        tokens: NDArray[Any],
        weight: NDArray[Any],
        values: NDArray[np.float32],
    ) -> Part:
        """Keeps `values` [N, W, Z] in 16 bits.

        Raises:
            FormatError: A value is not finite.
        """
        if not np.isfinite(values).all():
            raise FormatError("an event table has finite values; the LM gave others")
        mean = values.mean(2, dtype=np.float64).astype(np.float32)
        apart = values.astype(np.float64) - mean[:, :, None]
        step = (np.abs(apart).max(2, initial=0.0) / _STEPS).astype(np.float32)
        unit = np.where(step > 0, step, 1).astype(np.float64)
        offset = np.rint(apart / unit[:, :, None]).clip(-_STEPS, _STEPS).astype(np.int16)
        return cls(
            pa.array(texts, pa.large_string()),
            tokens.astype(np.int32),
            weight.astype(np.float64),
            mean,
            step,
            offset,
        )

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Part:
        """Some of the texts."""
        arrays = (getattr(self, name)[rows] for name in _COLUMNS)
        return Part(self.texts.take(pa.array(rows, pa.int64())), *arrays)

    def values(self) -> NDArray[np.float32]:
        """[N, W, Z], log p(event | codes)."""
        apart = self.step[:, :, None] * self.offset.astype(np.float32)
        apart += self.mean[:, :, None]
        return np.asarray(apart, np.float32)

    @staticmethod
    def concat(parts: Sequence[Part]) -> Part:
        """At least one; a single one is not copied."""
        if len(parts) == 1:
            return parts[0]
        return Part(
            pa.concat_arrays([p.texts for p in parts]),
            *(np.concatenate([getattr(p, name) for p in parts]) for name in _COLUMNS),
        )

    def batch(self, model: str) -> pa.RecordBatch:
        """What a segment holds."""
        columns = {name: _rows(getattr(self, name)) for name in _COLUMNS}
        about = {"format": _FORMAT, "version": _VERSION, "model": model}
        schema = pa.schema(
            [("text", pa.large_string()), *((name, c.type) for name, c in columns.items())], about
        )
        return pa.record_batch([self.texts, *columns.values()], schema=schema)

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch, model: str, words: int, codes: int) -> Part:
        """The inverse of `batch`, without a copy.

        Raises:
            FormatError: It is of another model or version, or breaks a rule of the format.
        """
        about = {k.decode(): v.decode() for k, v in (batch.schema.metadata or {}).items()}
        if about != {"format": _FORMAT, "version": _VERSION, "model": model}:
            raise FormatError(f"is not of this model and version {_VERSION}, but {about}")
        empty = cls.of([], *(np.empty((0, words)),) * 2, np.empty((0, words, codes), np.float32))
        wanted = empty.batch(model).schema
        if not batch.schema.equals(wanted):
            raise FormatError(
                f"a table of {words} words and {codes} combinations of codes has columns "
                f"{dict(zip(wanted.names, map(str, wanted.types)))}, this one "
                f"{dict(zip(batch.schema.names, map(str, batch.schema.types)))}"
            )
        batch.validate(full=True)
        arrays = {}
        for name in _COLUMNS:
            values = batch[name].flatten()
            if batch[name].null_count or values.null_count:
                raise FormatError(f"column {name} has nulls")
            like = getattr(empty, name)
            arrays[name] = values.to_numpy().reshape(len(batch), *like.shape[1:])
        if batch["text"].null_count or len(batch["text"].unique()) < len(batch):
            raise FormatError("has a text twice, or a null")
        found = cls(batch["text"], **arrays)
        if not all(np.isfinite(x).all() for x in (found.weight, found.mean, found.step)):
            raise FormatError("has values that are not finite")
        if (found.tokens < 1).any() or (found.step < 0).any():
            raise FormatError("has a text without tokens, or negative steps")
        return found


_COLUMNS = ("tokens", "weight", "mean", "step", "offset")


def _rows(values: NDArray[Any]) -> pa.Array:
    """[n, ...] as n lists of a fixed size."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


class Segments:
    """The segments of one model's table, in one folder or in several.

    Args:
        folders: `EVENTS` folders to read from, whether they exist or not; of a text that is there
            more than once the first counts.
        model: The model's fingerprint.
        words, codes: W and Z.
        writes: Where to add to, one of `folders`; None for nowhere.
    """

    def __init__(
        self,
        folders: Sequence[str | os.PathLike[str]],
        model: str,
        words: int,
        codes: int,
        writes: str | os.PathLike[str] | None = None,
    ) -> None:
        key = re.sub(r"\W", "", model)[:_MODEL_DIGITS]
        self._folders = [Path(folder) / key for folder in folders]
        self.writes = None if writes is None else Path(writes) / key
        self.model, self.words, self.codes = model, words, codes
        self._seen: set[Path] = set()
        self._damaged: list[Path] = []

    def new(self) -> Iterator[Part]:
        """Segments that have not been seen yet, oldest first; damaged ones are passed over."""
        for folder in self._folders:
            names = os.listdir(folder) if folder.is_dir() else []
            for name in sorted(filter(_NAME.fullmatch, names), key=_number):
                if (path := folder / name) in self._seen:
                    continue
                self._seen.add(path)
                try:
                    yield self._read(path)
                except FormatError as e:
                    self._damaged.append(path)
                    logger.warning("%s; its texts are read by the LM again", e)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until nobody else adds to the table, and keeps others from it meanwhile.

        Raises:
            StorageError: The folder cannot be written to.
        """
        if self.writes is None:
            yield
            return
        with lock_file(self.writes / "LOCK", float("inf"), ""):
            sweep_leftovers(self.writes)
            yield

    def add(self, part: Part) -> None:
        """Adds a segment, fsynced; the caller is `alone`, or has a folder that nobody else knows.

        Raises:
            StorageError: It cannot be written.
        """
        if self.writes is None or not len(part):
            return
        sink = pa.BufferOutputStream()
        batch = part.batch(self.model)
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        names = os.listdir(self.writes) if self.writes.is_dir() else []
        last = max((_number(name) for name in names if _NAME.fullmatch(name)), default=0)
        path = self.writes / f"{last + 1:06d}-{digest}.arrow"
        with atomic_file(path) as tmp:
            tmp.write_bytes(data)
        self._seen.add(path)
        for damaged in self._damaged:
            if damaged.parent == self.writes:
                remove(damaged)
        self._damaged = [path for path in self._damaged if path.parent != self.writes]

    def _read(self, path: Path) -> Part:
        try:
            with open_regular(path) as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            if hashlib.sha256(mapped).hexdigest() != path.stem.partition("-")[2]:
                raise FormatError("was altered since it was written (SHA-256 differs)")
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            if reader.num_record_batches != 1:
                raise FormatError(f"has {reader.num_record_batches} batches, must have one")
            return Part.from_batch(reader.get_batch(0), self.model, self.words, self.codes)
        except (FormatError, OSError, ValueError, pa.ArrowException) as e:
            raise FormatError(f"{path}: cannot be used: {e}") from e


def _number(name: str) -> int:
    return int(name.partition("-")[0])

"""`FeatureBank`: user id to J small integers, on disk and memory mapped."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.bank.checks import Field, split_fields
from userip_fast.bank.feast import write_feast
from userip_fast.bank.generations import current_generation
from userip_fast.bank.index import (
    ON_UNKNOWN,
    KeyTypeError,
    as_keys,
    bad_on_unknown,
    keys_of_type,
    name_some,
    unknown_users,
)
from userip_fast.bank.layout import Generation
from userip_fast.bank.pages import PagedArray
from userip_fast.bank.parquet import (
    Best,
    no_profiles,
    read_parquet,
    tables,
    write_csv,
    write_parquet,
)
from userip_fast.bank.writer import LOCK_TIMEOUT_S, BankWriter
from userip_fast.core.errors import (
    ConfigError,
    DataError,
    FormatError,
    MismatchError,
    UnavailableError,
    shown,
)

_INTEGER = re.compile(r"-?[0-9]{1,19}")


class FeatureBank:
    """One generation of a bank, read-only; open it with `open`, make it with `write`.

    An instance never changes: `update` and later writers make new generations, which `open` finds.
    Every page of its files is checked before it is first read (`userip_fast.bank.pages`): whatever
    reads codes, keys or probabilities raises FormatError, naming the page, instead of giving what
    is damaged.

    Attributes:
        path: The bank's folder.
    """

    def __init__(self, path: Path, generation: Generation) -> None:
        self.path = path
        self._generation = generation
        self._reserved = np.array([f["codebook_size"] for f in generation.fields], np.int64)
        self._codes = generation.codes
        # Of keys; None: an empty bank has no type yet. Kept, as a single look-up feels every call.
        self._kind = generation.key_type if len(generation.codes) else None

    @classmethod
    def write(
        cls,
        path: str | os.PathLike[str],
        user_keys: Any,
        code_ids: Any,
        *,
        fields: Sequence[Mapping[str, Any]],
        model_fingerprint: str,
        probabilities: Any = None,
        profiles: Any = None,
        metadata: Mapping[str, Any] | None = None,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> FeatureBank:
        """Writes a bank of exactly these users, in any order, and opens it.

        See `BankWriter` for the arguments and for what is raised.
        """
        about: dict[str, Any] = {"fields": fields, "metadata": metadata}
        about["model_fingerprint"] = model_fingerprint
        with BankWriter(path, **about, lock_timeout_s=lock_timeout_s) as writer:
            writer.append(user_keys, code_ids, probabilities, profiles)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> FeatureBank:
        """Maps the current generation: milliseconds whatever the number of users.

        Args:
            path: The bank's folder.
            verify: Also read and check everything, see `verify`.

        Raises:
            FormatError: There is no bank, or it is torn, altered or of another version.
        """
        path = Path(path)
        while True:
            current = current_generation(path)
            try:
                bank = cls(path, Generation.open(*current))
                break
            except FormatError:
                # Two updates between the two lines above remove what we were about to open.
                if current_generation(path) == current:
                    raise
        if verify:
            bank.verify()
        return bank

    def lookup(self, user_ids: Any, on_unknown: str = "error") -> NDArray[np.int64]:
        """Code ids of users.

        Args:
            user_ids: [n] keys of the bank's key type: a list, a numpy array, an Arrow array, or a
                single key (n = 1). They may repeat.
            on_unknown: "error", or "code": a user who is not in the bank gets the reserved code K_j
                (`codebook_size`) in every field j.

        Returns:
            [n, J] int64.

        Raises:
            DataError: Users are not in the bank and `on_unknown` is "error".
            KeyTypeError: Integers for a bank of strings or the other way round.
            FormatError: A page of the bank that has to be read is damaged.
        """
        if on_unknown not in ON_UNKNOWN:
            raise bad_on_unknown(on_unknown)
        keys = self._as_numbers(user_ids)
        if keys is None:
            keys = self._as_keys("user_ids", user_ids)
        missing, codes = self._generation.index.lookup(keys, self._codes, self._reserved)
        if missing and on_unknown == "error":
            unknown = as_keys("user_ids", keys).filter(pa.array(self.rows(keys) < 0))
            raise unknown_users(unknown, len(keys), str(self.path))
        return codes

    def lookup_profiles(self, user_ids: Any, on_unknown: str = "error") -> NDArray[np.float32]:
        """Probabilities of all codes given users' behaviour, as `lookup` gives codes.

        Args:
            user_ids: See `lookup`.
            on_unknown: "error", or "code": a user who is not in the bank has the reserved code of
                each field, so that no other has any probability: zeros.

        Returns:
            [n, sum of K_j] float32, field after field, each adding up to one but for 16 bits.

        Raises:
            ConfigError: The bank has no profiles, or another `on_unknown`.
            DataError, KeyTypeError, FormatError: See `lookup`.
        """
        if on_unknown not in ON_UNKNOWN:
            raise bad_on_unknown(on_unknown)
        kept = self._kept_profiles()
        keys = self._as_keys("user_ids", user_ids)
        rows = self._generation.index.find(keys)
        there = rows >= 0
        if on_unknown == "error" and not there.all():
            raise unknown_users(keys.filter(pa.array(~there)), len(keys), str(self.path))
        kept.check(rows[there])
        out = np.zeros((len(keys), kept.unchecked.shape[1]), np.float32)
        out[there] = kept.unchecked[rows[there]]
        return out

    def _kept_profiles(self) -> PagedArray:
        if (kept := self._generation.values.get("profiles")) is None:
            raise no_profiles(self.path)
        return kept

    def rows(self, user_ids: Any) -> NDArray[np.int64]:
        """Row of each user in `keys()`, `codes()` and `probabilities`, [n] int64; -1: unknown."""
        return self._generation.index.find(self._as_keys("user_ids", user_ids))

    def coerce_keys(self, strings: Iterable[str]) -> pa.Array:
        """Keys typed as text (a command line, a CSV file) as keys of this bank's type.

        Raises:
            KeyTypeError: The bank has integer keys and a text is not one.
        """
        texts = list(strings)
        if self.key_type == "string":
            return as_keys("keys", texts)
        bad = [t for t in texts if not _INTEGER.fullmatch(t) or not -(2**63) <= int(t) < 2**63]
        if bad:
            raise KeyTypeError(
                f"keys: the bank {self.path} has integer keys (int64); {len(bad)} of {len(texts)} "
                f"are not: {', '.join(map(shown, bad[:10]))}"
            )
        return pa.array([int(t) for t in texts], pa.int64())

    def describe(self, field: str, code: int) -> str:
        """The name of a code, for people: its code name, "code 3" without one, "unknown user".

        Raises:
            ConfigError: The bank has no such field, or the field no such code.
        """
        for f in self.fields:
            if f["name"] == field:
                break
        else:
            names = [f["name"] for f in self.fields]
            raise ConfigError(f"field={field!r}: the bank has the fields {names}")
        size, code = f["codebook_size"], int(code)
        if not 0 <= code <= size:
            raise ConfigError(f"code={code}: field {field!r} has codes 0 .. {size - 1} and {size}")
        if code == size:
            return "unknown user"
        return str(f["code_names"][code]) if f["code_names"] else f"code {code}"

    def update(
        self,
        user_keys: Any,
        code_ids: Any,
        probabilities: Any = None,
        profiles: Any = None,
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> FeatureBank:
        """Adds users and overwrites those who are there, in a new generation, and opens it.

        It starts from the bank's current generation, which may be later than this one. This
        instance and every other open reader stay as they are.

        Args:
            user_keys: [n] keys of the bank's type.
            code_ids: [n, J] codes of the same model.
            probabilities: [n, J], if and only if the bank has them (or is empty).
            profiles: [n, sum of K_j], likewise.

        Raises:
            DataError: See `BankWriter.append`; also a user given twice.
            MismatchError: Meanwhile the bank was rewritten with other fields or another model; or
                probabilities or profiles are missing, or not wanted.
        """
        keys = self._as_keys("user_keys", user_keys)
        with self._next(lock_timeout_s) as writer:
            writer.append(keys, code_ids, probabilities, profiles)
        return FeatureBank.open(self.path)

    def remove(
        self,
        user_keys: Any,
        on_unknown: str = "error",
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> FeatureBank:
        """Writes the next generation without some users, and opens it.

        As with any writer open readers stay as they are, and the generation before, which has them
        still, is on disk until the one after this.

        Args:
            user_keys: [n] keys of the bank's type; they may repeat.
            on_unknown: "error", or "skip" for users who are not in the bank.

        Raises:
            DataError: Users are not in the bank and `on_unknown` is "error"; nothing is written.
            ConfigError: Another `on_unknown`.
            MismatchError: See `update`.
        """
        if on_unknown not in ("error", "skip"):
            raise ConfigError(f"on_unknown={on_unknown!r}: must be 'error' or 'skip'")
        keys = self._as_keys("user_keys", user_keys)
        with self._next(lock_timeout_s) as writer:
            rows = FeatureBank.open(self.path).rows(keys)
            if on_unknown == "error" and (rows < 0).any():
                unknown = keys.filter(pa.array(rows < 0))
                raise DataError(
                    f"user_keys: {len(unknown)} of {len(keys)} are not in the bank {self.path}: "
                    f"{name_some(unknown)}; on_unknown='skip' passes them over"
                )
            writer.remove(keys)
        return FeatureBank.open(self.path)

    @contextmanager
    def _next(self, lock_timeout_s: float) -> Iterator[BankWriter]:
        """A writer of a bank that is still of this model, and keeps its users."""
        with BankWriter(
            self.path,
            fields=self.fields,
            model_fingerprint=self.model_fingerprint,
            metadata=self.metadata,
            lock_timeout_s=lock_timeout_s,
            keep_others=True,
        ) as writer:
            if FeatureBank.open(self.path)._identity() != self._identity():
                raise MismatchError(
                    f"{self.path}: was rewritten with another model, fields, key type or metadata "
                    "since it was opened; open it again"
                )
            yield writer

    def verify(self) -> None:
        """Reads the whole bank: SHA-256 of every file, order of the keys, ranges of the codes.

        Raises:
            FormatError: Names the file and what is wrong with it.
        """
        self._generation.verify()

    def to_arrow(self, best: Best | None = None) -> pa.Table:
        """Everything, in memory: `user_id`, codes of each field as `FIELD` and, if there are any,
        `FIELD_probability` and `FIELD_p`, a list of the probabilities of all codes.

        Args:
            best: Users' best items, `Server.best_items(n)`: lists `top_items` and `top_scores`.

        Raises:
            ConfigError: `best`, and the bank has no profiles.
        """
        return pa.concat_tables(tables(self, best))

    def to_pandas(self) -> Any:
        """`to_arrow` as a pandas frame.

        Raises:
            UnavailableError: pandas is not installed.
        """
        return self._frame("pandas", lambda pandas, table: table.to_pandas())

    def to_polars(self) -> Any:
        """`to_arrow` as a polars frame.

        Raises:
            UnavailableError: polars is not installed.
        """
        return self._frame("polars", lambda polars, table: polars.from_arrow(table))

    def _frame(self, library: str, make: Callable[[Any, pa.Table], Any]) -> Any:
        try:
            module = import_module(library)
        except ImportError as e:
            raise UnavailableError(f"to_{library}: {library} is not installed") from e
        return make(module, self.to_arrow())

    def to_parquet(self, path: str | os.PathLike[str], best: Best | None = None) -> None:
        """Writes the columns of `to_arrow`, block by block."""
        write_parquet(self, path, best)

    def to_csv(self, path: str | os.PathLike[str], best: Best | None = None) -> None:
        """Writes the same as text, lists as a column for each place (`FIELD_p_0`, ...); fields and
        fingerprint are not in it."""
        write_csv(self, path, best)

    def to_feast(
        self,
        path: str | os.PathLike[str],
        at: datetime | None = None,
        *,
        probabilities: bool = False,
        best: Best | None = None,
    ) -> None:
        """Writes the Parquet layout that Feast's file source reads.

        Args:
            at: `event_timestamp` of all rows, with a time zone; None for now.
            probabilities: Whether to add what the bank holds of them, as columns of `to_arrow`.
            best: As for `to_arrow`.

        Raises:
            ConfigError: `probabilities` or `best`, and the bank has none; a field is named like one
                of Feast's columns; `at` has no time zone.
        """
        write_feast(self, path, at, probabilities=probabilities, best=best)

    @classmethod
    def from_parquet(
        cls, parquet: str | os.PathLike[str], path: str | os.PathLike[str]
    ) -> FeatureBank:
        """Writes the bank at `path` from a file that `to_parquet` wrote.

        Raises:
            FormatError: Not such a file.
            DataError: Its columns break a rule of `BankWriter.append`.
        """
        return cls.write(path, **read_parquet(parquet))

    def __len__(self) -> int:
        return len(self._generation.index)

    @property
    def fields(self) -> list[Field]:
        """Per field `{"name", "codebook_size", "code_names"}`, as the columns of the codes."""
        return self._generation.fields

    @property
    def key_type(self) -> str:
        """ "int64" or "string"."""
        return self._generation.key_type

    @property
    def model_fingerprint(self) -> str:
        """Which model the codes come from."""
        return self._generation.model_fingerprint

    @property
    def digest(self) -> str:
        """SHA-256 over fields, users and codes: banks of equal digests give equal look-ups."""
        return self._generation.digest

    @property
    def metadata(self) -> dict[str, Any]:
        """What the writer added."""
        return self._generation.metadata

    def keys(self) -> pa.Array:
        """[U] int64 or large_string, in hash order; mapped, not copied; checked as a whole."""
        return self._generation.index.keys()

    def codes(self) -> NDArray[Any]:
        """[U, J] code ids in their storage type, rows as in `keys()`; mapped, read-only; checked as
        a whole, once.
        """
        return self._codes.rows()

    @property
    def probabilities(self) -> NDArray[np.float32] | None:
        """[U, J] float32 of the users' codes, rows as in `keys()`; mapped, or out of `profiles`;
        checked as a whole, once. None if the bank has neither."""
        if (p := self._generation.values.get("probabilities")) is not None:
            return p.rows()
        if (profiles := self.profiles) is None:
            return None
        parts = zip(split_fields(self.fields, profiles), self.codes().T)
        own = [np.take_along_axis(p, z[:, None].astype(np.int64), 1) for p, z in parts]
        return np.concatenate(own, axis=1).astype(np.float32)

    @property
    def profiles(self) -> NDArray[np.float16] | None:
        """[U, sum of K_j] float16, the probabilities of all codes, field after field, rows as in
        `keys()`; mapped, read-only; checked as a whole, once. None if the bank has none."""
        p = self._generation.values.get("profiles")
        return None if p is None else p.rows()

    def info(self) -> dict[str, Any]:
        """What is in the bank and what it costs, as JSON values."""
        return {"path": str(self.path), **self._generation.info()}

    # What is opened stays as it is, so a copy is the same thing. Another process maps it anew.
    def __copy__(self) -> FeatureBank:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureBank:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        where = os.path.abspath(self.path), self._generation.folder.name
        return _reopened, (*where, self._generation.manifest_sha256)

    def __repr__(self) -> str:
        names = [field["name"] for field in self.fields]
        return f"FeatureBank({str(self.path)!r}, users={len(self)}, fields={names})"

    def _as_numbers(self, values: Any) -> NDArray[np.int64] | None:
        """`values` where they need no look at each: what a single look-up costs is mostly that."""
        if self._kind == "int64":
            if type(values) is int and -(2**63) <= values < 2**63:
                return np.array((values,), np.int64)
            if isinstance(values, np.ndarray) and values.dtype == np.int64 and values.ndim == 1:
                return values
            if isinstance(values, pa.Int64Array) and values.null_count == 0:
                numbers: NDArray[np.int64] = values.to_numpy()
                return numbers
        return None

    def _as_keys(self, name: str, values: Any) -> pa.Array:
        return keys_of_type(name, values, self._kind, self.path)

    def _identity(self) -> tuple[Any, ...]:
        return self.model_fingerprint, self.fields, self.metadata, self.key_type


def _reopened(path: str, generation: str, manifest_sha256: str) -> FeatureBank:
    """The very generation that was pickled."""
    folder = Path(path, generation)
    try:
        return FeatureBank(Path(path), Generation.open(folder, manifest_sha256))
    except FormatError as e:
        if folder.exists():
            raise
        raise FormatError(
            f"{folder}: is gone, as the bank was written twice since this reader was opened; open "
            "the bank again before passing it to other processes"
        ) from e

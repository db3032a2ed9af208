"""Writing a bank block by block, as inference delivers users."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.bank.checks import (
    check_codes,
    check_fields,
    check_metadata,
    check_probabilities,
    check_profiles,
)
from userip_fast.bank.generations import CURRENT, current_generation, publish, write_lock
from userip_fast.bank.index import as_keys, key_type
from userip_fast.bank.layout import OPTIONAL, PAGE_SUMS, Generation, write_generation
from userip_fast.bank.spool import Spool, Users
from userip_fast.core.errors import ConfigError, MismatchError
from userip_fast.core.keys import hash_keys, shard_of

LOCK_TIMEOUT_S = 30.0
"""How long a writer waits for another one before it gives up."""


class BankWriter:
    """Collects blocks of users in any order and publishes them as one generation of a bank.

        with BankWriter("BANK", fields=fields, model_fingerprint=model.fingerprint) as writer:
            for block in blocks:
                writer.append(block.user_keys, block.code_ids)

    Leaving the `with` block publishes; leaving it by an exception abandons, and the bank stays
    what it was. The write lock is held throughout. Until `close`, users wait on the bank's disk:
    memory holds half a byte of directory per user, and a bounded number of users.

    Args:
        path: The bank; created, or if it is one already, given a new generation with exactly these
            users (`FeatureBank.update` keeps the others).
        fields: Per profile field `{"name", "codebook_size", "code_names": list of texts | None}`.
        model_fingerprint: Which model the codes come from.
        metadata: Anything JSON can hold, such as the config that made the codes.
        lock_timeout_s: Seconds to wait for another writer.
        keep_others: Users of the current generation who are not appended stay as they are; it must
            be of the same model and fields.

    Raises:
        ConfigError: Bad fields, fingerprint or metadata.
        DataError: `path` exists and is not a bank.
        UnavailableError: Another writer holds the bank.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fields: Sequence[Mapping[str, Any]],
        model_fingerprint: str,
        metadata: Mapping[str, Any] | None = None,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        keep_others: bool = False,
    ) -> None:
        if not isinstance(model_fingerprint, str) or not model_fingerprint:
            raise ConfigError(
                f"model_fingerprint: must be a text that is not empty, got {model_fingerprint!r}"
            )
        self.path = Path(path)
        self._fields = check_fields(fields)
        self._fingerprint = model_fingerprint
        self._metadata = check_metadata(metadata)
        self._keep_others = keep_others
        self._spool = Spool(self.path)
        self._gone = as_keys("user_keys", [])
        self._open = ExitStack()
        self._open.enter_context(write_lock(self.path, lock_timeout_s))
        self._open.callback(self._spool.clear)
        self._closed = False

    def append(
        self, user_keys: Any, code_ids: Any, probabilities: Any = None, profiles: Any = None
    ) -> None:
        """Adds users.

        Args:
            user_keys: [n] integers or strings, see `FeatureBank.lookup`.
            code_ids: [n, J] integers, 0 .. K_j - 1.
            probabilities: [n, J] probability of each code, 0 .. 1; with every block or with none.
            profiles: [n, sum of K_j] probabilities of all codes of each field, adding up to one;
                with every block or with none. Kept in 16 bits.

        Raises:
            ConfigError: Profiles of fields whose names clash with their columns in exports.
            DataError: A code or probability out of range, or arrays that do not fit together.
            MismatchError: Keys of another type than those before, or probabilities or profiles for
                some blocks only.
            StorageError: The bank's disk is full.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        keys = as_keys("user_keys", user_keys)
        codes = check_codes(self._fields, keys, code_ids)
        values: dict[str, NDArray[Any]] = {"codes": codes}
        if probabilities is not None:
            values["probabilities"] = check_probabilities(codes.shape, probabilities)
        if profiles is not None:
            values["profiles"] = check_profiles(self._fields, len(codes), profiles)
        if len(keys) == 0:
            return  # it has no key type
        if (before := self._spool.first) is not None:
            if keys.type != before.keys.type:
                raise MismatchError(
                    f"user_keys: {key_type(keys)} keys after {key_type(before.keys)} keys; "
                    "a bank has one key type"
                )
            for name in sorted(set(values) ^ set(before.values)):
                raise MismatchError(f"{name}: give them with every block or with none")
        self._spool.add(Users(keys, hash_keys(keys), values))

    def remove(self, user_keys: Any) -> None:
        """Leaves users of the current generation out; with `keep_others`, which has them otherwise.
        Those who are not in it, or are appended, are no matter.

        Args:
            user_keys: [n] keys.

        Raises:
            MismatchError: Keys of another type than those before.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        keys = as_keys("user_keys", user_keys)
        if len(keys) and len(self._gone) and keys.type != self._gone.type:
            raise MismatchError(
                f"user_keys: {key_type(keys)} keys after {key_type(self._gone)} keys"
            )
        if len(keys):
            self._gone = pa.concat_arrays([self._gone, keys]) if len(self._gone) else keys

    def close(self) -> None:
        """Publishes the generation. Does nothing on a writer that is closed.

        Raises:
            DataError: A user was appended more than once; nothing is published.
            MismatchError: With `keep_others`: the current generation is of another model, fields or
                key type, or has probabilities or profiles where the blocks have none, or the other
                way round.
        """
        if self._closed:
            return
        try:
            self._publish()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Forgets what was appended and releases the bank, which stays what it was."""
        self._closed = True
        self._open.close()

    def _publish(self) -> None:
        others = None
        if self._keep_others and (self.path / CURRENT).is_file():
            others = Generation.open(*current_generation(self.path))
            self._check_others(others)
            if PAGE_SUMS not in others.files:
                others.verify()  # what is damaged must not get sums that say it is not
            if len(others.index) == 0:
                others = None
        if self._spool.first is None:
            if others is None:  # a bank of nobody
                keys, codes = as_keys("user_keys", []), np.empty((0, len(self._fields)), np.int64)
                nobody = check_codes(self._fields, keys, codes)
                self._spool.add(Users(keys, hash_keys(keys), {"codes": nobody}))
            else:
                self._spool.add(_users(others, 0, 0))
        write = partial(
            write_generation,
            parts=self._parts(others),
            fields=self._fields,
            model_fingerprint=self._fingerprint,
            metadata=self._metadata,
        )
        publish(self.path, write)

    def _parts(self, others: Generation | None) -> Iterator[Users]:
        """The users in hash order, together with those of `others` who were not appended."""
        row = 0
        for _, stop, users in self._spool.parts(0 if others is None else len(others.index)):
            users = users.in_hash_order()
            if others is not None:
                first, row = row, _first_row(others, stop)
                kept = _users(others, first, row)
                left_out = users.keys
                if len(self._gone):
                    left_out = pa.concat_arrays([users.keys, self._gone])
                stays = pc.invert(pc.is_in(kept.keys, value_set=left_out))
                rows = np.flatnonzero(stays.to_numpy(zero_copy_only=False))
                users = Users.concat([users, kept.take(rows)]).in_hash_order()
            yield users

    def _check_others(self, current: Generation) -> None:
        """Whether what was appended can be added to `current`."""
        if current.model_fingerprint != self._fingerprint or current.fields != self._fields:
            raise MismatchError(
                f"{self.path}: holds codes of model {current.model_fingerprint[:12]}, these are "
                f"of {self._fingerprint[:12]}; only codes of one model and its fields can be added "
                "to one another. Write all users, or choose another path"
            )
        if len(current.index) and len(self._gone) and key_type(self._gone) != current.key_type:
            raise MismatchError(
                f"user_keys: {key_type(self._gone)} keys, the bank {self.path} has "
                f"{current.key_type}"
            )
        appended = self._spool.first
        if appended is None or len(current.index) == 0:
            return
        if current.key_type != key_type(appended.keys):
            raise MismatchError(
                f"user_keys: {key_type(appended.keys)} keys, the bank {self.path} has "
                f"{current.key_type}"
            )
        for name in OPTIONAL:
            if (name in appended.values) != (name in current.values):
                has = "has" if name in current.values else "has no"
                raise MismatchError(f"{name}: the bank {self.path} {has} {name}")

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _users(generation: Generation, start: int, stop: int) -> Users:
    """Users `start:stop` of a generation, copied."""
    keys = generation.index.keys(start, stop).take(pa.array(np.arange(stop - start)))
    values = {name: x.rows(start, stop).copy() for name, x in generation.values.items()}
    return Users(keys, hash_keys(keys), values)


def _first_row(generation: Generation, shard: int) -> int:
    """The first row of a generation whose hash is of `shard` or a later one."""
    index = generation.index
    return bisect_left(
        range(len(index)), shard, key=lambda i: int(shard_of(hash_keys(index.keys(i, i + 1)))[0])
    )

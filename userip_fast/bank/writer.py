"""Writing a bank block by block, as inference delivers users."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.bank.generations import CURRENT, current_generation, publish, write_lock
from userip_fast.bank.index import as_keys, in_hash_order, key_type
from userip_fast.bank.layout import (
    Generation,
    check_codes,
    check_fields,
    check_metadata,
    check_probabilities,
    write_generation,
)
from userip_fast.errors import ConfigError, MismatchError
from userip_fast.keys import hash_keys

LOCK_TIMEOUT_S = 30.0
"""How long a writer waits for another one before it gives up."""


class BankWriter:
    """Collects blocks of users in any order and publishes them as one generation of a bank.

        with BankWriter("BANK", fields=fields, model_fingerprint=model.fingerprint) as writer:
            for block in blocks:
                writer.append(block.user_keys, block.code_ids)

    Leaving the `with` block publishes; leaving it by an exception abandons, and the bank stays
    what it was. The write lock is held throughout. Until `close`, users are kept in memory: their
    key, a 64-bit hash, their codes and probabilities (about 20 bytes a user with an integer key).

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
        self._blocks: list[
            tuple[pa.Array, NDArray[np.uint64], NDArray[Any], NDArray[np.float32] | None]
        ] = []
        self._open = ExitStack()
        self._open.enter_context(write_lock(self.path, lock_timeout_s))
        self._closed = False

    def append(self, user_keys: Any, code_ids: Any, probabilities: Any = None) -> None:
        """Adds users.

        Args:
            user_keys: [n] integers or strings, see `FeatureBank.lookup`.
            code_ids: [n, J] integers, 0 .. K_j - 1.
            probabilities: [n, J] probability of each code, 0 .. 1; with every block or with none.

        Raises:
            DataError: A code or probability out of range, or arrays that do not fit together.
            MismatchError: Keys of another type than those before, or probabilities for some blocks
                only.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        keys = as_keys("user_keys", user_keys)
        codes = check_codes(self._fields, keys, code_ids)
        p = None if probabilities is None else check_probabilities(codes.shape, probabilities)
        if len(keys) == 0:
            return  # it has no key type
        if self._blocks:
            first_keys, _, _, first_p = self._blocks[0]
            if keys.type != first_keys.type:
                raise MismatchError(
                    f"user_keys: {key_type(keys)} keys after {key_type(first_keys)} keys; "
                    "a bank has one key type"
                )
            if (p is None) != (first_p is None):
                raise MismatchError("probabilities: give them with every block or with none")
        self._blocks.append((keys, hash_keys(keys), codes, p))

    def close(self) -> None:
        """Publishes the generation. Does nothing on a writer that is closed.

        Raises:
            DataError: A user was appended more than once; nothing is published.
            MismatchError: With `keep_others`: the current generation is of another model, fields or
                key type, or has probabilities where the blocks have none or the other way round.
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
        self._blocks.clear()
        self._open.close()

    def _publish(self) -> None:
        if not self._blocks:  # a bank of nobody
            keys, codes = as_keys("user_keys", []), np.empty((0, len(self._fields)), np.int64)
            self._blocks.append(
                (keys, hash_keys(keys), check_codes(self._fields, keys, codes), None)
            )
        if self._keep_others and (self.path / CURRENT).is_file():
            self._append_others(Generation.open(*current_generation(self.path)))
        columns = list(zip(*self._blocks, strict=True))
        keys, hashes = pa.concat_arrays(columns[0]), np.concatenate(columns[1])
        codes = np.concatenate(columns[2])
        p = None if columns[3][0] is None else np.concatenate(columns[3])
        self._blocks.clear()
        del columns  # nothing is held twice
        if not (hashes[1:] > hashes[:-1]).all():  # inference delivers users in order
            keys, hashes, order = in_hash_order("user_keys", keys, hashes)
            codes = codes[order]
            p = None if p is None else p[order]
        write = partial(
            write_generation,
            keys=keys,
            hashes=hashes,
            codes=codes,
            probabilities=p,
            fields=self._fields,
            model_fingerprint=self._fingerprint,
            metadata=self._metadata,
        )
        publish(self.path, write)

    def _append_others(self, current: Generation) -> None:
        """Users of `current` whom no block holds."""
        stored = current.index.keys()
        appended = pa.concat_arrays([block[0] for block in self._blocks])
        if current.model_fingerprint != self._fingerprint or current.fields != self._fields:
            raise MismatchError(
                f"{self.path}: holds codes of model {current.model_fingerprint[:12]}, these are "
                f"of {self._fingerprint[:12]}; only codes of one model and its fields can be added "
                "to one another. Write all users, or choose another path"
            )
        if len(stored) == 0:
            return
        if len(appended) == 0:
            self._blocks.clear()
        elif stored.type != appended.type:
            raise MismatchError(
                f"user_keys: {key_type(appended)} keys, the bank {self.path} has {key_type(stored)}"
            )
        stays = np.ones(len(stored), np.bool_)
        if len(appended):
            p = self._blocks[0][3]
            if (p is None) != (current.probabilities is None):
                has = "has no" if current.probabilities is None else "has"
                raise MismatchError(f"probabilities: the bank {self.path} {has} probabilities")
            rows = current.index.find(appended)
            stays[rows[rows >= 0]] = False
        keys = stored.filter(pa.array(stays))
        if len(keys):
            p = None if current.probabilities is None else current.probabilities[stays]
            self._blocks.append((keys, hash_keys(keys), current.codes[stays], p))

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

"""Finished work on disk, one file per cell: a long evaluation can be stopped and resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from userip_fast.core.files import atomic_file
from userip_fast.core.keys import hash_keys
from userip_fast.data import Interactions

Arrays = dict[str, NDArray[Any]]


class Cells:
    """`get` computes a cell once and reads it ever after.

    Args:
        folder: Of the cell files; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Arrays of a cell.

        Args:
            key: Everything that decides the arrays, ready for JSON.
        """
        if self.folder is None:
            return compute()
        path = self.path(key, ".npz")
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as found:
                    return dict(found)
            except (OSError, ValueError, EOFError, BadZipFile):
                path.unlink()  # torn by a full disk: made again
        arrays = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as tmp, tmp.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        return arrays

    def holds_all(self, keys: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all cells are there."""
        return self.folder is not None and all(self.path(k, ".npz").is_file() for k in keys)

    def path(self, key: Mapping[str, Any], suffix: str = "") -> Path:
        """Where a cell lies: its kind in words, then a digest of its key."""
        assert self.folder is not None
        name = "-".join(str(key[k]) for k in ("kind", "feature", "backbone", "seed") if k in key)
        return self.folder / f"{name}-{digest(key)}{suffix}"


def digest(value: Any) -> str:
    """16 hex digits of a JSON value."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_digest(data: Interactions) -> str:
    """Of users, items, texts, events and ratings."""
    h = hashlib.sha256()
    for part in (hash_keys(data.user_keys), data.offsets, data.item_index):
        h.update(np.ascontiguousarray(part).tobytes())
    if data.rating is not None:
        h.update(data.rating.tobytes())
    h.update(hash_keys(data.item_text).tobytes())
    return h.hexdigest()[:16]

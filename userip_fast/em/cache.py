"""Results of finished blocks, kept by what they were computed from.

This is at once the memory of one sweep for the next (a descent from the shared start does not
depend on the codebooks) and the checkpoint within a sweep: after a kill the same blocks come again,
are found here and cost nothing, and whatever follows is computed from the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from userip_fast.core.errors import FormatError
from userip_fast.core.files import read_tensors, write_tensors

logger = logging.getLogger("userip_fast.em")

Tensors = dict[str, Tensor]


class BlockCache(Protocol):
    """`scope` names a group of entries that is dropped at once, say those of one round."""

    def get(self, scope: str, key: bytes) -> Tensors | None: ...

    def put(self, scope: str, key: bytes, tensors: Tensors) -> None: ...

    def drop(self, scope: str) -> None: ...


class MemoryCache:
    """Keeps entries until `limit_bytes` are reached, and no further ones."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._entries: dict[tuple[str, bytes], Tensors] = {}

    def get(self, scope: str, key: bytes) -> Tensors | None:
        return self._entries.get((scope, key))

    def put(self, scope: str, key: bytes, tensors: Tensors) -> None:
        size = _size(tensors)
        if size <= self._left:
            self._entries[scope, key] = tensors
            self._left -= size

    def drop(self, scope: str) -> None:
        for entry in [e for e in self._entries if e[0] == scope]:
            self._left += _size(self._entries.pop(entry))


class DiskCache:
    """One checksummed file per entry, fsynced before `put` returns.

    A file that is torn, altered or another entry's is passed over with a warning, and made anew.

    Args:
        folder: Gets a sub-folder per scope.
        run_key: What every entry depends on beside its own key: LM, prompts, settings.
    """

    def __init__(self, folder: Path, run_key: bytes) -> None:
        self.folder, self.run_key = folder, run_key

    def _path(self, scope: str, key: bytes) -> tuple[Path, dict[str, str]]:
        """The file of an entry, and what it says of itself."""
        digest = hashlib.sha256(self.run_key + key).hexdigest()
        return self.folder / scope / f"{digest[:32]}.safetensors", {"entry": f"{scope} {digest}"}

    def get(self, scope: str, key: bytes) -> Tensors | None:
        path, about = self._path(scope, key)
        if not path.exists():
            return None
        try:
            return read_tensors(path, about)
        except FormatError as e:
            passed_over(e)
            return None

    def put(self, scope: str, key: bytes, tensors: Tensors) -> None:
        path, about = self._path(scope, key)
        write_tensors(path, tensors, about)

    def drop(self, scope: str) -> None:
        shutil.rmtree(self.folder / scope, ignore_errors=True)

    def clear(self) -> None:
        """Removes everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def found_like(
    cache: BlockCache, scope: str, key: bytes, shapes: Mapping[str, tuple[int, ...]]
) -> Tensors | None:
    """An entry, if it is fp32 tensors of these names and shapes; another one is passed over."""
    found = cache.get(scope, key)
    if found is None:
        return None
    have = {name: (x.dtype, tuple(x.shape)) for name, x in found.items()}
    want = {name: (torch.float32, shape) for name, shape in shapes.items()}
    if have == want:
        return found
    passed_over(f"{scope}: must be {want}, is {have}")
    return None


def passed_over(why: object) -> None:
    logger.warning("a finished block is passed over and computed again: %s", why)


def _size(tensors: Tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())

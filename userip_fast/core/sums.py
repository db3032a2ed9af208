"""SHA-256 sums: of a folder whose manifest must tell of all its files, and of large files, kept.

A folder's sums are checked in full whenever it is used. Files of tens of gigabytes are read once:
their sums are kept under the identity, size and times of the file, in `sums.json` of the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from userip_fast.core.errors import FormatError, StorageError
from userip_fast.core.files import read_json, sha256_file, write_json

MANIFEST = "manifest.json"
MODEL_FORMATS = ("userip_fast.model", "userip_fast.model.fitted")
"""What a model's manifest says it is; the second was written for a day in November 2026."""
_SEAL = "sha256"
_KEPT = 4096  # sums, the latest
_SETTLED_S = 2.0  # a file changed since is read again: its times may not tell the next change


def cache_folder() -> Path:
    """`$USERIP_FAST_CACHE`, else `userip_fast` in the user's cache folder."""
    if root := os.environ.get("USERIP_FAST_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "userip_fast"


def folder_sums(root: Path, but: Sequence[str] = ()) -> dict[str, str]:
    """Relative name -> SHA-256 of every file below `root`, its manifest and the sub-folders `but`
    left out.

    Raises:
        FormatError: There is a link or a device, which no sum can answer for.
    """
    return {name: sha256_file(root / name) for name in _names(root, but)}


def check_sums(root: Path, sums: Any, needed: Iterable[str] = (), but: Sequence[str] = ()) -> None:
    """Checks that `root` holds what its manifest lists, as it was written, and nothing else.

    Args:
        root: A folder with a manifest.
        sums: What the manifest lists: relative name -> SHA-256.
        needed: Names that it must list.
        but: Sub-folders that are not looked at.

    Raises:
        FormatError: A file is missing, altered, not listed, outside the folder or a link.
    """
    if not isinstance(sums, Mapping):
        raise FormatError(f"{root / MANIFEST}: lists no files")
    if missing := sorted(set(needed) - set(sums)):
        raise FormatError(f"{root / MANIFEST}: does not list {missing[0]}")
    for name in sums:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise FormatError(f"{root / MANIFEST}: names a file outside the folder, {name!r}")
    names = set(_names(root, but))
    if extra := sorted(names - set(sums)):
        raise FormatError(f"{root / extra[0]}: is not in the manifest; remove it if it is not ours")
    for name, digest in sums.items():
        if Path(name).parts[:1] in {(folder,) for folder in but}:
            continue
        if name not in names or sha256_file(root / name) != digest:
            raise FormatError(f"{root / name}: missing or altered since it was saved")


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with a sum of its own, over its values (not over spaces or the order of keys)."""
    about = {k: v for k, v in manifest.items() if k != _SEAL}
    text = json.dumps(about, sort_keys=True, ensure_ascii=False)
    return {**about, _SEAL: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}


def check_seal(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises FormatError where a manifest is not what was sealed. One of before has no seal."""
    if not isinstance(manifest, Mapping):
        raise FormatError(f"{path}: must be an object, is {type(manifest).__name__}")
    if _SEAL in manifest and sealed(manifest) != manifest:
        raise FormatError(f"{path}: altered since it was saved (SHA-256 differs)")


def _names(root: Path, but: Sequence[str]) -> Iterator[str]:
    for path in sorted(root.rglob("*")):
        if path.relative_to(root).parts[0] in but:
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise FormatError(f"{path}: is a link or a device; only files are read here")
        name = path.relative_to(root).as_posix()
        if path.is_file() and name != MANIFEST:
            yield name


def kept_sum(path: Path, *, again: bool = False) -> str:
    """SHA-256 of a file, read unless the sum of this very file is kept from before.

    The very same is: device, inode, size, times of modification and of change. What rots on the
    disk changes none of them: `again` reads it in any case.
    """
    store = cache_folder() / "sums.json"
    found = path.stat()
    times = (found.st_mtime_ns, found.st_ctime_ns)
    key = ":".join(map(str, (found.st_dev, found.st_ino, found.st_size, *times)))
    kept = _kept(store)
    if not again and key in kept:
        return kept[key]
    digest = sha256_file(path)
    if max(times) / 1e9 < time.time() - _SETTLED_S and kept.get(key) != digest:
        kept = {**_kept(store), key: digest}
        with contextlib.suppress(StorageError):  # it will be read again, that is all
            write_json(store, dict(list(kept.items())[-_KEPT:]))
    return digest


def _kept(store: Path) -> dict[str, str]:
    try:
        kept = read_json(store)
    except FormatError:
        return {}
    sound = isinstance(kept, dict) and all(isinstance(v, str) for v in kept.values())
    return kept if sound else {}

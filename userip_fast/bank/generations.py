"""Generations: how a bank changes without any reader ever noticing half a change.

    BANK/CURRENT       {"generation": "gen-000002", "manifest_sha256": "..."}
    BANK/gen-000001/   the generation before, kept for readers that are just opening it
    BANK/gen-000002/   immutable
    BANK/LOCK          flock'ed by the one writer

A writer prepares a generation under a temporary name, fsyncs and renames it, and then replaces the
small file CURRENT atomically. Killed at any point, it leaves CURRENT and what CURRENT names intact;
the next writer sweeps up before it writes, so that leftovers do not fill a small disk. Readers hold
mappings, which outlive the names of the files.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from userip_fast.core.errors import DataError, FormatError
from userip_fast.core.files import (
    atomic_dir,
    lock_file,
    read_json_bytes,
    remove,
    sha256_file,
    storage_errors,
    write_json,
)

CURRENT = "CURRENT"
MANIFEST = "manifest.json"
_LOCK = "LOCK"
_GENERATION = re.compile(r"gen-(\d{6,})")
_LEFTOVER = re.compile(r"\.(gen-\d{6,}|CURRENT)\.\w+\.(tmp|old)")


def current_generation(path: Path) -> tuple[Path, str]:
    """The folder that CURRENT names, and the SHA-256 that its manifest must have.

    Raises:
        FormatError: There is no bank at `path`, or CURRENT is damaged.
    """
    if not (path / CURRENT).is_file():
        raise FormatError(f"{path}: no feature bank here (there is no file {CURRENT})")
    pointer, _ = read_json_bytes(path / CURRENT)
    if (
        not isinstance(pointer, dict)
        or not _GENERATION.fullmatch(str(pointer.get("generation")))
        or not isinstance(pointer.get("manifest_sha256"), str)
    ):
        raise FormatError(f"{path / CURRENT}: does not name a generation; the file is damaged")
    return path / pointer["generation"], pointer["manifest_sha256"]


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Adds a generation and makes it the current one. The caller holds `write_lock(path)`.

    Args:
        path: The bank.
        write: Writes the files of the generation, manifest included, into the folder it is given.
    """
    try:
        previous = current_generation(path)[0].name
    except FormatError:
        previous = ""
    if previous or not os.path.lexists(path / CURRENT):
        # A later generation was never current, so nobody reads it: its writer was killed.
        number = int(previous.removeprefix("gen-") or 0) + 1
    else:
        taken = [int(m[1]) for m in map(_GENERATION.fullmatch, os.listdir(path)) if m]
        number = max(taken, default=0) + 1
    folder = path / f"gen-{number:06d}"
    with atomic_dir(folder) as tmp:
        write(tmp)
    pointer = {"generation": folder.name, "manifest_sha256": sha256_file(folder / MANIFEST)}
    write_json(path / CURRENT, pointer)
    _sweep(path)


def _sweep(path: Path) -> None:
    """Removes what nobody opens: what killed writers left, and all generations but the current one
    and the one before. The caller holds the lock.
    """
    entries = list(path.iterdir())
    generations = {int(m[1]): e for e in entries if (m := _GENERATION.fullmatch(e.name))}
    if not os.path.lexists(path / CURRENT):
        kept = set()  # none was ever current
    else:
        try:
            current = int(current_generation(path)[0].name.removeprefix("gen-"))
            kept = {current, max((n for n in generations if n < current), default=current)}
        except FormatError:  # whichever it was
            kept = set(generations)
    for entry in (e for e in entries if _LEFTOVER.fullmatch(e.name)):
        remove(entry)
    for entry in (e for number, e in generations.items() if number not in kept):
        hidden = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}.old")
        os.rename(entry, hidden)  # it goes at once: no reader finds half of it
        remove(hidden)


@contextmanager
def write_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """The right to write the bank at `path`, which is created if it is not there.

    A folder that this call created and that no generation was written to is removed again.

    Raises:
        DataError: `path` exists and is not a bank.
        StorageError: `path` cannot be written to.
        UnavailableError: Another writer holds the lock for longer than `timeout_s`.
    """
    _refuse_foreign(path)
    lock = lock_file(
        path / _LOCK,
        timeout_s,
        f"path={path}: another writer has been holding this bank for {timeout_s:g} s; wait for it "
        "to finish, or raise lock_timeout_s",
    )
    try:
        with storage_errors(path):
            _sweep(path)
        yield
    finally:
        if not (path / CURRENT).exists() and os.listdir(path) == [_LOCK]:
            (path / _LOCK).unlink()
            path.rmdir()
        lock.close()


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise DataError(f"path={path}: is a file, not a feature bank; choose another path")
    for name in os.listdir(path):
        ours = name in (CURRENT, _LOCK) or _GENERATION.fullmatch(name) or _LEFTOVER.fullmatch(name)
        if not ours:
            raise DataError(
                f"path={path}: exists and is not a feature bank (it holds {name!r}); "
                "choose another path"
            )

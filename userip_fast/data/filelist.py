"""Which files make a table, and of what kind each is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa

from userip_fast.core.errors import DataError
from userip_fast.data.textfiles import kind_of

# Anything tabular: paths, and whatever Arrow can read. The libraries behind the latter are no
# dependencies, so their types cannot be named.
TableLike: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Any"


class File(NamedTuple):
    """A file of a table.

    Attributes:
        root: The folder that was named, below which names of folders may hold values; or its own.
        kind: "csv", "json" or "parquet".
        sep: The usual separator of files of its name.
        sniffed: Whether its content told the kind, and not its name.
    """

    path: Path
    root: Path
    kind: str
    sep: str = ","
    sniffed: bool = False


_KINDS = {
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
    ".parquet": ("parquet", ""),
    ".jsonl": ("json", ""),
    ".ndjson": ("json", ""),
    ".json": ("json", ""),
    ".inter": ("csv", "\t"),
    ".item": ("csv", "\t"),
    ".user": ("csv", "\t"),
}
_PACKED = (".gz", ".zst")
_NOT_OF = {"interactions": (".item", ".user"), "items": (".inter", ".user")}  # RecBole's folders
_KNOWN = f"{', '.join(_KINDS)}, text also with {' or '.join(_PACKED)}"


def is_path(source: TableLike) -> bool:
    """Whether a table is one of files, or of a sequence of them."""
    if isinstance(source, list | tuple):
        return all(isinstance(entry, str | os.PathLike) for entry in source)
    return isinstance(source, str | os.PathLike)


def name_of(source: TableLike) -> str:
    """What to call files in messages."""
    if isinstance(source, list | tuple):
        return str(source[0]) + (f" and {len(source) - 1} more" if len(source) > 1 else "")
    return str(source)


def list_files(source: TableLike, what: str) -> list[File]:
    """The files of a path or a sequence of paths; those of a folder in the order of their names.

    Raises:
        DataError: See `read_source`.
    """
    if isinstance(source, list | tuple):
        if not source:
            raise DataError(f"{what}: names no file")
        files = [file for path in source for file in list_files(path, what)]
    else:
        files = _files_of(Path(str(source)), what)
    if len({file.kind for file in files}) > 1:
        folder = isinstance(source, str | os.PathLike)
        where = f"folder {source}" if folder else name_of(source)
        raise DataError(f"{what}: {where} holds files of more than one kind")
    return files


def _files_of(path: Path, what: str) -> list[File]:
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(p[0] in "._" for p in file.relative_to(path).parts)
        )
        known = {file: suffix for file in found if (suffix := _suffix(file)) in _KINDS}
        known = {f: suffix for f, suffix in known.items() if suffix not in _NOT_OF.get(what, ())}
        if set(known.values()) > {".json"}:  # which only tell of the others, as tools leave them
            known = {file: suffix for file, suffix in known.items() if suffix != ".json"}
        files = [File(file, path, *_KINDS[suffix]) for file, suffix in known.items()]
        if not files:
            raise DataError(f"{what}: folder {path} holds no file of a known kind ({_KNOWN})")
        return files
    if not path.exists():
        raise DataError(f"{what}: {path} does not exist")
    if not path.is_file():  # a file is read more than once, first to see what it is
        raise DataError(f"{what}: {path} is no regular file; write what it gives to one")
    if (suffix := _suffix(path)) in _KINDS:
        return [File(path, path.parent, *_KINDS[suffix])]
    try:
        kind = kind_of(path)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{what}: {path} cannot be read: {e}") from e
    if kind is None:
        raise DataError(f"{what}: {path} is of an unknown kind; known are {_KNOWN}")
    return [File(path, path.parent, kind, sniffed=True)]


def _suffix(path: Path) -> str:
    """What a name says of the kind, whatever the file is packed in."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix

"""What one generation of a bank holds: layout version 1.

    manifest.json       format, version, users, key type, fields, model fingerprint, metadata,
                        and of every file below its dtype, shape and SHA-256
    keys.bin            int64 [n]                       \\
    key_offsets.bin     int64 [n + 1]  of string keys    | in hash order, ties by key
    key_text.bin        UTF-8 bytes    of string keys    |
    key_hashes.bin      uint64 [n]     of string keys   /
    directory.bin       uint32 [2**b + 1], see `userip_fast.bank.index`
    codes.bin           [n, J], row-major, the smallest unsigned type that holds K_j for every j:
                        code ids are 0 .. K_j - 1, and K_j itself is reserved for unknown users
    probabilities.bin   float32 [n, J], optional: of the codes
    profiles.bin        float16 [n, sum of K_j], optional: of all codes, field after field; banks of
                        earlier releases have none, and earlier releases refuse a bank that has it
    page_sums.bin       uint32, CRC-32 of each 4 KiB of the files above, one file after the other in
                        the order of their names; banks of earlier releases are read without

All arrays are raw and little-endian. Opening checks the manifest's own SHA-256 (kept in CURRENT),
the size of every file and the page sums' SHA-256; a page of an array is checked when it is first
read (`userip_fast.bank.pages`), and `Generation.verify` reads everything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.bank.checks import (
    Field,
    check_codes,
    check_fields,
    check_probabilities,
    check_profiles,
    code_dtype,
)
from userip_fast.bank.generations import MANIFEST
from userip_fast.bank.index import (
    HashIndex,
    build_directory,
    directory_bits,
    directory_dtype,
    key_type,
    refuse_duplicates,
)
from userip_fast.bank.pages import PagedArray, PageSums, num_pages
from userip_fast.bank.spool import Users
from userip_fast.core.errors import DataError, FormatError
from userip_fast.core.files import open_regular, read_json_bytes, write_json
from userip_fast.core.keys import hash_keys, key_order

FORMAT = "userip_fast.bank"
VERSION = 1
PAGE_SUMS = "page_sums.bin"
OPTIONAL = ("probabilities", "profiles")
"""What a bank may hold of users beside their codes."""
_PIECE = 1 << 16  # values, or users, read at once


class _Growing:
    """The file of an array that is written a piece at a time."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype.newbyteorder("<")
        self._sha256 = hashlib.sha256()
        self._shape = [0]
        self.pages = PageSums()

    def append(self, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array, self.dtype)
        with open(self.path, "ab") as file:
            file.write(array.data)
        self._sha256.update(array.data)
        self.pages.add(array.reshape(-1).view(np.uint8).data)
        self._shape = [self._shape[0] + len(array), *array.shape[1:]]

    def pieces(self) -> Iterator[NDArray[Any]]:
        """What was written, read back."""
        with open(self.path, "rb") as file:
            while len(piece := np.fromfile(file, self.dtype, _PIECE)):
                yield piece

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "dtype": self.dtype.str,
            "shape": self._shape,
            "sha256": self._sha256.hexdigest(),
        }


def write_generation(
    folder: Path,
    *,
    parts: Iterable[Users],
    fields: Sequence[Field],
    model_fingerprint: str,
    metadata: Mapping[str, Any],
) -> None:
    """Writes the files of a generation into `folder`.

    Args:
        folder: An empty folder.
        parts: At least one, of one key type, all with the same values; together the users in hash
            order, unique.
    """
    files: dict[str, _Growing] = {}

    def append(name: str, array: NDArray[Any]) -> None:
        if name not in files:
            files[name] = _Growing(folder / name, array.dtype)
        files[name].append(array)

    users = text_bytes = 0
    kind = ""
    for part in parts:
        kind = key_type(part.keys)
        if kind == "int64":
            append("keys.bin", part.keys.to_numpy())
        else:
            offsets, text = _string_arrays(part.keys)
            # Each part's first offset is the last of the part before.
            append("key_offsets.bin", offsets["key_offsets.bin" in files :] + text_bytes)
            append("key_text.bin", text)
            append("key_hashes.bin", part.hashes)
            text_bytes += len(text)
        for name, values in part.values.items():
            append(f"{name}.bin", values)
        users += len(part)
    hashes: Iterable[NDArray[np.uint64]]
    if kind == "int64":
        hashes = (hash_keys(piece) for piece in files["keys.bin"].pieces())
    else:
        hashes = files["key_hashes.bin"].pieces()
    append("directory.bin", build_directory(hashes, users))
    append(PAGE_SUMS, np.concatenate([files[name].pages.sums() for name in sorted(files)]))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "users": users,
        "key_type": kind,
        "fields": list(fields),
        "model_fingerprint": model_fingerprint,
        "metadata": dict(metadata),
        "files": {name: file.entry() for name, file in files.items()},
    }
    write_json(folder / MANIFEST, manifest)


def _string_arrays(keys: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Offsets, from 0 on, and text of string keys."""
    n = len(keys)
    _, offset_buffer, text_buffer = keys.buffers()
    offsets = np.zeros(1, np.int64)
    if n:
        offsets = np.frombuffer(offset_buffer, np.int64)[keys.offset : keys.offset + n + 1]
    text = np.frombuffer(text_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], text


@dataclass(frozen=True)
class Generation:
    """An opened generation: checked manifest and mapped, read-only arrays."""

    folder: Path
    fields: list[Field]
    key_type: str
    model_fingerprint: str
    metadata: dict[str, Any]
    manifest_sha256: str
    files: dict[str, dict[str, Any]]
    arrays: dict[str, PagedArray]
    index: HashIndex

    @property
    def codes(self) -> PagedArray:
        return self.arrays["codes.bin"]

    @property
    def values(self) -> dict[str, PagedArray]:
        """`codes`, and of `OPTIONAL` what is there."""
        names = ("codes", *OPTIONAL)
        return {n: self.arrays[f"{n}.bin"] for n in names if f"{n}.bin" in self.arrays}

    @classmethod
    def open(cls, folder: Path, manifest_sha256: str) -> Generation:
        """Maps a generation; reads no more than the manifest and the sizes of the files.

        Raises:
            FormatError: Torn, altered, of another version or not ours; names the file.
        """
        path = folder / MANIFEST
        if folder.is_symlink():
            raise FormatError(f"{folder}: is a symbolic link, which is not followed")
        manifest, data = read_json_bytes(path)
        if hashlib.sha256(data).hexdigest() != manifest_sha256:
            raise FormatError(f"{path}: altered since it was written (SHA-256 differs)")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise FormatError(f"{path}: not the manifest of a feature bank")
        if manifest.get("version") != VERSION:
            raise FormatError(
                f"{path}: layout version {manifest.get('version')!r}, this release reads {VERSION}"
            )
        try:
            fields = check_fields(manifest["fields"])
            files: dict[str, dict[str, Any]] = manifest["files"]
            users, kind = int(manifest["users"]), str(manifest["key_type"])
            arrays = {}
            expected = _expected(users, kind, fields)
            if unknown := set(files) - set(expected) - {PAGE_SUMS}:
                raise FormatError(f"{path}: names {sorted(unknown)}, no files of such a bank")
            for name, (dtype, shape) in expected.items():
                if name.removesuffix(".bin") in OPTIONAL and name not in files:
                    continue
                got = (files[name]["dtype"], tuple(files[name]["shape"]))
                if got != (dtype, shape or got[1]):
                    raise FormatError(f"{path}: {name} is {got}, must be {(dtype, shape)}")
                arrays[name] = _map(folder / name, np.dtype(dtype), got[1])
            sums = _page_sums(folder / PAGE_SUMS, files.get(PAGE_SUMS), arrays)
            paged = {n: PagedArray(folder / n, a, sums.get(n)) for n, a in arrays.items()}
            return cls(
                folder=folder,
                fields=fields,
                key_type=kind,
                model_fingerprint=manifest["model_fingerprint"],
                metadata=manifest["metadata"],
                manifest_sha256=manifest_sha256,
                files=files,
                arrays=paged,
                index=HashIndex(
                    path=folder,
                    integers=paged.get("keys.bin"),
                    offsets=paged.get("key_offsets.bin"),
                    text=paged.get("key_text.bin"),
                    hashes=paged.get("key_hashes.bin"),
                    directory=paged["directory.bin"],
                ),
            )
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise FormatError(f"{path}: not a valid manifest ({e!r})") from e

    @property
    def digest(self) -> str:
        """SHA-256 over fields, fingerprint and the content of files."""
        files = {n: e["sha256"] for n, e in self.files.items() if n != PAGE_SUMS}
        about = json.dumps([self.fields, self.model_fingerprint, files], sort_keys=True)
        return hashlib.sha256(about.encode()).hexdigest()

    def info(self) -> dict[str, Any]:
        """What is in it and what it costs, as JSON values."""
        sizes = {  # by the manifest: the files may be gone
            name: np.dtype(entry["dtype"]).itemsize * math.prod(entry["shape"])
            for name, entry in self.files.items()
        }
        return {
            "generation": self.folder.name,
            "version": VERSION,
            "users": len(self.index),
            "key_type": self.key_type,
            "code_dtype": self.codes.unchecked.dtype.name,
            "fields": self.fields,
            **{name: name in self.values for name in OPTIONAL},
            "page_sums": PAGE_SUMS in self.files,
            "model_fingerprint": self.model_fingerprint,
            "metadata": self.metadata,
            "file_bytes": sizes,
            "bytes_per_user": sum(sizes.values()) / max(1, len(self.index)),
        }

    def verify(self) -> None:
        """Reads every file and checks its SHA-256, then what the arrays say.

        Raises:
            FormatError: Names the file and what is wrong with it.
        """
        for name, array in self.arrays.items():  # as they are mapped: the names may be gone
            if hashlib.sha256(array.unchecked.data).hexdigest() != self.files[name]["sha256"]:
                raise FormatError(
                    f"{array.path}: altered since it was written (SHA-256 differs); "
                    "restore it from a copy or write the bank again"
                )
        directory = build_directory(self._verified_hashes(), len(self.index))
        if not np.array_equal(self.index.directory.rows(), directory):
            raise FormatError(f"{self.folder / 'directory.bin'}: does not fit the keys")

    def _verified_hashes(self) -> Iterator[NDArray[np.uint64]]:
        """The users' hashes, a piece at a time, of which all but the directory is right."""
        users = len(self.index)
        for start in range(0, users, _PIECE):
            stop, before = min(start + _PIECE, users), max(start - 1, 0)
            keys = self.index.keys(before, stop)  # and the one before, to compare with
            hashes = hash_keys(keys)
            if not np.array_equal(key_order(keys, hashes), np.arange(len(keys))):
                raise FormatError(f"{self.folder}: the keys are not in hash order")
            try:
                refuse_duplicates("keys", keys, hashes)
                keys, hashes = keys[start - before :], hashes[start - before :]
                values = {name: x.rows(start, stop) for name, x in self.values.items()}
                check_codes(self.fields, keys, values["codes"])
                if (p := values.get("probabilities")) is not None:
                    check_probabilities((len(keys), len(self.fields)), p)
                if (p := values.get("profiles")) is not None:
                    check_profiles(self.fields, len(keys), p)
            except DataError as e:
                raise FormatError(f"{self.folder}: {e}") from e
            own = self.index.hashes
            if own is not None and not np.array_equal(own.rows(start, stop), hashes):
                raise FormatError(f"{self.folder / 'key_hashes.bin'}: not the hashes of the keys")
            yield hashes


def _expected(
    users: int, kind: str, fields: Sequence[Field]
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """dtype and shape of every file; None where the shape is free."""
    rows = (users, len(fields))
    expected: dict[str, tuple[str, tuple[int, ...] | None]] = {
        "directory.bin": (directory_dtype(users), (2 ** directory_bits(users) + 1,)),
        "codes.bin": (code_dtype(fields).str, rows),
        "probabilities.bin": ("<f4", rows),
        "profiles.bin": ("<f2", (users, sum(field["codebook_size"] for field in fields))),
    }
    if kind == "int64":
        return expected | {"keys.bin": ("<i8", (users,))}
    return expected | {
        "key_offsets.bin": ("<i8", (users + 1,)),
        "key_text.bin": ("|u1", None),
        "key_hashes.bin": ("<u8", (users,)),
    }


def _page_sums(
    path: Path, entry: Mapping[str, Any] | None, arrays: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.uint32]]:
    """The page sums of each array, verified; none where the manifest has no entry for them."""
    if entry is None:
        return {}
    names = sorted(arrays)
    pages = [num_pages(arrays[name].nbytes) for name in names]
    if (got := (entry["dtype"], entry["shape"])) != ("<u4", [sum(pages)]):
        raise FormatError(f"{path}: is {got} by the manifest, must be {('<u4', [sum(pages)])}")
    sums = _map(path, np.dtype("<u4"), (sum(pages),))
    if hashlib.sha256(sums.data).hexdigest() != entry["sha256"]:
        raise FormatError(f"{path}: altered since it was written (SHA-256 differs)")
    return dict(zip(names, np.split(sums, np.cumsum(pages)[:-1])))


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Maps a file read-only as a plain array, after checking its size."""
    want = dtype.itemsize * math.prod(shape)
    try:
        with open_regular(path) as file:
            got = os.fstat(file.fileno()).st_size
            if got != want:
                raise FormatError(f"{path}: is {got} bytes, must be {want}; the file is torn")
            if want == 0:  # an empty file cannot be mapped
                return np.empty(shape, dtype)
            return np.asarray(np.memmap(file, dtype, mode="r", shape=shape))
    except OSError as e:
        raise FormatError(f"{path}: cannot be opened ({e})") from e

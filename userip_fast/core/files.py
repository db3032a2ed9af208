"""Files that are either whole and verified, or not there.

`atomic_file` and `atomic_dir` write under a temporary name in the target's own folder, fsync, and
rename. A reader therefore never sees a half-written file, and an interrupted writer leaves the
previous state in place. They replace regular files and folders only, keep the mode of what they
replace, and give new files what the umask allows. `write_json` and `write_tensors` are the only
formats models and checkpoints use. A disk that is full, read-only or failing is a `StorageError`
that says so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from userip_fast.core.errors import FormatError, StorageError, UnavailableError

if TYPE_CHECKING:  # the feature bank and serving, which are no users of tensors, do without
    import torch

logger = logging.getLogger("userip_fast")

_CHUNK = 1 << 20
_SHA256 = "sha256"
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def fsync_path(path: Path) -> None:
    """Flushes a file's (or a folder's own) data to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turns an `OSError` of writing `target` into a `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"{target}: cannot be written ({e}); what was there before is untouched. "
            f"{'Free space' if full else 'Make it possible'}, or choose a folder that can be "
            "written to, then run the same command again"
        ) from e


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is fsynced and renamed onto `path`.

    Raises:
        StorageError: Writing it failed, in the `with` block or here; or `path` is a link, a device
            or anything else than a regular file.
    """
    target = Path(path)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_to_keep(target, stat.S_IFREG)
        tmp = _beside(target, ".tmp")
        os.close(os.open(tmp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if mode is None:
            mode = stat.S_IMODE(tmp.stat().st_mode)  # what the umask allows
        try:
            yield tmp
            os.chmod(tmp, mode)  # libraries may have made the file anew
            fsync_path(tmp)
            os.replace(tmp, target)
            fsync_path(target.parent)
        finally:
            tmp.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it replaces `path` (old content removed).

    The two folders change places in one step, so that a kill at any moment leaves the old or the
    new one. (Where the system cannot, on other than Linux, `path` is absent for an instant.)

    Raises:
        StorageError: Writing it failed, in the `with` block or here; or `path` is a link or
            anything else than a folder.
    """
    target = Path(path)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_to_keep(target, stat.S_IFDIR)
        tmp = _beside(target, ".tmp")
        tmp.mkdir()
        try:
            yield tmp
            if mode is not None:
                os.chmod(tmp, mode)
            for entry in sorted(tmp.rglob("*")):
                fsync_path(entry)
            fsync_path(tmp)
            if not target.exists():
                os.rename(tmp, target)
            elif not _exchange(tmp, target):
                old = _beside(target, ".old")
                os.rename(target, old)
                os.rename(tmp, target)
                shutil.rmtree(old, ignore_errors=True)
            fsync_path(target.parent)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{suffix}")


def _mode_to_keep(target: Path, kind: int) -> int | None:
    """Permissions of what is to be replaced; None where nothing is there.

    Raises:
        StorageError: It is not of `kind`, `stat.S_IFREG` or `stat.S_IFDIR`.
    """
    try:
        found = target.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_IFMT(found) != kind:
        wanted = "regular file" if kind == stat.S_IFREG else "folder"
        raise StorageError(
            f"{target}: is a {_KINDS[stat.S_IFMT(found)]}, which is never replaced; name a "
            f"{wanted} (what a link leads to, if it is one), or remove it first"
        )
    return stat.S_IMODE(found)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file of a folder that is not to be trusted: no link is followed, no device read.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    try:  # not to wait for a FIFO's writer
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a symbolic link, which is not followed here") from e
        raise
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind != stat.S_IFREG:
        os.close(fd)
        raise OSError(errno.EINVAL, f"is a {_KINDS[kind]}, not a regular file")
    return open(fd, "rb")


def _exchange(a: Path, b: Path) -> bool:
    """Lets two paths change places atomically; False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(
        renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
    )


def lock_file(
    path: Path, timeout_s: float, refusal: str, holder: str = "another process"
) -> BinaryIO:
    """Opens a file, made with its folder if need be, and locks it until it is closed.

    The lock holds against all processes of this machine (flock), and a kill releases it. The file
    may stay behind, which means nothing, or be removed by who holds the lock.

    Args:
        timeout_s: How long to wait for another holder, which is told; may be infinite.
        refusal: The message after that.
        holder: Who holds it, in the word about waiting.

    Raises:
        StorageError: The file cannot be made or locked.
        UnavailableError: Another process holds the lock for longer than `timeout_s`.
    """
    deadline, told = time.monotonic() + timeout_s, False
    while True:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            except FileNotFoundError:
                continue  # a holder who leaves nothing behind just removed the folder
        lock = open(fd, "r+b", buffering=0)  # noqa: SIM115 (it lives as long as the lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass  # we locked a file that its holder has removed
        except BlockingIOError:
            if time.monotonic() >= deadline:
                lock.close()
                raise UnavailableError(refusal) from None
            if not told:
                logger.warning("%s is held by %s; waiting for it to end", path, holder)
            told = True
            time.sleep(0.05)
        except OSError as e:
            lock.close()
            raise StorageError(
                f"{path}: cannot be locked ({e}); choose a folder on a file system that has locks"
            ) from e
        lock.close()


@contextmanager
def one_writer(target: Path, holder: str) -> Iterator[None]:
    """Lets one process of this machine at a time make `target`; the others wait, with a word.

    What a killed one left is removed. After a wait `target` may be there: look before making it.

    Args:
        holder: Who another one is, for that word.

    Raises:
        StorageError: Nothing can be written beside `target`.
    """
    path = target.with_name(f"{target.name}.LOCK")
    with lock_file(path, math.inf, "", holder):
        try:
            with storage_errors(target):
                sweep_leftovers(target.parent, f"{target.name}.")
            yield
        finally:
            path.unlink(missing_ok=True)


def sweep_leftovers(folder: Path, start: str = "") -> None:
    """Removes what killed writers of names that begin with `start` left in `folder`.

    Nobody may be writing them.
    """
    for entry in folder.glob(".*"):
        if entry.suffix in (".tmp", ".old") and entry.name.startswith(f".{start}"):
            remove(entry)


def remove(entry: Path) -> None:
    """Removes a file, a link (not what it leads to) or a folder with all that is in it."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON (sorted keys, two-space indent, NaN refused) atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON.

    Raises:
        FormatError: The file is missing, unreadable or not JSON.
    """
    return read_json_bytes(os.path.realpath(path))[0]


def read_json_bytes(path: str | os.PathLike[str]) -> tuple[Any, bytes]:
    """JSON and the very bytes it was read from: a second reading may find another file.

    Raises:
        FormatError: See `read_json`; also a link.
    """
    try:
        with open_regular(path) as file:
            data = file.read()
        return json.loads(data.decode("utf-8")), data
    except (OSError, ValueError, RecursionError) as e:  # not JSON, not UTF-8, endless digits
        raise FormatError(f"{path}: cannot be read as JSON ({e})") from e


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as safetensors with a SHA-256 of their contents, atomically.

    Raises:
        StorageError: It cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    with atomic_file(path) as tmp:
        try:
            save_file(plain, tmp, {**(metadata or {}), _SHA256: _digest(plain)})
        except SafetensorError as e:  # what its own I/O errors are wrapped in
            raise OSError(str(e)) from e


def read_tensors(
    path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """Reads a safetensors file; nothing is unpickled. A SHA-256 in it is verified.

    Args:
        metadata: What it was written with, if it is one of `write_tensors`; then it has a SHA-256.

    Raises:
        FormatError: The file is missing, not valid safetensors, altered, or has other `metadata`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, TypeError) as e:
        raise FormatError(f"{path}: cannot be read as safetensors ({e})") from e
    digest = _digest(tensors)
    if about.get(_SHA256, digest) != digest:
        raise FormatError(f"{path}: altered since it was written (SHA-256 differs)")
    if metadata is not None and about != {**metadata, _SHA256: digest}:
        raise FormatError(f"{path}: its metadata must be {dict(metadata)} and a SHA-256")
    return tensors


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


def tensor_bytes(x: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    import torch

    x = x.detach().contiguous()
    # A dimension of one value is contiguous whatever its stride, which `view` does not accept.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8).numpy().data

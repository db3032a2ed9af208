"""A run folder: its paths, the lock of the one process that writes it, and its log of rounds."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from userip_fast.core.errors import ConfigError, StorageError
from userip_fast.core.files import lock_file, storage_errors, sweep_leftovers


class Run:
    """A run folder's paths."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.bank = root / "model", root / "bank"
        self.checkpoints = root / "checkpoints"
        self.metrics, self.log = root / "metrics.json", root / "metrics.jsonl"
        self.scalars = root / "tensorboard"
        self.report, self.explain = root / "report.html", root / "explain.json"


@contextmanager
def open_run(out: str | os.PathLike[str] | None, writes: bool) -> Iterator[Run | None]:
    """The run folder, locked by the one process that writes it."""
    if out is None:
        yield None
        return
    root = Path(out)
    if root.exists() and not root.is_dir():
        raise ConfigError(f"out={str(root)!r} is a file; name a folder for the run")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"out={str(root)!r} cannot be made: {e}") from e
    if not os.access(root, os.W_OK):
        raise ConfigError(f"out={str(root)!r} cannot be written to")
    run = Run(root)
    if not writes:
        yield run
        return
    refusal = (
        f"out={str(root)!r}: another process is writing this run; wait for it to end, or name "
        "another folder"
    )
    with lock_file(root / "LOCK", 0.0, refusal):
        try:
            with storage_errors(root):
                for folder in (root, run.checkpoints, *run.checkpoints.glob("blocks/*")):
                    sweep_leftovers(folder)
            yield run
        finally:
            (root / "LOCK").unlink(missing_ok=True)


class JsonLines:
    """metrics.jsonl: one record a line, flushed as it comes; begun anew by every run."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.file: TextIO | None = None

    def __enter__(self) -> JsonLines:
        if self.path:
            with storage_errors(self.path):
                self.file = self.path.open("w", encoding="utf-8")
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        if self.file and self.path:
            with storage_errors(self.path):
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()

    def __exit__(self, kind: object, *_: object) -> None:
        if self.file and self.path:
            try:
                with storage_errors(self.path):
                    self.file.close()
            except StorageError:
                if kind is None:  # else the disk's failing has been told
                    raise


def command_line() -> str | None:
    """The command line, where `userip` is what runs."""
    program = Path(sys.argv[0])
    if program.name == "userip" or program.parts[-2:] == ("userip_fast", "__main__.py"):
        return shlex.join(["userip", *sys.argv[1:]])
    return None

"""Checkpoints of EM: one folder per finished round, verified on reading, the last good one kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.errors import FormatError, MismatchError
from userip_fast.core.files import (
    atomic_dir,
    read_json,
    read_tensors,
    sweep_leftovers,
    write_json,
    write_tensors,
)
from userip_fast.core.sums import check_seal, sealed

logger = logging.getLogger("userip_fast.em")

_FORMAT = 2

Log = Callable[[dict[str, Any]], None]
"""Receives one record per round, for metrics.jsonl."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands after `round` rounds.

    Attributes:
        codes: [U, J] codes that the round read, or None for a round without codebooks.
        records: What was logged, one record per round.
    """

    round: int
    codebooks: list[Codebook]
    codes: Tensor | None
    records: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        run_key: Digest of data, LM and settings; a checkpoint of another run is refused.
    """

    def __init__(self, folder: Path, run_key: str) -> None:
        self.folder, self.run_key = folder, run_key

    @property
    def blocks(self) -> Path:
        """Where finished blocks of the round at hand are kept."""
        return self.folder / "blocks"

    def save(self, at: Checkpoint) -> None:
        """Writes `round-NNNN/`; the one before is kept, those before that go.

        Raises:
            StorageError: It cannot be written; earlier checkpoints are untouched.
        """
        tensors = {f"{j}.{k}": v for j, b in enumerate(at.codebooks) for k, v in b.state().items()}
        with atomic_dir(self._path(at.round)) as tmp:
            write_tensors(tmp / "codebooks.safetensors", tensors)
            if at.codes is not None:
                write_tensors(tmp / "codes.safetensors", {"codes": at.codes})
            state = {
                "format": _FORMAT,
                "run": self.run_key,
                "round": at.round,
                "fields": len(at.codebooks),
                "codes": at.codes is not None,
                "records": at.records,
            }
            write_json(tmp / "state.json", sealed(state))
        for old in self._found()[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def last(self) -> Checkpoint | None:
        """The newest checkpoint that can be read; damaged ones are passed over with a warning.

        Raises:
            MismatchError: The newest one belongs to other data or settings.
        """
        for path in reversed(self._found()):
            try:
                state = read_json(path / "state.json")
                check_seal(path / "state.json", state)
                run = state["run"]
                found = Checkpoint(
                    int(state["round"]),
                    load_codebooks(path / "codebooks.safetensors", int(state["fields"])),
                    read_tensors(path / "codes.safetensors")["codes"] if state["codes"] else None,
                    list(state["records"]),
                )
            except (FormatError, KeyError, TypeError, ValueError) as e:
                logger.warning("checkpoint %s is passed over: %s", path, e)
                continue
            if run != self.run_key:
                raise MismatchError(
                    f"{path}: is a checkpoint of a run with other data, LM or settings; repeat the "
                    "command that wrote it, or start anew without --resume"
                )
            return found
        return None

    def clear(self) -> None:
        """Removes all checkpoints and finished blocks."""
        for path in (*self._found(), self.blocks):
            shutil.rmtree(path, ignore_errors=True)
        sweep_leftovers(self.folder)

    def _path(self, round_: int) -> Path:
        return self.folder / f"round-{round_:04d}"

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("round-[0-9]*"))


class Rounds:
    """Records of a run's rounds, kept with the codebooks of the last.

    Args:
        kept: Where; None for nowhere.
        resume: Goes on after the last checkpoint there.
        writes: Whether this process writes.
        log: Called with each record, those of old first.

    Attributes:
        last: The checkpoint that the run goes on from.
    """

    def __init__(self, kept: Checkpoints | None, resume: bool, writes: bool, log: Log) -> None:
        self.kept, self.log = kept if writes else None, log
        self.last = kept.last() if kept is not None and resume else None
        self.records: list[dict[str, Any]] = [] if self.last is None else self.last.records
        for record in self.records:
            log(record)

    def add(self, record: dict[str, Any], codebooks: list[Codebook], codes: Tensor | None) -> None:
        """The next round; see `Checkpoint`."""
        self.records.append(record)
        if self.kept is not None:
            self.kept.save(Checkpoint(len(self.records), codebooks, codes, self.records))
        self.log(record)


def load_codebooks(path: Path, fields: int) -> list[Codebook]:
    """Codebooks saved as `<field>.<tensor>`.

    Raises:
        FormatError: The file is torn or holds something else.
    """
    tensors = read_tensors(path)
    if bad := [n for n, x in tensors.items() if x.dtype != torch.float32 or x.isnan().any()]:
        raise FormatError(f"{path}: {bad[0]} must be fp32 without NaN")
    try:
        return [
            Codebook.from_state(
                {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{j}.")}
            )
            for j in range(fields)
        ]
    except (ValueError, IndexError) as e:
        raise FormatError(f"{path}: does not hold {fields} codebooks ({e})") from e

"""Scalars of a run for TensorBoard, and for what follows its writer (W&B, MLflow)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from userip_fast.core.files import read_json
from userip_fast.core.progress import listening

_ROUND = ("nll_per_weight", "changed", "forward_equivalents")


class Scalars:
    """Values under `STAGE/NAME`, over the stage's own units; meanwhile all progress is heard.

    Args:
        folder: Replaced with the first value. None, or where TensorBoard is not installed (extra
            `tensorboard`): nothing is written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.writer: Any = None
        self.heard: set[str] = set()

    def __enter__(self) -> Scalars:
        self._listening = listening(self)
        self._listening.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.__exit__(None, None, None)
        if self.writer is not None:
            self.writer.close()

    def __call__(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.heard.add(stage)
        if self.folder is not None:
            self._open(self.folder)
        for name, value in values.items():
            if self.writer is not None and math.isfinite(value):
                self.writer.add_scalar(f"{stage}/{name}".replace(" ", "_"), value, step)

    def training(self, stage: str, folder: Path) -> None:
        """The curve that an LM's folder keeps of a training that was not heard, if it has one."""
        if stage in self.heard or not (folder / "training.json").is_file():
            return
        curve = read_json(folder / "training.json")
        for i, tokens in enumerate(curve["tokens"]):
            told = {n: (curve.get(n) or {i: None})[i] for n in ("loss", "held_out")}
            self(stage, tokens, {n: x for n, x in told.items() if x is not None})

    def round(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        values = {n: record[n] for n in _ROUND if isinstance(record.get(n), float)}
        for field, usage in record["fields"].items():
            values[f"perplexity of {field}"] = usage["perplexity"]
        self("rounds", record["round"] + 1, values)

    def _open(self, folder: Path) -> None:
        self.folder = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(str(folder))

"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Counts units of work and shows rate and last values. Quiet unless `show` is true."""

    def __init__(self, what: str, total: int, unit: str, show: bool) -> None:
        self.what, self.total, self.unit, self.show = what, total, unit, show
        self.done = 0
        self.started = self._printed = time.monotonic()
        self._tty = sys.stderr.isatty()

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    def advance(self, count: int, **values: float) -> None:
        """Notes `count` more units done; `values` are shown beside the rate."""
        self.done += count
        now = time.monotonic()
        if self.show and now - self._printed >= (0.2 if self._tty else 10.0):
            self._printed = now
            self._print(values, end="" if self._tty else "\n")

    def close(self, **values: float) -> None:
        if self.show:
            self._print(values, end="\n")

    def _print(self, values: dict[str, float], end: str) -> None:
        share = self.done / max(self.total, 1)
        left = (self.total - self.done) / self.rate if self.done else float("inf")
        bar = "#" * int(20 * share) + "-" * (20 - int(20 * share))
        extra = "".join(f"  {k} {v:.4g}" for k, v in values.items())
        line = (
            f"{self.what:<24} [{bar}] {self.done}/{self.total} {self.unit}  "
            f"{self.rate:.4g} {self.unit}/s  {left:.0f}s left{extra}"
        )
        print(("\r\x1b[2K" if self._tty else "") + line, end=end, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, unit: str, show: bool) -> Iterator[Progress]:
    """A `Progress` that ends its line whatever happens."""
    p = Progress(what, total, unit, show)
    try:
        yield p
    finally:
        p.close()

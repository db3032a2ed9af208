"""How much of an evaluation is done, and how long the rest will take.

Its jobs are of kinds that cost from milliseconds to many minutes (the LM, EM, a recommender), so
jobs are not counted but weighed: by a guess at first, by what a kind was seen to cost once one of
it is done; guesses are scaled by how far those of finished kinds were off.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_CACHED = 0.05  # seconds: a job that was faster was read from disk, and tells nothing of others


class Work:
    """Jobs to do, by kind.

    Args:
        jobs: Kind -> how many.
        guess: Kind -> seconds of one.
    """

    def __init__(
        self, what: str, jobs: Mapping[str, int], guess: Mapping[str, float], show: bool
    ) -> None:
        self.what, self.guess, self.show = what, guess, show
        self.left = Counter(jobs)
        self.seen: dict[str, list[float]] = defaultdict(list)
        self.total = sum(self.left.values())
        self.started = time.monotonic()

    @contextmanager
    def job(self, kind: str, name: str) -> Iterator[None]:
        """One job of a kind."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        if seconds > _CACHED:
            self.seen[kind].append(seconds)
        self.drop(kind)
        if self.show and (seconds > _CACHED or not self.left.total()):
            self._print(name, seconds)

    def drop(self, kind: str, count: int = 1) -> None:
        """Jobs that are done, or turned out not to be needed."""
        self.left[kind] -= count

    def seconds_left(self) -> float:
        """Of all jobs to do."""
        mean = {k: sum(v) / len(v) for k, v in self.seen.items()}
        known = [k for k in mean if self.guess.get(k)]
        scale = sum(mean[k] for k in known) / sum(self.guess[k] for k in known) if known else 1.0
        return sum(
            n * mean.get(k, scale * self.guess.get(k, 1.0)) for k, n in self.left.items() if n > 0
        )

    def _print(self, name: str, seconds: float) -> None:
        left = self.seconds_left()
        passed = time.monotonic() - self.started
        done = self.total - self.left.total()
        print(
            f"{self.what}: {done} of {self.total}  {name} {seconds:.1f}s  "
            f"[{_clock(passed)} passed, about {_clock(left)} left]",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"

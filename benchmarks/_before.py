"""The same work by two checkouts in turn: what a change costs, whatever else the machine does.

Each checkout has a process of its own, which runs the calling script with `--answer FOLDER` and the
package of that checkout. It answers the questions of its standard input, one a line, by the seconds
that each call took, as JSON. Questions go to both in turn, the order turning with every one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import userip_fast
from userip_fast.core import _extension

HERE = Path(__file__).resolve().parents[1]


class Answers:
    """A script's answers with the package of `checkout`, whose extension must be built in place."""

    def __init__(self, script: str, checkout: Path, arguments: list[str], folder: str) -> None:
        command = [sys.executable, script, *arguments, "--answer", folder]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )  # fmt: skip
        package, compiled = self._read("what runs")
        if Path(package) != checkout / "userip_fast" or not compiled:
            raise SystemExit(
                f"{checkout}: has no package with an extension; {package} was imported"
            )

    def ask(self, question: str) -> list[float]:
        assert self.process.stdin is not None
        print(question, file=self.process.stdin, flush=True)
        seconds: list[float] = self._read(question)
        return seconds

    def _read(self, question: str) -> Any:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{question}: no answer, see above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def answer(jobs: Mapping[str, Callable[[int], list[float]]]) -> None:
    """Answers questions such as "batch 3" by `jobs["batch"](3)`, until there are no more."""
    package = Path(str(userip_fast.__file__)).parent
    print(json.dumps([str(package), _extension.load() is not None]), flush=True)
    for line in sys.stdin:
        kind, number = line.split()
        print(json.dumps(jobs[kind](int(number))), flush=True)


def in_turn(
    script: str, before: Path, arguments: list[str], rounds: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """What `answer` tells of each kind of question, asked `rounds` times of either checkout.

    Returns:
        Kind -> `before` and `after`, each best, p50 and p99 in microseconds, and `after` over
        `before` of the best and of the median call: below 1 is faster now.
    """
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        sides = {
            "before": Answers(script, before.resolve(), arguments, a),
            "after": Answers(script, HERE, arguments, b),
        }
        found = {}
        for kind, times in rounds.items():
            taken: dict[str, list[float]] = {name: [] for name in sides}
            for i in range(times):
                for name in _turned(sides, i):
                    taken[name] += sides[name].ask(f"{kind} {i}")
            quantiles = {name: 1e6 * np.percentile(x, [0, 50, 99]) for name, x in taken.items()}
            best, median, _ = quantiles["after"] / quantiles["before"]
            found[kind] = {
                **{n: dict(zip(("best_us", "p50_us", "p99_us"), q.round(2).tolist()))
                   for n, q in quantiles.items()},
                "best_over_before": round(best, 3), "p50_over_before": round(median, 3),
            }  # fmt: skip
        for side in sides.values():
            side.close()
    return found


def _turned(names: Iterable[str], i: int) -> list[str]:
    order = list(names)
    return order[::-1] if i % 2 else order

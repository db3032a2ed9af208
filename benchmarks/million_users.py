"""Fit and infer of up to a million users by the event table: time and peak memory.

    python benchmarks/million_users.py [--users 10000 1000000] [--items 10000] [--threads 2]

A synthetic log of choices is written as Parquet: every user has one of 16 tastes and 20 events, 7
in 10 of them in the two genres of his taste. `uf.stream_interactions` sorts it on disk; the
embedded LM is trained first (on the first 100,000 users in hash order, as it always is), and by
itself, so that the others find it in the cache. Then `fit` (EM on all users, calibration, bank,
report) and `infer` (everybody again, into another bank) run in a process of their own each.
First they must find the tastes: normalised mutual information of codes and tastes over all users,
or there is no number. `lm_tokens` are the rows that the LM read in an EM round. The last line is
JSON; `ratios.peak_rss` is the largest log's peak over the smallest's, `ratios.peak_anonymous` the
same without pages that are mapped from files (histories sorted on disk), which the system takes
back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _timing import machine

import userip_fast as uf

EVENTS, TASTES, GENRES = 20, 16, 32
_NMI = 0.5
_WORDS = [
    "amber",
    "brook",
    "cedar",
    "dune",
    "ember",
    "frost",
    "grove",
    "haven",
    "iris",
    "jade",
    "knoll",
    "lark",
    "maple",
    "north",
    "ocean",
    "pearl",
    "quartz",
    "river",
    "slate",
    "thorn",
    "umber",
    "vale",
    "willow",
    "xenon",
    "yarrow",
    "zephyr",
    "aspen",
    "birch",
    "coral",
    "delta",
    "elm",
    "fern",
]


def write_log(folder: Path, users: int, items: int) -> None:
    """Parts of 100,000 users; the taste of user u is `taste_of(u)`."""
    folder.mkdir(parents=True)
    own = items // GENRES
    titles = [f"{_WORDS[i % GENRES]} {_WORDS[(i // GENRES) % 31]} {i}" for i in range(items)]
    pq.write_table(pa.table({"item_id": range(items), "title": titles}), folder / "items.parquet")
    (folder / "log").mkdir()
    for part, first in enumerate(range(0, users, 100_000)):
        n = min(100_000, users - first)
        random = np.random.default_rng(part)
        user = np.repeat(np.arange(first, first + n), EVENTS)
        side = random.integers(2, size=len(user))
        typical = random.random(len(user)) < 0.7
        genre = np.where(
            typical, 2 * taste_of(user) + side, random.integers(GENRES, size=len(user))
        )
        # Of a genre's items the first are chosen most.
        place = np.minimum((own * random.random(len(user)) ** 2).astype(np.int64), own - 1)
        table = {"user_id": user, "item_id": place * GENRES + genre, "time": np.arange(len(user))}
        pq.write_table(pa.table(table), folder / "log" / f"{part:04d}.parquet")


def taste_of(user: Any) -> Any:
    """[...] taste of users."""
    return (user * 2_654_435_761 >> 7) % TASTES


def step(what: str, folder: Path) -> dict[str, Any]:
    """One of the three steps, here."""
    field = uf.ProfileField("taste", "The user likes", codebook_size=TASTES)
    config = {"lm": {"embedded_tokens": 1_000_000}, "fields": [vars(field)]}
    began = time.perf_counter()
    data = uf.stream_interactions(
        folder / "log", folder / "items.parquet", work=folder / "work", time="time", text="{title}"
    )
    out: dict[str, Any] = {"sort_s": time.perf_counter() - began}
    began = time.perf_counter()
    anonymous = Anonymous()
    if what == "lm":
        from userip_fast.core.config import Config
        from userip_fast.model.prepare import prepare

        prepare(data, Config.from_dict(config))
    elif what == "fit":
        uf.fit(data, fields=[field], config=config, out=folder / "run")
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        rounds = [json.loads(line) for line in lines]
        out |= {"rounds": len(rounds), "lm_tokens": rounds[1]["lm_tokens"]}
    else:
        uf.Model.load(folder / "run" / "model").infer(data, folder / "bank")
    out["seconds"] = time.perf_counter() - began
    out["peak_rss_mib"], out["peak_anonymous_mib"] = status("VmHWM"), anonymous.peak()
    return out


def status(name: str) -> int:
    """MiB of this process, as Linux tells it."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) // 1024


class Anonymous(threading.Thread):
    """Looks twenty times a second at the memory that is no file's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            self.most = max(self.most, status("RssAnon"))

    def peak(self) -> int:
        """MiB; ends it."""
        self.ended.set()
        self.join()
        return max(self.most, status("RssAnon"))


def nmi(bank: Path) -> float:
    """Of codes and tastes."""
    found = uf.FeatureBank.open(bank)
    users = np.asarray(found.keys().to_pylist(), np.int64)
    codes = found.lookup(users)[:, 0].astype(np.int64)
    joint = np.zeros((TASTES, TASTES))
    np.add.at(joint, (taste_of(users), codes), 1)
    joint /= joint.sum()
    a, b = joint.sum(1), joint.sum(0)
    there = joint > 0
    mutual = (joint[there] * np.log(joint[there] / np.outer(a, b)[there])).sum()
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (a, b)]
    return float(mutual / math.sqrt(entropy[0] * entropy[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--step", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step[0], Path(args.step[1]))))
        return
    result: dict[str, Any] = {**machine("cpu"), "items": args.items, "threads": args.threads}
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as tmp:
        environment.setdefault("XDG_CACHE_HOME", tmp)
        for users in args.users:
            folder = Path(tmp) / str(users)
            write_log(folder, users, args.items)
            here: dict[str, Any] = {}
            for what in ("lm", "fit", "infer"):
                command = [sys.executable, __file__, "--step", what, str(folder)]
                run = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=False
                )
                if run.returncode:
                    raise SystemExit(run.stderr)
                here[what] = json.loads(run.stdout.splitlines()[-1])
                print(users, what, here[what], flush=True)
            here["nmi"] = nmi(folder / "bank")
            if here["nmi"] < _NMI:
                raise SystemExit(f"{users} users: the tastes are not found (NMI {here['nmi']:.3f})")
            result[str(users)] = here
    least, most = (result[str(n)] for n in (min(args.users), max(args.users)))
    result["ratios"] = {
        **{
            what: max(most[s][f"{what}_mib"] for s in ("fit", "infer"))
            / max(least[s][f"{what}_mib"] for s in ("fit", "infer"))
            for what in ("peak_rss", "peak_anonymous")
        },
        "lm_tokens": most["fit"]["lm_tokens"] / least["fit"]["lm_tokens"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

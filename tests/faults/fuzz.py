"""Malformed inputs to every reader: documented errors only, no crash, no hang, bounded memory.

    python tests/faults/fuzz.py --inputs 20000      # minutes
    python tests/faults/fuzz.py --inputs 400        # what the test suite runs

A quarter is drawn by Hypothesis: valid files that are mutated byte by byte, and values of any kind
where text is parsed. The others have structure, and sums that fit (`structured.py`); of these the
share that gets past the first check is printed, and so is the share of the lines of functions that
they ran in the modules that read (`AREAS`). Inputs go to forked workers with a limit on address
space and an alarm for each input, so a crash, a hang or a flood of memory names its input. The last
line is JSON with the counts; whatever is neither success nor an error of ours ends in a traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import lines
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import structured
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import userip_fast as uf
import userip_fast.codebook.books
from userip_fast.bank.redis_export import connect
from userip_fast.cli.flags import settings_of
from userip_fast.core.config import Config
from userip_fast.core.errors import UserIPError
from userip_fast.core.files import read_json, read_tensors, sha256_file, write_tensors
from userip_fast.data import TextTemplate
from userip_fast.data.filters import RowFilter
from userip_fast.em.checkpoints import Checkpoint, Checkpoints
from userip_fast.jobs.shards import parse_shard

AREAS = (
    "data",
    "bank",
    "model",
    "core/files.py",
    "core/config.py",
    "core/settings.py",
    "cli/flags.py",
)
SECONDS = 10  # per input
MEMORY = 2 << 30  # beyond what the worker starts with

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=12), x, max_size=4),
    max_leaves=12,
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "truncate", "repeat", "number"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    out = bytearray(data)
    for kind, where, new in mutations:
        at = int(where * len(out))
        if kind == "flip":
            out[at : at + len(new)] = new
        elif kind == "insert":
            out[at:at] = new
        elif kind == "delete":
            del out[at : at + 1 + len(new) * 3]
        elif kind == "truncate":
            del out[at:]
        elif kind == "repeat":
            out[at:at] = out[at : at + 40] * (1 + len(new))
        else:  # sizes and counts are where readers trust
            out[at : at + 8] = (2**63 - 1 - len(new)).to_bytes(8, "little")
    return bytes(out)


class Targets:
    """What is fuzzed; each target is a strategy and what to do with a value of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        log = pa.table(
            {"user_id": [1, 1, 2, 3], "item_id": [0, 1, 1, 0], "rating": [1.0, 5, 3, 2],
             "time": [4, 3, 2, 1], "title": ["a", "b", "b", "a"]}
        )  # fmt: skip
        pq.write_table(log, folder / "log.parquet")
        pacsv.write_csv(log, folder / "log.csv")
        rows = "\n".join(json.dumps(row) for row in log.to_pylist())
        (folder / "log.jsonl").write_text(rows)
        keys = [f"user {i}" for i in range(40)]
        fields = [{"name": "a", "codebook_size": 4, "code_names": None}]
        codes = np.arange(40)[:, None] % 4
        for name, own in (("ints", np.arange(40)), ("texts", keys)):
            made = uf.FeatureBank.write(
                folder / name, own, codes, fields=fields, model_fingerprint="m"
            )
            shutil.copytree(folder / name, folder / f"old-{name}")
            forget_page_sums(folder / f"old-{name}")
        made.to_parquet(folder / "bank.parquet")
        write_tensors(folder / "x.safetensors", {"0.codewords": torch.rand(3, 4)})
        book = uf.codebook.books.Codebook(torch.rand(3, 4))
        Checkpoints(folder / "kept", "run").save(Checkpoint(1, [book], None, [{"round": 0}]))
        (folder / "config.yaml").write_text(json.dumps(Config().to_dict()))

    def all(self) -> Plain:
        f = self.folder
        whole = {p: p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()}

        def changed(name: str, use: Callable[[Path], Any]) -> Any:
            """Mutates one of the files `name` matches, in place, uses it, and puts it back."""
            files = [p for p in whole if p.match(name)]

            def job(value: Any) -> None:
                which, mutations = value
                path = files[which % len(files)]
                path.write_bytes(mutate(whole[path], mutations))
                try:
                    use(path)
                finally:
                    for p in files:
                        if not p.exists() or p == path:
                            p.write_bytes(whole[p])

            return st.tuples(st.integers(0, 99), MUTATIONS), job

        def open_bank(path: Path) -> None:
            root = path.parent if path.parent.parent == f else path.parent.parent
            bank = uf.FeatureBank.open(root)
            ints = root.name.endswith("ints")
            known = [1, 39, 10**9] if ints else ["user 1", "user 39", "nobody"]
            codes = bank.lookup(known, on_unknown="code")
            assert codes.shape == (3, 1)
            assert codes.max() <= 4
            bank.keys()
            bank.verify()

        def read(path: Path) -> None:
            uf.read_interactions(path, rating="rating", time="time", on_bad="skip")

        def stream(path: Path) -> None:
            work = f.parent / "work"
            uf.stream_interactions(path, work=work, rating="rating", on_bad="skip").users(0, 1)
            shutil.rmtree(work, ignore_errors=True)

        table = pq.read_table(f / "log.parquet")
        return {
            "bank, integer keys": changed("ints/**/*", open_bank),
            "bank, text keys": changed("texts/**/*", open_bank),
            "bank without page sums, integer keys": changed("old-ints/**/*.bin", open_bank),
            "bank without page sums, text keys": changed("old-texts/**/*.bin", open_bank),
            "bank from Parquet": changed(
                "bank.parquet", lambda p: uf.FeatureBank.from_parquet(p, f.parent / "b")
            ),
            "CSV": changed("log.csv", read),
            "JSON lines": changed("log.jsonl", read),
            "Parquet": changed("log.parquet", read),
            "Parquet stream": changed("log.parquet", stream),
            "safetensors": changed("x.safetensors", read_tensors),
            "checkpoint": changed("round-0001/*", lambda p: Checkpoints(f / "kept", "run").last()),
            "JSON file": changed("config.yaml", read_json),
            "config file": changed("config.yaml", Config.load),
            "config values": (JSON, Config.from_dict),
            "config settings": (
                st.dictionaries(st.sampled_from(_names()), JSON, max_size=3),
                Config().override,
            ),
            "flags": (
                _assignments(),
                lambda x: settings_of({"config": None, "set": x, "template": None, "field": None}),
            ),
            "field flags": (
                st.lists(st.text("ab:1 -\x00é", max_size=30), min_size=1, max_size=3),
                lambda x: settings_of({"config": None, "set": None, "template": None, "field": x}),
            ),
            "text templates": (
                _pieces("{title} {item_id} [[ ]] { } {{ {nothing} (a) é \x00"),
                lambda x: TextTemplate(x).render(table),
            ),
            "row filters": (
                _pieces("rating user_id title == < in [1, ] ( ) not and or 3 'a' -1 nan \\x00 .x"),
                lambda x: RowFilter(x).mask(table),
            ),
            "shards": (st.text(max_size=12), parse_shard),
            "Redis URLs": (st.text("redis:/@?#[]1.\x00é", max_size=24), _refused_url),
        }


def forget_page_sums(bank: Path) -> None:
    """Makes it a bank of a release that had none: what is damaged is then read."""
    manifest = bank / "gen-000001" / "manifest.json"
    (bank / "gen-000001" / "page_sums.bin").unlink()
    about = json.loads(manifest.read_text())
    del about["files"]["page_sums.bin"]
    manifest.write_text(json.dumps(about))
    current = {"generation": "gen-000001", "manifest_sha256": sha256_file(manifest)}
    (bank / "CURRENT").write_text(json.dumps(current))


def _assignments() -> st.SearchStrategy[list[str]]:
    known = st.builds("{}={}".format, st.sampled_from(_names()), st.text(max_size=20))
    return st.lists(st.text(max_size=30) | known, max_size=3)


def _pieces(words: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words.split(" ")), max_size=8).map(" ".join)


def _refused_url(text: str) -> None:
    connect("x" + text)  # no such scheme: nothing is contacted


def _names() -> list[str]:
    return [f"{s}.{k}" for s, v in Config().to_dict().items() if isinstance(v, dict) for k in v]


Plain = dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]]


def files_of(area: str) -> list[Path]:
    path = Path(uf.__file__).parent / area
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def worker(
    folder: Path, plain: Plain, name: str, inputs: int, seed_: int, ran: lines.Lines
) -> Counter[str]:
    """Feeds `inputs` values to a target; `folder/note` always holds the value at hand."""
    counts: Counter[str] = Counter(read=0, refused=0)
    logging.disable(logging.WARNING)  # what is passed over is told, input by input
    note, signed = folder / "note", name in structured.TARGETS
    if signed:
        strategy, job = None, structured.TARGETS[name][1](folder)
    else:
        strategy, job = plain[name]

    def too_long(*_: object) -> None:
        raise TimeoutError(f"an input took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    def feed_one(value: Any, told: str) -> None:
        note.write_text(told, errors="backslashreplace")
        signal.alarm(SECONDS)
        try:
            with ran.traced():
                job(value)
            counts["read"] += 1
            if signed:
                counts["past"] += 1
        except UserIPError as e:
            counts["refused"] += 1
            if signed and not structured.FIRST_CHECK.search(str(e)):
                counts["past"] += 1
        finally:
            signal.alarm(0)

    if signed:  # each input is all that its number draws, so that one alone can be fed again
        for i in range(inputs):
            feed_one(Random(f"{seed_} {name} {i}"), f"{i} of seed {seed_}")
        return counts

    @seed(seed_)
    @settings(
        max_examples=inputs, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def feed(value: Any) -> None:
        feed_one(value, repr(value))

    feed()
    return counts


def shares(inputs: int, plain: list[str]) -> dict[str, int]:
    """Inputs of each target: those of structure get three quarters, by what one of them costs."""
    total = sum(1 / cost for cost, _ in structured.TARGETS.values())
    return {name: -(-inputs // 4 // len(plain)) for name in plain} | {
        name: math.ceil(0.75 * inputs / cost / total)
        for name, (cost, _) in structured.TARGETS.items()
    }


def run(folder: Path, inputs: int, seed_: int = 0) -> tuple[dict[str, Any], dict[str, set[int]]]:
    """What became of all inputs, and which lines of which file they ran."""
    torch.set_num_threads(1)
    ran = lines.Lines(file for area in AREAS for file in files_of(area))
    tiny.frozen("llama")  # imports what workers would each import for themselves
    plain = Targets(folder / "plain" / "data").all()
    total: dict[str, dict[str, int]] = {}
    for i, (name, count) in enumerate(shares(inputs, list(plain)).items()):
        here = folder / f"target{i}"
        here.mkdir()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                counts = worker(here, plain, name, count, seed_, ran)
                (here / "counts.json").write_text(json.dumps(counts))
                own = {file: sorted(x) for file, x in ran.run.items()}
                (here / "lines.json").write_text(json.dumps(own))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        if status:
            value = (here / "note").read_text() if (here / "note").exists() else "none yet"
            raise SystemExit(f"{name}: worker ended with status {status} on input {value}")
        total[name] = json.loads((here / "counts.json").read_text())
        for file, own in json.loads((here / "lines.json").read_text()).items():
            ran.run[file].update(own)
        shutil.rmtree(here)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    done = {n: c["read"] + c["refused"] for n, c in total.items()}
    past = sum(total[n].get("past", 0) for n in structured.TARGETS)
    share = past / sum(done[n] for n in structured.TARGETS)
    result = {
        "inputs": sum(done.values()),
        "past_first_check": round(share, 3),
        "covered": {area: covered(ran.run, area) for area in AREAS},
        "targets": total,
        "peak_rss_mib": peak,
    }
    return result, ran.run


def covered(ran: dict[str, set[int]], area: str) -> float:
    """Share of the lines of functions in `area` that were run."""
    there = {str(file): lines.lines_in(file) for file in files_of(area)}
    return round(sum(len(x & ran[f]) for f, x in there.items()) / sum(map(len, there.values())), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--missed", action="store_true", help="list lines that no input ran")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result, ran = run(Path(folder), args.inputs, args.seed)
    for file, own in ran.items() if args.missed else ():
        print(file, *sorted(lines.lines_in(Path(file)) - own))
    for name, counts in result["targets"].items():
        past = f"{counts['past']:6} past the first check" if "past" in counts else " " * 27
        print(f"{counts['refused']:6} refused {counts['read']:6} read {past}  {name}")
    print(f"{result['past_first_check']:.0%} of the inputs of structure got past the first check")
    told = ", ".join(f"{area} {share:.0%}" for area, share in result["covered"].items())
    print(f"lines of functions that were run: {told}")
    print(json.dumps({**result, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()

"""A busy machine: what work costs alone, and beside one spinning process per processor.

    python benchmarks/bench_busy.py [--threads N] [--quick] [--out RESULT.json]

Ours and the peers in one run, in turns, first alone, then beside the spinning processes, each of
which is bound to a processor and is a session of its own, as another user's would be:

- `em_step`: a gradient step of `bench_em_step.py`, b50_j8, against the padded public way;
- `table`: posteriors of 50,000 users against torch's embedding_bag and log_softmax;
- `assign_codes`: 20,000 vectors of 256 numbers, 64 codes, against torch's product and argmax;
- `lookup`: 100 batches of 1,000 keys of a bank of 200,000 users, against a pandas index or, without
  pandas, a Python dictionary.

`machine` is work that needs nobody: every thread multiplies small matrices by itself until all have
done their share. Its slowdown is what the machine lost. The last line is JSON: medians, `slowdown`
(beside over alone), `ratios` of the peer's median over ours, and `gates`: ours slows down by at
most twice what the machine did, and the padded way takes at least 3.5 times an EM step alone and
2.0 times beside the others. Where others computed here before it began there are figures, and no
gates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import bench_bank
import bench_em_step
import bench_event_table
import numpy as np
import pytest
import torch
from _timing import add_arguments, apply_arguments, compare, loaded, machine, run_script

from userip_fast import ops
from userip_fast.bank import FeatureBank
from userip_fast.core import _extension, threads

Pair = dict[str, Callable[[], Any]]

SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@contextmanager
def spinning() -> Iterator[int]:
    """One process per processor that never rests; how many."""
    processors = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        for cpu in processors:
            process = subprocess.Popen([sys.executable, "-c", SPIN, str(cpu)],
                                       start_new_session=True)  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(2.0)  # and all of them spin
        yield len(processors)


def em_step(quick: bool) -> Pair:
    lm = bench_em_step.make_lm("cpu", quick)
    case = bench_em_step.make_case(lm, *bench_em_step.CASES["b50_j8"])
    bench_em_step.check(case)
    return {"ours": bench_em_step.ours(case, bench_em_step.as_loaded(lm)),
            "padded": bench_em_step.padded(case)}  # fmt: skip


def table(quick: bool) -> Pair:
    case = bench_event_table.make(5_000 if quick else 50_000, 16, "cpu")
    pair = {name: build(case) for name, build in bench_event_table.CONTENDERS.items()}
    torch.testing.assert_close(pair["ours"](), pair["embedding_bag"](), rtol=1e-4, atol=1e-4)
    return pair


def assign(quick: bool) -> Pair:
    torch.manual_seed(0)
    x, c = torch.randn(2_000 if quick else 20_000, 256), torch.randn(64, 256)
    half = c.square().sum(1) / 2
    pair: Pair = {"ours": lambda: ops.assign_codes(x, c)[0],
                  "torch": lambda: (x @ c.T - half).argmax(1)}  # fmt: skip
    assert float((pair["ours"]() == pair["torch"]()).double().mean()) > 0.999
    return pair


def lookup(quick: bool, folder: Path) -> Pair:
    users = 20_000 if quick else 200_000
    array, codes = bench_bank.make_users(users, "int64")
    FeatureBank.write(
        folder / "bank", array, codes, fields=bench_bank.FIELDS, model_fingerprint="benchmark"
    )
    bank = FeatureBank.open(folder / "bank")
    keys = array.to_numpy()
    random = np.random.default_rng(0)
    batches = [random.choice(keys, 1000) for _ in range(100)]
    pair: Pair = {"ours": lambda: [bank.lookup(batch) for batch in batches]}
    try:
        import pandas as pd

        index = pd.Index(keys)
        index.get_indexer(keys[:1])
        pair["pandas"] = lambda: [codes[index.get_indexer(batch)] for batch in batches]
    except ImportError:
        at = dict(zip(keys.tolist(), range(users)))
        pair["dictionary"] = lambda: [codes[[at[k] for k in b.tolist()]] for b in batches]
    return pair


def alone(rounds: int) -> Callable[[], Any]:
    """Every thread multiplies by itself: nobody waits but at the end."""
    count, a = torch.get_num_threads(), np.ones((64, 64), np.float32)
    pool = ThreadPoolExecutor(count)

    def share(_: int) -> None:
        b = np.empty_like(a)
        for _ in range(rounds):
            np.multiply(a, a, out=b)
            np.sqrt(b, out=b)

    return lambda: list(pool.map(share, range(count)))


def run(quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cases = {"machine": {"ours": alone(500 if quick else 20_000)}, "em_step": em_step(quick),
                 "table": table(quick), "assign_codes": assign(quick),
                 "lookup": lookup(quick, Path(folder))}  # fmt: skip
        found: dict[str, dict[str, Any]] = {name: {} for name in cases}

        def measure(when: str) -> None:
            for name, pair in cases.items():
                seconds = 1.0 if quick else 20.0 if name == "em_step" else 4.0
                times = compare(pair, "cpu", seconds=seconds, rounds=25, at_least=3)
                found[name][when] = times
                print(f"{name} {when}: "
                      + ", ".join(f"{who} {t['median_ms']} ms" for who, t in times.items()),
                      flush=True)  # fmt: skip

        measure("alone")
        with spinning() as processes:
            measure("beside")
    slowdown = {
        name: {who: round(both["beside"][who]["median_ms"] / both["alone"][who]["median_ms"], 2)
               for who in both["alone"]} for name, both in found.items()
    }  # fmt: skip
    lost = slowdown.pop("machine")["ours"]
    ratios = {
        name: {when: {who: round(t["median_ms"] / times["ours"]["median_ms"], 3)
                      for who, t in times.items() if who != "ours"}
               for when, times in found[name].items()} for name in slowdown
    }  # fmt: skip
    gates = {f"{name}_slowdown": slow["ours"] <= 2 * lost for name, slow in slowdown.items()}
    gates |= {"em_step_alone": ratios["em_step"]["alone"]["padded"] >= 3.5,
              "em_step_beside": ratios["em_step"]["beside"]["padded"] >= 2.0}  # fmt: skip
    if why := loaded():
        print(why)
    return {
        "benchmark": "busy",
        "ratios": ratios,
        "slowdown": slowdown,
        "machine_slowdown": lost,
        "gates": None if why else gates,
        "spinning": processes,
        "crowded": _extension.load().crowded() if _extension.load() else None,
        "results": found,
        **machine("cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, help="write the last line there too")
    args = parser.parse_args()
    if args.device != "cpu" or args.clock != "wall":
        raise SystemExit("a busy machine is a CPU's, by the clock on the wall")
    apply_arguments(args)
    threads.settle()
    result = run(args.quick)
    if args.out:
        args.out.write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
    print(json.dumps(result))


@pytest.mark.parametrize("name", ["ours", "torch"])
def test_beside_others(benchmark: Any, name: str) -> None:
    pair = assign(quick=True)
    with spinning():
        benchmark.pedantic(pair[name], rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run_script(main)

"""The event table: profile_posterior against torch's embedding_bag, and users a second end to end.

    python benchmarks/bench_event_table.py --device cpu|cuda [--threads N] [--clock cpu] [--quick]
    pytest benchmarks/bench_event_table.py --benchmark-only

The op: users have 30 events of 4,096 kinds, drawn by a power law as items are. The peer adds rows
in fp32 and lets log_softmax follow; ours checks the kinds, adds long histories in fp64 and gives
the evidence too. Correctness first. The last line is JSON: `users_per_s` by number of codes at the
best time, `ratios.embedding_bag` the peer's best time over ours at the worst case,
`share_of_bandwidth` what must be read of rows and kinds a second over the read bandwidth of the
same run (above 1 where rows come from caches).

End to end, on CPU: users with 30 rated events of 1,000 items, one field of 16 codes, a small
embedded LM that has hardly been trained. `infer` has users a second of `Model.infer` into a bank,
when the LM reads the kinds and when it has (`again`); `ratios.infer` is `again` over the E-step
that reads users in blocks (`em.posterior=ascent`, the same answer with one field).
`lm_tokens_per_round` are the rows that the LM reads for an E-step and a full M-step of U and 10 U
users, `model_profile_one_us` the time of `Model.profile` for one user of 30 events.

Serving, in processes of their own, the best of ten: `serve_import_s` is what `import
userip_fast.serve` takes by the clock (`serve_import_cpu_s`: of processor time), `serve_open_s`
opening model, table and bank, `profile_one_us` a profile of 30 events and `add_one_us` one more of
them, `serve_resident_mib` all that is in memory then; `bare_resident_mib` is Python's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from _timing import add_arguments, apply_arguments, ceilings, compare, machine
from torch import Tensor

import userip_fast as uf
from userip_fast import ops
from userip_fast.em import Crowd

EVENTS, KINDS = 30, 4096
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def make(users: int, codes: int, device: str) -> Case:
    torch.manual_seed(0)
    table = -3 * torch.rand(KINDS, codes)
    popularity = 1 / (10 + torch.arange(KINDS).double())
    kinds = torch.multinomial(popularity, users * EVENTS, replacement=True)
    offsets = torch.arange(0, users * EVENTS + 1, EVENTS)
    prior = torch.randn(codes).log_softmax(0)
    return tuple(x.to(device) for x in (table, kinds, offsets, prior))


def ours(case: Case) -> Callable[[], Tensor]:
    return lambda: ops.profile_posterior(*case)[0]


def embedding_bag(case: Case) -> Callable[[], Tensor]:
    table, kinds, offsets, prior = case

    def run() -> Tensor:
        sums = F.embedding_bag(kinds, table, offsets, mode="sum", include_last_offset=True)
        return (sums + prior).log_softmax(1)

    return run


CONTENDERS: dict[str, Callable[[Case], Callable[[], Tensor]]] = {
    "ours": ours,
    "embedding_bag": embedding_bag,
}


def run(device: str, users: int, seconds: float) -> dict[str, Any]:
    limits = ceilings(device)
    print("ceilings:", limits)
    results, rate, share, ratios = [], {}, {}, []
    for codes in (16, 128):
        case = make(users, codes, device)
        runs = {name: build(case) for name, build in CONTENDERS.items()}
        torch.testing.assert_close(runs["ours"](), runs["embedding_bag"](), rtol=1e-4, atol=1e-4)
        times = compare(runs, device, seconds=seconds)
        read = users * EVENTS * (4 * codes + 8)
        for name, t in times.items():
            print(
                f"Z={codes} {name}: best {t['best_ms']} ms (median {t['median_ms']}), "
                f"{users / t['best_ms'] / 1e3:.2f}M users/s, "
                f"{read / t['best_ms'] / 1e6:.1f} GB/s of rows and kinds"
            )
        best = times["ours"]["best_ms"]
        rate[str(codes)] = round(users / best * 1e3)
        share[str(codes)] = round(read / best / 1e6 / limits["read_gb_per_s"], 3)
        ratios.append(times["embedding_bag"]["best_ms"] / best)
        results.append({"codes": codes, "users": users, "events": EVENTS, "times": times})
    return {
        "benchmark": "event_table",
        "users_per_s": rate,
        "ratios": {"embedding_bag": round(min(ratios), 3)},
        "share_of_bandwidth": share,
        "ceilings": limits,
        "results": results,
        **machine(device),
    }


def make_log(users: int) -> uf.Interactions:
    random = np.random.default_rng(0)
    words = ["red", "blue", "old", "new", "small", "large", "brass", "paper", "lamp", "rod", "tent"]
    titles = [f"{' '.join(random.choice(words, 3))} {i}" for i in range(1000)]
    item = np.minimum(random.zipf(1.3, users * EVENTS) - 1, 999)
    log = {
        "user_id": np.repeat(np.arange(users), EVENTS),
        "item_id": np.where(item < 999, item, random.integers(0, 1000, len(item))),
        "rating": random.integers(1, 6, users * EVENTS),
    }
    items = pa.table({"item_id": range(1000), "title": titles})
    return uf.read_interactions(pa.table(log), items, rating="rating")


CONFIG = {
    "data": {"rating": "rating", "behaviour_context": "independent", "max_tokens": 1024},
    "lm": {"embedded_hidden": 64, "embedded_layers": 2, "embedded_vocab": 384,
           "embedded_tokens": 20_000, "quantization": "none"},
    "em": {"estep": "posterior", "rounds": 1, "codeword_draws": 0},
    "fields": [{"name": "taste", "prompt": "The user likes", "codebook_size": 16}],
}  # fmt: skip


def end_to_end(users: int) -> dict[str, Any]:
    log = make_log(users)
    model = uf.fit(log.head_users(500), config=CONFIG)
    trainer = model.ready_trainer()
    tokens = []
    for count in (users // 10, users):
        crowd = Crowd(
            model.source(log), count, trainer.engine, model.config.em, model.config.fields
        )
        crowd.stats(crowd.judge(model.codebooks), model.codebooks)
        tokens.append(crowd.lm_tokens)

    def infer(model: uf.Model, log: uf.Interactions) -> float:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            model.infer(log, f"{folder}/bank")
            return round(log.num_users / (time.perf_counter() - begin))

    apart = replace(model, trainer=None, config=model.config.override({"em.posterior": "ascent"}))
    rate = {
        "blocks": infer(apart, log.head_users(min(users, 4096))),
        "first": infer(replace(model), log),
    }
    rate["again"] = max(infer(model, log) for _ in range(3))
    items, ratings = list(range(EVENTS)), [5] * EVENTS
    model.profile(items, ratings)
    each = compare({"one": lambda: [model.profile(items, ratings) for _ in range(100)]}, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model")
        model.infer(log, f"{folder}/bank")
        served = serving(folder)
    result = {
        "infer": rate,
        "ratio": round(rate["again"] / rate["blocks"], 1),
        "lm_tokens_per_round": tokens,
        "model_profile_one_us": round(each["one"]["best_ms"] * 10, 1),
        **served,
    }
    print(result)
    return result


SERVE = """
import json, sys, time


def resident_mib():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def best(run, times, each):
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        for _ in range(each):
            run()
        found.append((time.perf_counter() - begin) / each)
    return round(min(found) * 1e6, 1)


bare, wall, cpu = resident_mib(), time.perf_counter(), time.process_time()
import userip_fast.serve

wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
begin = time.perf_counter()
server = userip_fast.serve.Server.open(sys.argv[1] + "/model", bank=sys.argv[1] + "/bank")
opened = time.perf_counter() - begin
items, ratings = list(range(int(sys.argv[2]))), [5] * int(sys.argv[2])
server.lookup([0, 1])
one = best(lambda: server.profile(items, ratings), 20, 500)
profile = server.open_profile(items, ratings)
add = best(lambda: profile.add(3, 5), 20, 500)
assert not {"torch", "transformers"} & sys.modules.keys()
print(json.dumps([wall, cpu, opened, one, add, resident_mib(), bare]))
"""


def serving(folder: str) -> dict[str, Any]:
    """What a process that serves the model and bank in `folder` takes; the best of ten."""
    environment = {**os.environ, "PYTHONPATH": str(Path(uf.__file__).parents[1])}
    command = [sys.executable, "-c", SERVE, folder, str(EVENTS)]
    runs = [
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        for _ in range(10)
    ]
    wall, cpu, opened, one, add, resident, bare = (min(x) for x in zip(*runs))
    return {
        "serve_import_s": round(wall, 3),
        "serve_import_cpu_s": round(cpu, 3),
        "serve_open_s": round(opened, 3),
        "profile_one_us": one,
        "add_one_us": add,
        "serve_resident_mib": resident,
        "bare_resident_mib": bare,
    }


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_event_table(benchmark: Any, name: str) -> None:
    benchmark(CONTENDERS[name](make(10_000, 16, "cpu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    apply_arguments(args)
    users = 20_000 if args.quick else 2_000_000 if args.device == "cuda" else 200_000
    result = run(args.device, users, 0.5 if args.quick else 5.0)
    if args.device == "cpu":
        result |= end_to_end(users)
        result["ratios"]["infer"] = result.pop("ratio")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

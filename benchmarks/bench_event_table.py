"""profile_posterior against torch's embedding_bag and softmax: users a second from an event table.

    python benchmarks/bench_event_table.py --device cpu|cuda [--threads N] [--clock cpu] [--quick]
    pytest benchmarks/bench_event_table.py --benchmark-only

Users have 30 events of 4,096 kinds, drawn by a power law as items are. The peer adds rows in fp32
and lets log_softmax follow; ours checks the kinds, adds long histories in fp64 and gives the
evidence too. Correctness first. The last line is JSON: `users_per_s` by number of codes at the best
time, `ratios.embedding_bag` the peer's best time over ours at the worst case, `share_of_bandwidth`
what must be read of rows and kinds a second over the read bandwidth of the same run (above 1 where
rows come from caches).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _timing import add_arguments, apply_arguments, ceilings, compare, machine
from torch import Tensor

from userip_fast import ops

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


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_event_table(benchmark: Any, name: str) -> None:
    benchmark(CONTENDERS[name](make(10_000, 16, "cpu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    apply_arguments(args)
    users = 20_000 if args.quick else 2_000_000 if args.device == "cuda" else 200_000
    print(json.dumps(run(args.device, users, 0.5 if args.quick else 5.0)))


if __name__ == "__main__":
    main()

"""sparse_adam against torch SparseAdam and dense Adam, over tables of 20,000 to 1M rows.

    python benchmarks/bench_sparse_adam.py --device cpu|cuda [--threads N] [--clock cpu] [--quick]
    pytest benchmarks/bench_sparse_adam.py --benchmark-only

A step updates the `active` rows of a table [N, D] fp32. Correctness first: after three steps on the
same rows all contenders agree (when every row steps each time, per-row and global step counts are
the same). The last line is JSON; `ratios` are the other's best time over ours at the worst table.
`peak_mib` is memory during a step; `state_mib` what lives between steps (theta, m, v and, for
dense, the gradient).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _timing import (
    add_arguments,
    apply_arguments,
    ceilings,
    compare,
    machine,
    peak_mib,
    run_script,
    worst_ratios,
)

from userip_fast import ops

LR = 0.01


def ours(n: int, dim: int, rows: torch.Tensor, grad: torch.Tensor) -> Any:
    theta = torch.zeros(n, dim, device=grad.device)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    step = torch.zeros(n, dtype=torch.int32, device=grad.device)
    return theta, lambda: ops.sparse_adam(theta, m, v, step, rows, grad, lr=LR)


def torch_sparse(n: int, dim: int, rows: torch.Tensor, grad: torch.Tensor) -> Any:
    theta = torch.zeros(n, dim, device=grad.device, requires_grad=True)
    optimiser = torch.optim.SparseAdam([theta], lr=LR)

    def step() -> None:
        theta.grad = torch.sparse_coo_tensor(rows[None], grad, (n, dim), check_invariants=False)
        optimiser.step()

    return theta, step


def torch_dense(n: int, dim: int, rows: torch.Tensor, grad: torch.Tensor) -> Any:
    theta = torch.zeros(n, dim, device=grad.device, requires_grad=True)
    theta.grad = torch.zeros_like(theta)
    optimiser = torch.optim.AdamW([theta], lr=LR, weight_decay=0.0, fused=True)

    def step() -> None:
        theta.grad.zero_()
        theta.grad[rows] = grad
        optimiser.step()

    return theta, step


CONTENDERS: dict[str, Callable[..., Any]] = {
    "ours": ours,
    "torch SparseAdam": torch_sparse,
    "torch AdamW, dense": torch_dense,
}


def make(n: int, dim: int, active: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    rows = torch.randperm(n)[:active].sort().values
    return rows.to(device), torch.randn(active, dim).to(device)


def check(dim: int, device: str) -> None:
    rows, grad = make(50, dim, 7, device)
    grad += 0.1 * grad.sign()  # SparseAdam adds eps before the bias correction: felt near zero
    results = []
    for build in CONTENDERS.values():
        theta, step = build(50, dim, rows, grad)
        for _ in range(3):
            step()
        results.append(theta.detach())
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-3, atol=1e-3 * LR)


def run(device: str, tables: list[int], dim: int, active: int, seconds: float) -> dict[str, Any]:
    limits = ceilings(device)
    print("ceilings:", limits)
    check(dim, device)
    results = []
    for n in tables:
        rows, grad = make(n, dim, active, device)
        runs = {name: build(n, dim, rows, grad)[1] for name, build in CONTENDERS.items()}
        times = compare(runs, device, seconds=seconds, rounds=200)
        mib = {name: peak_mib(r, device) for name, r in runs.items()}
        table = n * dim * 4 / 2**20
        state = {name: round(table * (4 if "dense" in name else 3), 1) for name in runs}
        moved = 7 * active * dim * 4  # theta, m, v read and written, the gradient read
        for name, t in times.items():
            print(
                f"N={n} D={dim} active={active} {name}: best {t['best_ms']} ms (median "
                f"{t['median_ms']}), {moved / t['best_ms'] / 1e6:.2f} GB/s of what must move, "
                f"step {mib[name]} MiB, state {state[name]} MiB"
            )
        results.append({"rows": n, "times": times, "peak_mib": mib, "state_mib": state})
        del runs
    return {
        "benchmark": "sparse_adam",
        "ratios": worst_ratios(results),
        "dim": dim,
        "active": active,
        "ceilings": limits,
        "results": results,
        **machine(device),
    }


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_sparse_adam(benchmark: Any, name: str) -> None:
    rows, grad = make(20_000, 64, 54, "cpu")
    benchmark(CONTENDERS[name](20_000, 64, rows, grad)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--dim", type=int, help="width of a row; default 128, CUDA 4096")
    parser.add_argument("--active", type=int, default=512, help="rows per step")
    args = parser.parse_args()
    apply_arguments(args)
    dim = args.dim or (128 if args.device == "cpu" else 4096)
    tables = [20_000, 200_000]
    if args.device == "cpu":  # a card cannot hold everybody's state of so many wide rows at once
        tables.append(1_000_000)
    tables = tables[:1] if args.quick else tables
    seconds = 0.5 if args.quick or args.device == "cuda" else 4.0
    print(json.dumps(run(args.device, tables, dim, args.active, seconds)))


if __name__ == "__main__":
    run_script(main)

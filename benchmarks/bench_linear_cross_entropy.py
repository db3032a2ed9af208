"""linear_cross_entropy against full logits, torch.compile and Liger: time and peak memory.

    python benchmarks/bench_linear_cross_entropy.py [--device cuda] [--threads 1 --clock cpu]
    pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only

Loss and gradient of the hidden states through a frozen head; CPU in fp32, CUDA in bf16. Correctness
first: every contender agrees with the reference, else no number. Liger's kernel is Triton: it runs
on CUDA only. The last line is JSON: `ratios` are the other's best time over ours at the worst
shape; `scratch_mib`, ours beyond d_hidden, must not grow with rows x vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

Runs = dict[str, Callable[[], torch.Tensor]]


def make_runs(rows: int, dim: int, vocab: int, device: str) -> Runs:
    """Name -> d_hidden [rows, dim] of the weighted sum of the NLL."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(rows, dim).to(dtype).to(device).requires_grad_()
    weight = (torch.randn(vocab, dim) / dim**0.5).to(dtype).to(device)
    target = torch.randint(vocab, (rows,)).to(device)
    loss_weight = torch.rand(rows).to(device)
    cu_rows = torch.tensor([0, rows // 3, rows], device=device)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, hidden)[0]

    def ours(impl: str) -> torch.Tensor:
        nll = ops.linear_cross_entropy(hidden, weight, target, loss_weight, cu_rows, impl=impl)
        return gradient(nll.sum())

    def full_logits() -> torch.Tensor:
        token = F.cross_entropy((hidden @ weight.T).float(), target, reduction="none")
        return gradient((token * loss_weight).sum())

    runs: Runs = {"ours": lambda: ours("auto"), "reference": lambda: ours("reference")}
    runs["full logits"] = full_logits
    if device == "cuda":
        runs["full logits compiled"] = torch.compile(full_logits)
        if find_spec("liger_kernel"):
            from liger_kernel.ops.fused_linear_cross_entropy import (
                LigerFusedLinearCrossEntropyFunction as Liger,
            )

            def liger() -> torch.Tensor:
                out = Liger.apply(
                    hidden, weight, target, None, None, -100, 0.0, 0.0, "none", None, False
                )
                token = out[0] if isinstance(out, tuple) else out
                return gradient((token * loss_weight).sum())

            runs["liger"] = liger
    want = runs["reference"]().float()
    for name, run in runs.items():
        error = (run().float() - want).abs().max() / want.abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 3e-2), f"{name}: {error}"
    return runs


def run(device: str, shapes: list[tuple[int, int, int]], seconds: float) -> dict[str, Any]:
    limits = ceilings(device)
    print("ceilings:", limits)
    results = []
    for rows, dim, vocab in shapes:
        runs = make_runs(rows, dim, vocab, device)
        times = compare(runs, device, seconds=seconds, warm_up=False)  # each has run in the check
        mib = {name: peak_mib(r, device) for name, r in runs.items()}
        itemsize = 4 if device == "cpu" else 2
        for name, t in times.items():
            tflops = 4 * rows * dim * vocab / t["best_ms"] / 1e9
            print(
                f"R={rows} D={dim} V={vocab} {name}: best {t['best_ms']} ms (median "
                f"{t['median_ms']}), {tflops:.3f} TFLOP/s, peak {mib[name]} MiB"
            )
        results.append(
            {
                "rows": rows,
                "dim": dim,
                "vocab": vocab,
                "times": times,
                "peak_mib": mib,
                "scratch_mib": round(mib["ours"] - rows * dim * itemsize / 2**20, 2),
            }
        )
    return {
        "benchmark": "linear_cross_entropy",
        "ratios": worst_ratios(results),
        "largest_scratch_mib": max(r["scratch_mib"] for r in results),
        "ceilings": limits,
        "results": results,
        **machine(device),
    }


@pytest.mark.parametrize("name", ["ours", "reference", "full logits"])
def test_linear_cross_entropy(benchmark: Any, name: str) -> None:
    benchmark(make_runs(256, 128, 4000, "cpu")[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    apply_arguments(args)
    if args.quick:
        shapes = [(256, 128, 4000), (1024, 128, 16000)]
    elif args.device == "cpu":
        shapes = [(2048, 128, 2048), (512, 512, 32000), (2048, 512, 32000), (1024, 512, 128256)]
    else:
        shapes = [(2048, 4096, 32000), (8192, 4096, 32000), (8192, 4096, 128256)]
    print(json.dumps(run(args.device, shapes, 0.5 if args.quick or args.device == "cuda" else 4.0)))


if __name__ == "__main__":
    run_script(main)

"""nf4_dequantize and nf4_linear against bitsandbytes and dense torch linears.

    python benchmarks/bench_nf4.py [--device cuda] [--threads 1 --clock cpu] [--rows 1 512]
    pytest benchmarks/bench_nf4.py --benchmark-only

Correctness first: dequantised bits equal the reference's, products agree with fp64; else no number.
CPU computes in fp32, CUDA in bf16. The last line is JSON; `ratios` are the other's best time over
ours, at the worst shape (`dense`: a linear of the same dtype on the dequantised weight).
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
from _timing import add_arguments, apply_arguments, ceilings, compare, machine, peak_mib, run_script

from userip_fast import ops
from userip_fast.ops.nf4_format import NF4Weight

SMALL_M = 512  # from so many rows on a shape counts as large
Runs = dict[str, Callable[[], Any]]


def make_weight(size: int, device: str) -> NF4Weight:
    torch.manual_seed(0)
    return NF4Weight.quantize(torch.randn(size, size) / size**0.5).to(device)


def our_impls(device: str) -> list[str]:
    return ["auto"] if device == "cpu" else ["cuda", "triton"]


def dequantize_runs(weight: NF4Weight, dtype: torch.dtype, device: str) -> Runs:
    want = ops.nf4_dequantize(weight, dtype=dtype, impl="reference")
    runs: Runs = {}
    for impl in our_impls(device):
        runs[f"ours:{impl}"] = lambda impl=impl: ops.nf4_dequantize(weight, dtype=dtype, impl=impl)
        assert torch.equal(runs[f"ours:{impl}"](), want), impl
    if find_spec("bitsandbytes"):
        import bitsandbytes.functional as bnb

        params = weight.to_bnb()
        params.quant_state.dtype = dtype
        runs["bitsandbytes"] = lambda: bnb.dequantize_4bit(params.data, params.quant_state)
        assert torch.equal(runs["bitsandbytes"](), want)
    return runs


def linear_runs(
    weight: NF4Weight, rows: int, dtype: torch.dtype, device: str, backward: bool
) -> Runs:
    """One forward pass; or, with `backward`, the input gradient alone."""
    torch.manual_seed(rows)
    x = torch.randn(rows, weight.shape[1]).to(dtype).to(device)
    dense = ops.nf4_dequantize(weight, dtype=dtype)
    forward: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for impl in our_impls(device):
        forward[f"ours:{impl}"] = lambda x, impl=impl: ops.nf4_linear(x, weight, impl=impl)
    forward["dense"] = lambda x: F.linear(x, dense)
    if device == "cpu" and rows <= 64 and not backward:
        half = dense.bfloat16()
        forward["dense bf16"] = lambda x: F.linear(x.bfloat16(), half)
    if find_spec("bitsandbytes"):
        import bitsandbytes as bnb

        params = weight.to_bnb()
        params.quant_state.dtype = dtype
        forward["bitsandbytes"] = lambda x: bnb.matmul_4bit(
            x, params, quant_state=params.quant_state
        )
    oracle = F.linear(x[:4].double(), dense.double())
    for name, run in forward.items():
        error = (run(x)[:4].double() - oracle).abs().max() / oracle.abs().max()
        limit = 2e-5 if dtype == torch.float32 and name != "dense bf16" else 2e-2
        assert error < limit, f"{name}: {error}"
    if not backward:

        def no_grad(run: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
            return torch.no_grad()(lambda: run(x))

        return {name: no_grad(run) for name, run in forward.items()}
    grad = torch.randn(rows, weight.shape[0]).to(dtype).to(device)
    leaf = x.requires_grad_()
    graphs = {name: run(leaf) for name, run in forward.items()}
    return {
        name: lambda y=y: torch.autograd.grad(y, leaf, grad, retain_graph=True)
        for name, y in graphs.items()
    }


def ratio(result: dict[str, Any], other: str) -> float:
    """`other`'s best time over the best of ours."""
    ours = min(t["best_ms"] for name, t in result["times"].items() if name.startswith("ours"))
    return result["times"][other]["best_ms"] / ours if other in result["times"] else float("nan")


def worst(results: list[dict[str, Any]], other: str) -> float | None:
    values = [ratio(r, other) for r in results if other in r["times"]]
    return round(min(values), 3) if values else None


def run(device: str, rows_list: list[int], sizes: list[int], seconds: float) -> dict[str, Any]:
    limits = ceilings(device)
    print("ceilings:", limits)
    compute = torch.float32 if device == "cpu" else torch.bfloat16
    dequantize, forward, backward = [], [], []
    for size in sizes:
        weight = make_weight(size, device)
        for dtype in (torch.float32, torch.bfloat16):
            runs = dequantize_runs(weight, dtype, device)
            times = compare(runs, device, seconds=seconds, at_least=5)
            mib = {name: peak_mib(r, device) for name, r in runs.items()}
            dequantize.append({"size": size, "dtype": str(dtype), "times": times, "peak_mib": mib})
            moved = weight.nbytes + size * size * dtype.itemsize
            for name, t in times.items():
                gbps = moved / t["best_ms"] / 1e6
                print(f"dequantize {size} {dtype} {name}: {t['best_ms']} ms, {gbps:.1f} GB/s")
        for rows in rows_list:
            for table, back in ((forward, False), (backward, True)):
                runs = linear_runs(weight, rows, compute, device, back)
                times = compare(runs, device, seconds=seconds, at_least=5)
                mib = {name: peak_mib(r, device) for name, r in runs.items()}
                table.append({"size": size, "rows": rows, "times": times, "peak_mib": mib})
                what = "gradient" if back else "linear"
                for name, t in times.items():
                    tflops = 2 * rows * size * size / t["best_ms"] / 1e9
                    print(
                        f"{what} {size} M={rows} {name}: best {t['best_ms']} ms "
                        f"(median {t['median_ms']}), {tflops:.3f} TFLOP/s, {mib[name]} MiB"
                    )
    small = [r for r in forward if r["rows"] < SMALL_M]
    large = [r for r in forward if r["rows"] >= SMALL_M]
    large_gradient = [r for r in backward if r["rows"] >= SMALL_M]
    return {
        "benchmark": "nf4",
        "ratios": {
            "dequantize": worst(dequantize, "bitsandbytes"),
            "linear_small_m": worst(small, "bitsandbytes"),
            "linear_large_m": worst(large, "bitsandbytes"),
            "dense_large_m": worst(large, "dense"),
            "gradient_large_m": worst(large_gradient, "bitsandbytes"),
            "gradient_dense_large_m": worst(large_gradient, "dense"),
        },
        "ceilings": limits,
        "dequantize": dequantize,
        "linear": forward,
        "gradient": backward,
        **machine(device),
    }


@pytest.mark.parametrize("name", ["ours:auto", "bitsandbytes"])
def test_dequantize(benchmark: Any, name: str) -> None:
    runs = dequantize_runs(make_weight(1024, "cpu"), torch.float32, "cpu")
    if name not in runs:
        pytest.skip(f"{name} is not installed")
    benchmark(runs[name])


@pytest.mark.parametrize("name", ["ours:auto", "dense", "bitsandbytes"])
@pytest.mark.parametrize("rows", [1, 64, 512])
def test_linear(benchmark: Any, name: str, rows: int) -> None:
    runs = linear_runs(make_weight(1024, "cpu"), rows, torch.float32, "cpu", False)
    if name not in runs:
        pytest.skip(f"{name} is not installed")
    benchmark(runs[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", help="rows of x")
    args = parser.parse_args()
    apply_arguments(args)
    rows = [1, 8, 64, 512, 1024, 4096] if args.device == "cpu" else [1, 64, 512, 2048, 8192]
    rows = args.rows or ([1, 64, 512] if args.quick else rows)
    seconds = 0.5 if args.quick else 0.2 if args.device == "cuda" else 2.0
    print(json.dumps(run(args.device, rows, [1024] if args.quick else [1024, 4096], seconds)))


if __name__ == "__main__":
    run_script(main)

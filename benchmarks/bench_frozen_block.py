"""RMSNorm, gated activation and RoPE, forward and input gradient: time and memory.

    python benchmarks/bench_frozen_block.py [--device cuda] [--threads 1 --clock cpu]
    pytest benchmarks/bench_frozen_block.py --benchmark-only

Against what an unmodified transformers Llama does, as it is and through torch.compile (with
`--compile`). CPU in fp32, CUDA in bf16. Correctness first: every contender agrees with the plain
code, else no number. The last line is JSON; `ratios` are the plain code's best time over ours, at
the worst shape, by part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _timing import add_arguments, apply_arguments, ceilings, compare, machine, peak_mib, run_script
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from userip_fast import ops

Runs = dict[str, Callable[[], Any]]
PARTS = ("rms_norm", "gated", "rotate")


def make_runs(part: str, rows: int, dim: int, device: str, compiled: bool = False) -> Runs:
    """Name -> outputs and gradients of one part of a block of `dim` columns."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    plain: Callable[..., Any]
    if part == "rms_norm":
        norm = LlamaRMSNorm(dim).to(device, dtype).requires_grad_(False)
        inputs = [make(rows, dim), make(rows, dim)]

        def plain(x: Any, residual: Any) -> Any:
            total = residual + x
            return norm(total), total

        def fused(x: Any, residual: Any) -> Any:
            return ops.rms_norm(x, norm.weight, residual=residual, eps=norm.variance_epsilon)

    elif part == "gated":
        inputs = [make(rows, dim * 11 // 4), make(rows, dim * 11 // 4)]

        def plain(gate: Any, up: Any) -> Any:
            return (torch.nn.functional.silu(gate) * up,)

        def fused(gate: Any, up: Any) -> Any:
            return (ops.gated(gate, up),)

    else:
        size = 128 if dim >= 1024 else 32
        angle = torch.randn(rows, size // 2, device=device)
        cosine, sine = (torch.cat([f(angle)] * 2, 1).to(dtype) for f in (torch.cos, torch.sin))
        inputs = [make(rows, dim // size, size), make(rows, dim // size, size)]

        def plain(q: Any, k: Any) -> Any:
            q, k = (x.transpose(0, 1)[None] for x in (q, k))
            turned = apply_rotary_pos_emb(q, k, cosine[None], sine[None])
            return tuple(x[0].transpose(0, 1) for x in turned)

        def fused(q: Any, k: Any) -> Any:
            return ops.rotate(q, cosine, sine), ops.rotate(k, cosine, sine)

    leaves = [x.requires_grad_() for x in inputs]
    gradients = [torch.randn_like(o.detach()) for o in plain(*leaves)]

    def run(function: Callable[..., Any]) -> Any:
        out = function(*leaves)
        return *out, *torch.autograd.grad(out, leaves, gradients)

    runs: Runs = {"ours": lambda: run(fused), "plain": lambda: run(plain)}
    if compiled:
        faster = torch.compile(plain)
        runs["compiled"] = lambda: run(faster)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    for name, contender in runs.items():
        for got, want in zip(contender(), runs["plain"](), strict=True):
            error = (got - want).detach().abs().max() / want.detach().abs().max()
            assert error < limit, f"{name}: {error}"
    return runs


def run(device: str, shapes: list[tuple[int, int]], seconds: float, compiled: bool) -> Any:
    limits = ceilings(device)
    print("ceilings:", limits)
    results = []
    for part in PARTS:
        for rows, dim in shapes:
            runs = make_runs(part, rows, dim, device, compiled)
            times = compare(runs, device, seconds=seconds)
            mib = {name: peak_mib(r, device) for name, r in runs.items()}
            results.append(
                {"part": part, "rows": rows, "dim": dim, "times": times, "peak_mib": mib}
            )
            for name, t in times.items():
                print(f"{part} T={rows} D={dim} {name}: best {t['best_ms']} ms, {mib[name]} MiB")
    others = [n for n in results[0]["times"] if n != "ours"]
    return {
        "benchmark": "frozen_block",
        "ratios": {
            f"{part} {other}": round(
                min(
                    r["times"][other]["best_ms"] / r["times"]["ours"]["best_ms"]
                    for r in results
                    if r["part"] == part
                ),
                3,
            )
            for part in PARTS
            for other in others
        },
        "ceilings": limits,
        "results": results,
        **machine(device),
    }


@pytest.mark.parametrize("name", ["ours", "plain"])
@pytest.mark.parametrize("part", PARTS)
def test_frozen_block(benchmark: Any, part: str, name: str) -> None:
    benchmark(make_runs(part, 1024, 128, "cpu")[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile's code too")
    args = parser.parse_args()
    apply_arguments(args)
    if args.device == "cpu":
        shapes = [(2048, 128)] if args.quick else [(8192, 128), (2048, 1024)]
    else:
        shapes = [(8192, 4096)]
    seconds = 0.5 if args.quick or args.device == "cuda" else 3.0
    print(json.dumps(run(args.device, shapes, seconds, args.compile)))


if __name__ == "__main__":
    run_script(main)

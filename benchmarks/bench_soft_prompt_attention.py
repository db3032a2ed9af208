"""soft_prompt_attention against padded SDPA, FlexAttention and the varlen route.

    python benchmarks/bench_soft_prompt_attention.py [--device cuda] [--threads N] [--clock cpu]
    pytest benchmarks/bench_soft_prompt_attention.py --benchmark-only

Forward plus dq, dk, dv of one layer; CPU in fp32, CUDA in bf16. Every contender computes the same
masked attention and must agree with the reference on the rows that exist, else no number. The
padded baseline is given its padded tensors and its dense mask for free, FlexAttention its compiled
block mask; "flex with mask" adds the building of that mask. On CUDA "whole prompts" are what a
model without this op would run: flash kernels over whole prompts, prefix rows repeated per user,
under a plain causal mask (another result, so its cost only), by torch and, where installed,
flash-attn. A name with "fwd" is the forward pass alone. The last line is JSON: `ratios` are the
other's best time over ours at the worst shape.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _timing import add_arguments, apply_arguments, ceilings, compare, machine, peak_mib, run_script

from userip_fast import ops
from userip_fast.core.errors import UnavailableError

Result = tuple[torch.Tensor, ...]  # out, dq, dk, dv of the packed rows


class Shape(NamedTuple):
    users: int
    behaviour: int  # mean tokens of behaviour; lengths run from 0.3 to 3 times that
    fields: int
    heads: int
    kv_heads: int
    dim: int


CPU_SHAPES = [Shape(300, 25, 2, 4, 4, 32), Shape(32, 100, 2, 8, 8, 64), Shape(50, 50, 8, 8, 8, 64)]
CUDA_SHAPES = [
    Shape(27, 300, 2, 32, 32, 128),
    Shape(140, 50, 8, 32, 32, 128),
    Shape(8, 1000, 2, 32, 8, 128),
]
NAME_TOKENS = 16  # of each field


class Problem:
    """One pack: ragged users, and the tensors of every contender."""

    def __init__(self, shape: Shape, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        j = shape.fields
        spread = torch.empty(shape.users).exponential_(1.0, generator=g).clamp(0.3, 3.0)
        lengths = j + (spread * shape.behaviour / spread.mean()).long().clamp(min=1)
        self.cu = F.pad(lengths.cumsum(0), (1, 0)).int()
        rows, self.prefix = int(self.cu[-1]), 1 + NAME_TOKENS * j
        self.segment = torch.full((rows,), j, dtype=torch.int32)
        for start in self.cu[:-1].tolist():
            self.segment[start : start + j] = torch.arange(j)
        names = torch.arange(j).repeat_interleave(NAME_TOKENS)
        self.prefix_segment = torch.cat([torch.tensor([-1]), names]).int()
        self.shape, self.device, self.scale = shape, device, shape.dim**-0.5
        dtype = torch.float32 if device == "cpu" else torch.bfloat16

        def random(n: int, heads: int) -> torch.Tensor:
            return torch.randn(n, heads, shape.dim, generator=g).to(device, dtype)

        self.q, self.d_out = random(rows, shape.heads), random(rows, shape.heads)
        self.k, self.v = random(rows, shape.kv_heads), random(rows, shape.kv_heads)
        self.prefix_k = random(self.prefix, shape.kv_heads)
        self.prefix_v = random(self.prefix, shape.kv_heads)
        self.longest = int(lengths.max())

    def ours(self, impl: str, forward_only: bool = False) -> Callable[[], Result]:
        leaves = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        position = torch.zeros_like(self.segment)
        ints = (self.segment, self.prefix_segment, self.cu, position, position[: self.prefix])
        pack = tuple(x.to(self.device) for x in ints)

        def run() -> Result:
            out = ops.soft_prompt_attention(
                *leaves,
                self.prefix_k,
                self.prefix_v,
                *pack,
                num_fields=self.shape.fields,
                scale=self.scale,
                max_seqlen=self.longest,
                impl=impl,
            )
            if forward_only:
                return (out.detach(),)
            return out.detach(), *torch.autograd.grad(out, leaves, self.d_out)

        return run

    def padded_sdpa(self) -> tuple[Callable[[], Any], Callable[[Any], Result]]:
        """Every user padded to the longest, behind its own copy of the prefix."""
        n, p, j = self.longest, self.prefix, self.shape.fields
        index = torch.full((self.shape.users, n), -1)
        for u, (a, b) in enumerate(pairwise(self.cu.tolist())):
            index[u, : b - a] = torch.arange(a, b)
        real = index >= 0
        index = index.clamp(min=0)
        s_r = self.segment[index]
        s_c = torch.cat([self.prefix_segment.expand(self.shape.users, p), s_r], 1)
        limit = torch.where(s_r >= j, j, 0).unsqueeze(2)
        ok = (s_c.unsqueeze(1) == s_r.unsqueeze(2)) | (s_c.unsqueeze(1) < limit)
        ok &= torch.ones(n, p + n, dtype=torch.bool).tril(p)
        mask = ok.unsqueeze(1).to(self.device)
        index, real = index.to(self.device), real.to(self.device)
        q, k, v = (x[index].transpose(1, 2).requires_grad_() for x in (self.q, self.k, self.v))
        grad = (self.d_out[index] * real[..., None, None]).transpose(1, 2)

        def run() -> Any:
            keys, values = (
                torch.cat([c.transpose(0, 1).expand(x.shape[0], -1, -1, -1), x], 2)
                for c, x in ((self.prefix_k, k), (self.prefix_v, v))
            )
            out = F.scaled_dot_product_attention(
                q, keys, values, mask, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)

        return run, lambda xs: tuple(x.transpose(1, 2)[real] for x in xs)

    def whole_prompts(self, library: str, forward_only: bool = False) -> Callable[[], Result]:
        """Flash attention of every user's whole prompt, prefix rows and all, plainly causal."""
        lengths = self.cu.diff() + self.prefix
        cu = F.pad(lengths.cumsum(0), (1, 0)).int().to(self.device)
        rows, most, gqa = int(lengths.sum()), int(lengths.max()), self.q.shape[1] != self.k.shape[1]
        like = [self.q, self.k, self.v]
        if library == "torch":
            from torch.nn.attention.varlen import varlen_attn

            known = inspect.signature(varlen_attn).parameters  # they differ by torch's version
            options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
            if "enable_gqa" in known:
                options["enable_gqa"] = gqa
            else:
                like = [self.q] * 3
        q, k, v = (
            torch.randn(rows, *x.shape[1:], device=self.device, dtype=x.dtype).requires_grad_()
            for x in like
        )
        d_out = torch.randn_like(q)
        if library == "torch":

            def attend() -> Any:
                return varlen_attn(q, k, v, cu, cu, most, most, scale=self.scale, **options)
        else:
            from flash_attn import flash_attn_varlen_func

            def attend() -> Any:
                return flash_attn_varlen_func(
                    q, k, v, cu, cu, most, most, softmax_scale=self.scale, causal=True
                )

        def run() -> Result:
            with torch.set_grad_enabled(not forward_only):
                out = attend()
            return (out,) if forward_only else torch.autograd.grad(out, (q, k, v), d_out)

        return run

    def flex(
        self, compiled: bool = True, forward_only: bool = False
    ) -> tuple[Callable[[], Result], Callable[[], Any]]:
        """FlexAttention over [prefix | pack], compiled; and the building of its block mask."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        p, j = self.prefix, self.shape.fields
        user = torch.repeat_interleave(torch.arange(self.shape.users), self.cu.diff())
        user_c = F.pad(user, (p, 0), value=-1).to(self.device)
        user_r, s_r = user.to(self.device), self.segment.to(self.device)
        s_c = torch.cat([self.prefix_segment, self.segment]).to(self.device)

        def mask(b: Any, h: Any, r: Any, c: Any) -> Any:
            seen = (s_r[r] == s_c[c]) | (s_c[c] < torch.where(s_r[r] >= j, j, 0))
            return seen & ((c < p) | ((user_c[c] == user_r[r]) & (c <= r + p)))

        rows = self.q.shape[0]

        def made() -> Any:
            return create_block_mask(mask, None, None, rows, p + rows, device=self.device)

        build = torch.compile(made) if compiled else made
        block_mask, attend = build(), torch.compile(flex_attention) if compiled else flex_attention
        leaves = [x.clone().requires_grad_(not forward_only) for x in (self.q, self.k, self.v)]

        def run() -> Result:
            q, k, v = leaves
            keys, values = torch.cat([self.prefix_k, k]), torch.cat([self.prefix_v, v])
            out = attend(
                *(x.transpose(0, 1).unsqueeze(0) for x in (q, keys, values)),
                block_mask=block_mask,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out = out.squeeze(0).transpose(0, 1)
            if forward_only:
                return (out,)
            return out.detach(), *torch.autograd.grad(out, leaves, self.d_out)

        return run, build


def make_runs(shape: Shape, device: str) -> dict[str, Callable[[], Any]]:
    """Contenders that agree with the reference, by name."""
    problem = Problem(shape, device)
    want = problem.ours("reference")()
    padded, unpad = problem.padded_sdpa()
    runs: dict[str, Callable[[], Any]] = {
        "ours": problem.ours("auto"),
        "reference": problem.ours("reference"),
        "padded sdpa": padded,
    }
    same: dict[str, Callable[[Any], Result]] = {"padded sdpa": unpad}
    if device == "cuda":
        runs["flex"], build = problem.flex()
        try:
            varlen = problem.ours("varlen")
            varlen()
            runs["varlen"] = varlen
        except UnavailableError as e:
            print("varlen:", e)
    for name, run in runs.items():
        for got, x in zip(same.get(name, lambda r: r)(run()), want, strict=True):
            error = float((got.float() - x.float()).abs().max() / x.float().abs().max())
            assert error < (1e-4 if device == "cpu" else 3e-2), f"{name}: {error}"
    if device == "cuda":
        runs["flex with mask"] = lambda: (build(), runs["flex"]())
        runs["ours fwd"] = problem.ours("auto", forward_only=True)
        for library in ("torch", "flash-attn"):
            if library == "torch" or importlib.util.find_spec("flash_attn"):
                runs[f"whole prompts {library}"] = problem.whole_prompts(library)
                runs[f"whole prompts {library} fwd"] = problem.whole_prompts(library, True)
    return runs


def run(device: str, shapes: list[Shape], seconds: float) -> dict[str, Any]:
    limits = ceilings(device)
    print("ceilings:", limits)
    results = []
    for shape in shapes:
        runs = make_runs(shape, device)
        times = compare(runs, device, seconds=seconds)
        best = {name: t["best_ms"] for name, t in times.items()}
        ratios = {
            name: round(ms / best["ours fwd" if name.endswith("fwd") else "ours"], 2)
            for name, ms in best.items()
            if not name.startswith("ours")
        }
        entry = {
            "shape": shape._asdict(),
            "times": times,
            "ratios": ratios,
            "peak_mib": {n: peak_mib(runs[n], device) for n in ("ours", "padded sdpa")},
        }
        print(entry)
        results.append(entry)
    others = results[0]["ratios"]
    return {
        "benchmark": "soft_prompt_attention",
        "ratios": {name: min(r["ratios"][name] for r in results) for name in others},
        "ceilings": limits,
        "results": results,
        **machine(device),
    }


def test_soft_prompt_attention(benchmark: Any) -> None:
    benchmark(make_runs(Shape(20, 30, 2, 2, 2, 16), "cpu")["ours"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    apply_arguments(arguments)
    shapes = CPU_SHAPES if arguments.device == "cpu" else CUDA_SHAPES
    if arguments.quick:
        shapes = [Shape(20, 30, 2, 4, 2, 16)]
    seconds = 1.0 if arguments.quick or arguments.device == "cuda" else 8.0
    print(json.dumps(run(arguments.device, shapes, seconds)))


if __name__ == "__main__":
    run_script(main)

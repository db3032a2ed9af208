"""Steps with operators alone: what the device gives, attention, nearest codewords, posteriors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bench_assign_codes
import bench_event_table
import torch
from _timing import ceilings as device_ceilings
from _timing import compare
from bench_soft_prompt_attention import Problem

from gpu_steps.lm import kernels
from gpu_steps.record import Figures, Wrong
from gpu_steps.setting import Setting
from userip_fast import ops
from userip_fast.lm.fp8 import quantize_rows, scaled_product

Run = Callable[[], Any]


def ceilings(setting: Setting, figures: Figures) -> None:
    """GEMM, read and copy rates; FP8 products of a layer with fast and slow sums, beside bf16."""
    if setting.device == "cuda":  # on a CPU these take gigabytes and seconds
        figures |= device_ceilings(setting.device)
    rows, (d, f) = setting.rows, (4096, 11008) if setting.device == "cuda" else (64, 128)
    figures["fp8_tflops"] = found = {}
    for name, out, inner in (("qkv", 3 * d, d), ("o", d, d), ("gate_up", 2 * f, d), ("down", d, f)):
        x, w = (
            torch.randn(n, inner, device=setting.device, dtype=setting.dtype) for n in (rows, out)
        )
        a, b = quantize_rows(x), quantize_rows(w)
        runs: dict[str, Run] = {
            "fast": lambda a=a, b=b: scaled_product(*a, *b, setting.dtype, fast=True),
            "slow": lambda a=a, b=b: scaled_product(*a, *b, setting.dtype, fast=False),
            "unrounded": lambda x=x, w=w: x @ w.T,
            "cast": lambda x=x: quantize_rows(x),
        }
        times = compare(runs, setting.device, seconds=setting.seconds / 4)
        flop = 2e-9 * rows * inner * out
        found[name] = {n: round(flop / t["best_ms"], 2) for n, t in times.items() if n != "cast"}
        found[name]["cast_ms"] = times["cast"]["best_ms"]


def attention(setting: Setting, figures: Figures) -> None:
    """Forward, and forward with backward, at real shapes; FlexAttention last, as it compiles."""
    problems = {
        f"{s.users} users of {s.behaviour}, {s.heads}/{s.kv_heads} heads of {s.dim}": Problem(
            s, setting.device
        )
        for s in setting.attention
    }
    for name, problem in problems.items():
        found = figures[name] = {"left_out": {}}
        want = problem.ours("reference")()
        found["error"] = _same(problem.ours("auto")(), want, setting)
        runs = {"ours": problem.ours("auto"), "ours fwd": problem.ours("auto", forward_only=True)}
        for peer, make in {
            "torch varlen": lambda p=problem: p.whole_prompts("torch"),
            "torch varlen fwd": lambda p=problem: p.whole_prompts("torch", forward_only=True),
            "flash-attn": lambda p=problem: p.whole_prompts("flash-attn"),
            "flash-attn fwd": lambda p=problem: p.whole_prompts("flash-attn", forward_only=True),
            "our varlen route": lambda p=problem: p.ours("varlen"),
        }.items():
            _try(peer, make, runs, found)
        _compare(runs, setting, found)
    for name, problem in problems.items():
        found = figures[name]
        want = problem.ours("reference")()
        runs = {"ours": problem.ours("auto"), "ours fwd": problem.ours("auto", forward_only=True)}

        def flex(forward_only: bool, problem: Problem = problem, want: Any = want) -> Run:
            run, _ = problem.flex(compiled=setting.compiled, forward_only=forward_only)
            got = run()
            _same(got, want[: len(got)], setting)
            return run

        _try("FlexAttention", lambda flex=flex: flex(False), runs, found)
        _try("FlexAttention fwd", lambda flex=flex: flex(True), runs, found)
        _compare(runs, setting, found)


def assign_codes(setting: Setting, figures: Figures) -> None:
    """Nearest codewords, ids alone and with sums, against flash-kmeans or torch's best."""
    for codes, dim in setting.assign:
        found = figures[f"K={codes} D={dim}"] = {"left_out": {}}
        _assign(codes, dim, setting, found)


def _assign(codes: int, dim: int, setting: Setting, found: Figures) -> None:
    torch.manual_seed(0)
    n = setting.assign_bytes // (dim * setting.dtype.itemsize)
    x = torch.randn(min(n, 4096), dim, device=setting.device).to(setting.dtype)
    x = x.repeat(-(-n // 4096), 1)[:n]
    words = torch.randn(codes, dim, device=setting.device).to(setting.dtype)
    runs: dict[str, Run] = {
        "ours": lambda: ops.assign_codes(x, words),
        "ours, ids alone": lambda: ops.assign_code_ids(x, words),
        "ours, with sums": lambda: ops.assign_codes_with_stats(x, words),
    }
    found["gb"] = round(x.nbytes / 1e9, 3)
    plain = bench_assign_codes.torch_matmul(x, words)
    for peer, make in {
        "flash-kmeans": lambda: bench_assign_codes.flash_kmeans(x, words),
        "flash-kmeans iteration": lambda: bench_assign_codes.flash_kmeans_iteration(x, words),
        "torch": lambda: plain,
    }.items():
        _try(peer, make, runs, found, warm_up=False)
    if setting.compiled and "flash-kmeans" not in runs:
        runs["torch compiled"] = torch.compile(plain)
    for name, run in runs.items():
        if name != "flash-kmeans iteration":  # which gives new codewords
            bench_assign_codes.check(x, words, name, run())
    _compare(runs, setting, found)
    found["gb_per_s"] = {n: round(x.nbytes / ms / 1e6, 1) for n, ms in found["ms"].items()}
    found["kernels_ms"] = kernels(runs["ours"], setting)


def profile_posterior(setting: Setting, figures: Figures) -> None:
    """Posteriors of users from their events, against embedding_bag and read bandwidth."""
    read_rate = None
    if setting.device == "cuda":
        read_rate = device_ceilings(setting.device)["read_gb_per_s"]
        figures["read_gb_per_s"] = read_rate
    users = setting.table_users
    for codes in (16, 128):
        case = bench_event_table.make(users, codes, setting.device)
        runs = {name: build(case) for name, build in bench_event_table.CONTENDERS.items()}
        want = runs["embedding_bag"]()
        error = float((runs["ours"]() - want).abs().max())
        if not error < 1e-3:
            raise Wrong(f"profile_posterior and embedding_bag are {error:.1e} nats apart")
        found = figures[f"Z={codes}"] = {"error_nats": float(f"{error:.1e}")}
        _compare(runs, setting, found)
        nbytes = users * bench_event_table.EVENTS * (4 * codes + 8)
        found["users_per_s"] = round(1e3 * users / found["ms"]["ours"])
        found["gb_per_s"] = round(nbytes / found["ms"]["ours"] / 1e6, 1)
        if read_rate:
            found["share_of_bandwidth"] = round(found["gb_per_s"] / read_rate, 3)


def _try(
    name: str, make: Callable[[], Run], runs: dict[str, Run], found: Figures, warm_up: bool = True
) -> None:
    """Adds a peer, or tells why it is left out."""
    try:
        run = make()
        if warm_up:
            run()
        runs[name] = run
    except Exception as e:
        found["left_out"][name] = f"{type(e).__name__}: {(str(e) or '.').splitlines()[0]}"[:200]


def _compare(runs: dict[str, Run], setting: Setting, found: Figures) -> None:
    """Best times, and how many times as fast as each other ours is (`fwd` against `fwd`)."""
    times = compare(runs, setting.device, seconds=setting.seconds)
    best = {name: t["best_ms"] for name, t in times.items()}
    found.setdefault("ms", {}).update(best)
    found.setdefault("ours_is_faster", {}).update({
        name: round(ms / best["ours fwd" if name.endswith("fwd") else "ours"], 2)
        for name, ms in best.items()
        if not name.startswith("ours")
    })  # fmt: skip


def _same(got: Any, want: Any, setting: Setting) -> float:
    """Largest error of out, dq, dk and dv over the largest of each."""
    errors = [
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(got, want, strict=True)
    ]
    limit = 3e-2 if setting.dtype == torch.bfloat16 else 1e-4
    if not max(errors) < limit:
        raise Wrong(f"attention is {max(errors):.1e} from the reference")
    return float(f"{max(errors):.1e}")

"""Timing and memory of contenders side by side, for the scripts in this folder.

Contenders take turns, round after round and every other round in turned order, so that other load
on the machine, and what the one before leaves behind, hits all alike. Ratios are of the best time:
load only ever adds. Quantiles are reported beside it. On a machine that is never idle,
`--clock cpu --threads 1` counts the processor time of this process instead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from userip_fast.core import threads
from userip_fast.ops import isa
from userip_fast.testing import peak_bytes

Run = Callable[[], Any]


clock: Callable[[], float] = time.perf_counter  # on CPU
LOAD_BEFORE = os.getloadavg()[0]  # when the script began


def loaded() -> str | None:
    """Why gates of wall-clock times mean nothing here; None where the machine was this script's.

    Of processor time on one thread other load is kept out, as far as caches and memory allow.
    """
    cores = threads.affinity()
    if clock is time.perf_counter and 0.3 * cores < LOAD_BEFORE:
        return f"load average {LOAD_BEFORE:.2f} on {cores} processors when it began: no gates"
    return None


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's own `main`, started over where the environment would hold peers back.

    Raises:
        RuntimeError: `main` is not of the script that runs: whoever imports it keeps the process.
    """
    if main.__module__ != "__main__":
        raise RuntimeError("run_script is for scripts, under `__main__`; call main() instead")
    # A workaround for old OpenBLAS on new processors; it slows NumPy's, SciPy's and FAISS's.
    slow = {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"} & set(os.environ)
    if slow:
        environment = {k: v for k, v in os.environ.items() if k not in slow}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    main()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all scripts have."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--quick", action="store_true", help="few and small shapes")


def apply_arguments(arguments: argparse.Namespace) -> None:
    """Sets threads and clock.

    Raises:
        SystemExit: Processor time was asked for with several threads, of which it is the sum.
    """
    global clock
    threads.settle()
    isa.settle()  # measures, the first time; no contender should pay for that
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.clock == "cpu":
        if arguments.device == "cuda" or torch.get_num_threads() != 1:
            raise SystemExit("--clock cpu needs --device cpu --threads 1")
        clock = time.process_time


def time_ms(run: Run, device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = clock()
    run()
    return (clock() - begin) * 1e3


def compare(
    contenders: Mapping[str, Run],
    device: str,
    *,
    seconds: float = 2.0,
    rounds: int = 50,
    at_least: int = 3,
    warm_up: bool = True,
) -> dict[str, dict[str, float]]:
    """best_ms, p20_ms, median_ms and p80_ms of each contender.

    Args:
        contenders: Name -> what to time.
        device: "cpu" or "cuda".
        seconds: Stop after this long, but not before `at_least` rounds.
        rounds: Stop after so many rounds.
        at_least: See `seconds`.
        warm_up: Whether to call each once beforehand.
    """
    for run in contenders.values() if warm_up else ():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= at_least and time.perf_counter() - begin > seconds:
            break
        for name, run in list(contenders.items())[:: -1 if done % 2 else 1]:
            times[name].append(time_ms(run, device))
    out = {}
    for name, values in times.items():
        ordered = sorted(values)
        at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.0, 0.2, 0.5, 0.8)]
        keys = ("best_ms", "p20_ms", "median_ms", "p80_ms")
        out[name] = {k: round(v, 4) for k, v in zip(keys, at, strict=True)}
    return out


def worst_ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as long as ours each contender takes, at the shape where it is the least."""

    def best(result: dict[str, Any], name: str) -> float:
        return float(result["times"][name]["best_ms"])

    others = [name for name in results[0]["times"] if name != "ours"]
    return {n: round(min(best(r, n) / best(r, "ours") for r in results), 3) for n in others}


def peak_mib(run: Run, device: str) -> float:
    """Tensor memory in MiB that one call holds at its peak, its result included."""
    return round(peak_bytes(run, device) / 2**20, 2)


def ceilings(device: str) -> dict[str, float]:
    """The machine's best in this run: GEMM (fp32; bf16 on CUDA), read and copy bandwidth."""
    cuda = device == "cuda"
    n = 8192 if cuda else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    source = torch.randn((1 << 30 if cuda else 1 << 28) // 4, device=device)  # far beyond caches
    target = torch.empty_like(source)
    best = compare(
        {
            "gemm": lambda: a @ a,
            "sum": source.sum,
            "dot": lambda: torch.dot(source, source),
            "copy": lambda: target.copy_(source),
        },
        device,
        seconds=0.3 if cuda else 3.0,
    )
    read_ms = min(best["sum"]["best_ms"], best["dot"]["best_ms"])
    return {
        "gemm_tflops": round(2 * n**3 / best["gemm"]["best_ms"] / 1e9, 3),
        "read_gb_per_s": round(source.nbytes / read_ms / 1e6, 1),
        "copy_gb_per_s": round(2 * source.nbytes / best["copy"]["best_ms"] / 1e6, 1),
    }


def machine(device: str) -> dict[str, Any]:
    """Where and of what the numbers are."""
    name = torch.cuda.get_device_name() if device == "cuda" else isa.cpu_name()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "clock": "wall" if clock is time.perf_counter else "cpu",
        "torch": torch.__version__,
        "commit": commit or None,
        "cpu": isa.cpu_name(),
        "instruction_sets": isa.settle(),
        "processors": threads.affinity(),
        "quota": threads.quota(),
        "load_before": round(LOAD_BEFORE, 2),
        "load_average": round(os.getloadavg()[0], 2),
        "no_gates": loaded(),
    }

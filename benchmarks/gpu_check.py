"""One offline command for a GPU machine: build in place, gpu tests, sanitizers, benchmarks.

    make gpu-check PYTHON=python3
    python3 benchmarks/gpu_check.py [--minutes 15] [--only build tests memcheck bench_nf4 ...]

Needs torch, triton, transformers, pybind11, cmake, ninja and pytest already installed, no virtual
environment and no network; pytest-xdist makes it faster. Stages run in order of value, tests and
sanitizers side by side, each under its own limit and all under one; a failing stage does not stop
the next. Writes `gpu_check.json` and `gpu_check.log` to $OUT, or
to benchmarks/results/<device>/. Exit code: 0 when every stage that could run passed, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "flash-attn", "numpy", "pybind11")
SANITIZED = ["-m", "pytest", "-q", "-x", "-m", "gpu and sanitizer", "-p", "no:cacheprovider"]
PYTEST_NO_TESTS = 5
# Script -> seconds it may take. `bench_em_step` runs a model of Llama-2-7B's shape, many ways.
BENCHMARKS = {
    "bench_assign_codes": 240,
    "bench_soft_prompt_attention": 120,
    "bench_em_step": 240,
    "bench_nf4": 60,
    "bench_linear_cross_entropy": 60,
    "bench_event_table": 60,
    "bench_sparse_adam": 60,
    "bench_frozen_block": 60,
}
STAGES = ("build", "tests", "memcheck", "racecheck", *BENCHMARKS)


def describe() -> dict[str, Any]:
    """Device, driver, versions and commit; absent things are None."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return {
        "device": device,
        "driver": first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        ),
        "cuda": torch.version.cuda,
        "nvcc": first_line("nvcc", "--version", pattern=r"release ([0-9.]+)"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "commit": first_line(
            "git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"
        ),
    }


def first_line(*command: str, pattern: str = r"(.+)") -> str | None:
    """The pattern's group in what a command prints, None where command or match is absent."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    found = re.search(pattern, done.stdout)
    return found.group(1).strip() if done.returncode == 0 and found else None


class Runner:
    """Runs stages against one deadline and keeps what they said."""

    def __init__(self, seconds: float, log: TextIO, only: Sequence[str] = ()) -> None:
        self.deadline = time.monotonic() + seconds
        self.log = log
        self.only = only  # names of stages; none means all
        self.lock = threading.Lock()  # of the log and what is printed
        self.stages: dict[str, dict[str, Any]] = {}

    def skip(self, name: str, reason: str) -> None:
        print(f"{name}: skipped ({reason})", flush=True)
        self.stages[name] = {"status": "skipped", "reason": reason}

    def run(self, name: str, command: list[str], limit_s: float, **env: str) -> dict[str, Any]:
        """Runs one stage. Returns its record (passed, failed, timeout or skipped) and output."""
        if self.only and name not in self.only:
            return {"status": "skipped", "lines": []}
        started = time.monotonic()
        if self.deadline - started < 5:
            self.skip(name, "no time left")
            return {**self.stages[name], "lines": []}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # Its own session, so that a stage that hangs is ended with all it started.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=min(limit_s, self.deadline - started))
            status = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = "timeout"
        seconds = round(time.monotonic() - started, 1)
        lines = output.rstrip().splitlines()
        record = {"status": status, "seconds": seconds, "returncode": process.returncode}
        if "pytest" in command:
            record["summary"] = lines[-1] if lines else ""
            if process.returncode == PYTEST_NO_TESTS:
                record |= {"status": "skipped", "reason": "no test carries the marker"}
        if record["status"] in ("failed", "timeout"):
            record["tail"] = lines[-40:]
        with self.lock:
            self.stages[name] = record
            self.log.write(f"\n== {name}: {' '.join(command)}\n{output}\n")
            self.log.flush()
            print(
                f"{name}: {record['status']} in {seconds} s  {record.get('summary', '')}",
                flush=True,
            )
            if "tail" in record:
                print("    " + "\n    ".join(record["tail"][-15:]), flush=True)
        return {**record, "lines": lines}


def check(runner: Runner, capability: str | None) -> dict[str, Any]:
    """All stages, most valuable first. Returns the benchmarks' JSON by name."""
    python = sys.executable
    architecture = {"9.0": "9.0a", "10.0": "10.0a"}.get(capability or "", capability or "")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture
    runner.run(
        "build",
        [python, "setup.py", "build_ext", "--inplace"],
        150,
        TORCH_CUDA_ARCH_LIST=architectures,
    )
    if capability is None:
        for name in ("tests", "memcheck", "racecheck", "benchmarks"):
            runner.skip(name, "torch sees no CUDA device")
        return {}

    gpu_tests = {"USERIP_FAST_GPU_TESTS": "1", "HF_HUB_OFFLINE": "1"}
    spread = ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") else []
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", *spread, "-p", "no:cacheprovider"]
    sanitizer = shutil.which("compute-sanitizer")
    gpu_tests["OMP_NUM_THREADS"] = "2"
    with ThreadPoolExecutor() as pool:  # nothing is timed here
        stages = [pool.submit(runner.run, "tests", tests, 180, **gpu_tests)]
        for tool in ("memcheck", "racecheck"):
            if sanitizer is None:
                runner.skip(tool, "compute-sanitizer is not on the PATH")
                continue
            # torch's caching allocator would hide reads past the end of a tensor.
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **gpu_tests}
            command = [sanitizer, "--tool", tool, "--error-exitcode", "86", python, *SANITIZED]
            stages.append(pool.submit(runner.run, tool, command, 180, **env))
    for stage in stages:
        stage.result()

    results = {}
    for name, limit in BENCHMARKS.items():
        command = [python, str(ROOT / "benchmarks" / f"{name}.py"), "--device", "cuda"]
        record = runner.run(name, command, limit)
        if record["status"] != "passed":
            continue
        try:
            results[name] = json.loads(record["lines"][-1])
        except (IndexError, json.JSONDecodeError):
            runner.stages[name] |= {"status": "failed", "reason": "last line is not JSON"}
            print(f"{name}: failed, its last line is not JSON", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Checks userip_fast on this machine's GPU, offline."
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="limit of all stages together")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=[], help="these stages")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # it makes triton.compile fail

    machine = describe()
    device = machine["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") if device else "no-gpu"
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / slug)
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"device {device}, driver {machine['driver']}, packages {machine['packages']}", flush=True
    )
    with open(out / "gpu_check.log", "w", encoding="utf-8") as log:
        runner = Runner(arguments.minutes * 60 - 10, log, arguments.only)
        benchmarks = check(runner, device["capability"] if device else None)

    bad = [
        name for name, stage in runner.stages.items() if stage["status"] in ("failed", "timeout")
    ]
    ok = not bad and device is not None
    report = {"ok": ok, **machine, "stages": runner.stages, "benchmarks": benchmarks}
    (out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    verdict = "passed" if ok else f"FAILED: {', '.join(bad) or 'no CUDA device'}"
    print(f"gpu-check {verdict}; {out / 'gpu_check.json'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

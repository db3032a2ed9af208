"""Steps one after another, each within its seconds, each a JSON line as soon as it ends.

A line is one write to a file opened for appending, so whatever ends the process leaves the lines of
the steps that had ended. A step that fails, runs out of memory or out of time is told in its line,
with the figures it had by then, and the next one goes on; where the device itself is lost (an
illegal address spoils a process for good), or a step does not come back from its time, a fresh
process goes on behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "flash-kmeans",
    "flash-attn", "numpy",
)  # fmt: skip
STARTING_S = 60  # imports, and the first words with a driver
GRACE_S = 15  # in which a step has to come back from its time
LOST = 86  # exit code of a process whose device is lost
Figures = dict[str, Any]


class Skipped(Exception):  # noqa: N818 - not an error
    """A step that cannot be run here; the text says why."""


class Wrong(Exception):  # noqa: N818
    """What should be timed is not right, so it is not timed."""


class Over(BaseException):
    """Out of time, or told to stop: nothing on the way may take it for an error of its own."""


@dataclass(frozen=True)
class Step:
    """One line of the record.

    Attributes:
        run: Gets the setting, and puts what it finds into the figures as it goes.
        needs: Packages that it leaves peers out without.
    """

    name: str
    budget_s: int
    what: str
    run: Callable[[Any, Figures], None]
    needs: tuple[str, ...] = ()


def describe(device: str) -> dict[str, Any]:
    """Device, driver, versions and commit; absent things are None."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    name = platform.processor() or platform.machine()
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        name = f"{card.name}, {card.total_memory / 2**30:.1f} GiB, sm_{card.major}{card.minor}"
    return {
        "device": name,
        "driver": _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        ),
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version(), **versions},
        "commit": _first_line(
            "git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"
        ),
    }


def _first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def folder(device: str) -> Path:
    """Where results of this machine's device lie."""
    name = "stand-in"
    if device == "cuda":  # not by torch, which would begin a context here
        name = _first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or device
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / slug


def write(out: Path, line: dict[str, Any]) -> None:
    """Appends a line to the record, and says it in short."""
    with open(out, "ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())
        os.fsync(file.fileno())
    told = line.get("error") or json.dumps(line.get("figures", {}))
    print(
        f"{line['step']}: {line['status']} in {line['seconds']} of {line['budget_s']} s  "
        f"{told[:500]}",
        flush=True,
    )


def finished(out: Path) -> list[str]:
    """Names of the steps whose lines are there; half a line, of a full disk, is none."""
    names = []
    for line in out.read_bytes().split(b"\n")[:-1] if out.exists() else []:
        with contextlib.suppress(ValueError):
            names.append(str(json.loads(line)["step"]))
    return names


# ---- the process that measures


def work(steps: Sequence[Step], setting: Any, out: Path, until: float) -> int:
    """Runs the steps in this process; its exit code. `until`: of `time.time`, the end of all."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: not to be left behind
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    stopped: list[int] = []

    def over(number: int, _frame: Any) -> None:
        if number == signal.SIGTERM:
            stopped.append(number)
        raise Over

    signal.signal(signal.SIGALRM, over)
    signal.signal(signal.SIGTERM, over)
    about = describe(setting.device)
    for step in steps:
        line: dict[str, Any] = {"step": step.name, "status": "skipped", "seconds": 0.0}
        line |= {"budget_s": step.budget_s, **about, "setting": setting.name}
        seconds = min(step.budget_s, until - time.time())
        if seconds < 1:
            write(out, line | {"error": "no time left"})
            continue
        write(out, line | run(step, setting, seconds, stopped))
        if stopped:
            return 128 + signal.SIGTERM
        if not _cleaned(setting.device):
            return LOST
    return 0


def run(step: Step, setting: Any, seconds: float, stopped: Sequence[int]) -> dict[str, Any]:
    """One step within `seconds`: status, seconds, figures, and the error where there was one."""
    begin, figures = time.perf_counter(), {}
    status, error = "ok", None
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            step.run(setting, figures)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Over:
        status, error = "stopped" if stopped else "over budget", f"ended after {seconds:.0f} s"
    except Skipped as e:
        status, error = "skipped", str(e)
    except Wrong as e:
        status, error = "wrong", str(e)
    except (Exception, SystemExit) as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        status, error = "failed", f"{type(e).__name__} at {where}: {str(e)[:1000]}"
        traceback.clear_frames(e.__traceback__)  # they hold what did not fit into memory
    out = {"status": status, "seconds": round(time.perf_counter() - begin, 1), "figures": figures}
    return out | ({"error": error} if error else {})


def _cleaned(device: str) -> bool:
    """Frees what a step left behind; False where the device does not answer any more."""
    import torch

    gc.collect()
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0)
    except Exception as e:
        print(f"the device is lost: {e}", flush=True)
        return False
    return True


# ---- the process that looks after it


def supervise(
    steps: Sequence[Step],
    out: Path,
    seconds: float,
    worker: Callable[[list[str], float], list[str]],
) -> None:
    """Runs all steps within `seconds`, in one process as long as nothing goes badly wrong.

    Args:
        worker: The command that runs the steps of these names until this time.
    """
    until = time.time() + seconds
    left = list(steps)
    with _stopping() as stopped:
        while left and not stopped:
            if time.time() >= until:
                for step in left:
                    _write_lost(out, step, "skipped", "no time left")
                return
            command = worker([step.name for step in left], until)
            process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
            try:
                why = _follow(process, left, out, until, stopped)
            finally:
                _end(process)
            done = finished(out)
            before, left = len(left), [step for step in left if step.name not in done]
            if left and (why is not None or len(left) == before) and not stopped:
                _write_lost(out, left.pop(0), "failed", why or "the process ended before it")


def _write_lost(out: Path, step: Step, status: str, why: str) -> None:
    """The line of a step whose process cannot write it."""
    line = {"step": step.name, "status": status, "seconds": None, "budget_s": step.budget_s}
    write(out, line | {"error": why})


def _follow(
    process: subprocess.Popen[bytes], steps: list[Step], out: Path, until: float,
    stopped: list[int],
) -> str | None:  # fmt: skip
    """Waits for a process. Returns what is wrong with it, None where it ended as it should."""
    told, since = -1, time.time()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.2)
            return None if code in (0, LOST) else f"the process ended with exit code {code}"
        if stopped:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            return None
        done = [step for step in steps if step.name in finished(out)]
        if len(done) > told:
            told, since = len(done), time.time()
        if len(done) == len(steps):
            continue
        budget = min(steps[len(done)].budget_s, max(0.0, until - since))
        allowed = budget + GRACE_S + (0 if done else STARTING_S)
        if time.time() - since > allowed:
            return "it did not come back from its time, and its process was ended"


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all it started, should it have left any of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """Signals that asked to stop, as a list that grows."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: asked.append(n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gpu_tests(files: Sequence[str]) -> Callable[[Any, Figures], None]:
    """A step that runs tests marked `gpu`, in a process without Triton's interpreter."""

    def run(setting: Any, figures: Figures) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", *files]
        command += ["-p", "no:cacheprovider"]
        if setting.device == "cuda" and find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path}
        if setting.device == "cuda":
            env |= {"USERIP_FAST_GPU_TESTS": "1"}
            env.pop("TRITON_INTERPRET", None)
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT
            )
            try:
                process.wait()
            finally:
                process.kill()
                said.seek(0)
                lines = said.read().rstrip().splitlines()
                figures["summary"] = lines[-1] if lines else ""
        if process.returncode:
            raise Wrong("\n".join(lines[-30:]))

    return run

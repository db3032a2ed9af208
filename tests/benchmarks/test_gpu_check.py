"""`make gpu-check` without a GPU: all its steps, tiny, and what becomes of steps that go wrong."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_steps.record")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_runs_on_a_cpu(script: ModuleType, tmp_path: Path) -> None:
    """The code that a GPU will run, in a process of its own, with tiny sizes; two calls in all."""
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--stand-in", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (out,) = tmp_path.glob("gpu_check-*.jsonl")
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [step.name for step in script.STEPS]
    for line in lines:
        assert line["status"] == "ok", line
        assert {"seconds", "budget_s", "device", "versions", "commit"} <= line.keys()
        assert line["setting"] == "stand-in"
    figures = {line["step"]: line["figures"] for line in lines}
    for name in ("em_bf16", "em_fp8", "em_streamed"):
        assert figures[name]["training_tokens_per_s"] > 0
        assert figures[name]["whole_stack"]
        assert len(figures[name]["kernels_ms"]) > 5
    assert figures["em_bf16"]["error"] < 1e-5
    assert figures["em_streamed"]["error"] < 1e-5
    assert figures["inference"]["posterior"]["passes_a_user"] > 1
    assert figures["inference"]["event_table"]["combinations"] == 9
    assert set(figures["em_small"]) == {"rows_64", "rows_128"}
    for found in figures["attention"].values():
        assert found["ms"].keys() == {"ours", "ours fwd", "FlexAttention fwd"}
        assert "backward on CPU" in found["left_out"]["FlexAttention"]
        assert found["left_out"].keys() >= {"torch varlen", "torch varlen fwd", "our varlen route"}
    for found in figures["assign_codes"].values():
        assert {"ours", "ours, ids alone", "ours, with sums", "torch"} <= found["ms"].keys()
    peers = figures["em_peers"]
    for name in ("peft", "peft_checkpoints", "peft_liger", "peft_bnb", "peft_bnb_checkpoints"):
        assert (name in peers) != (name in peers["left_out"]), name


def test_the_plan_fits_and_names_what_travels(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flash_kmeans-0.3.1-py3-none-any.whl").write_bytes(bytes(1 << 20))
    assert script.main(["--plan", "--wheels", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for step in script.STEPS:
        assert f"| {step.budget_s} | {step.name} |" in printed
    assert sum(step.budget_s for step in script.STEPS) + 60 <= 600  # and the time to start
    assert "flash_kmeans-0.3.1-py3-none-any.whl, 1.0 MiB" in printed


def step(record: ModuleType, run: Any, budget: int = 30) -> Any:
    return record.Step("one", budget, "", run)


def test_a_step_ends_in_a_line_whatever_happens(record: ModuleType) -> None:
    def ran(run: Any, seconds: float = 30.0) -> dict[str, Any]:
        return dict(record.run(step(record, run), None, seconds, ()))

    def ok(_setting: Any, figures: Any) -> None:
        figures["ms"] = 1.5

    def wrong(_setting: Any, figures: Any) -> None:
        figures["error"] = 3.0
        raise record.Wrong("3.0 apart")

    def out_of_memory(_setting: Any, _figures: Any) -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory")

    def swallows(_setting: Any, figures: Any) -> None:
        figures["begun"] = True
        for _ in range(1000):
            try:
                time.sleep(10)
            except Exception:
                figures["swallowed"] = True

    def skipped(_setting: Any, _figures: Any) -> None:
        raise record.Skipped("no such card")

    assert ran(ok)["figures"] == {"ms": 1.5}
    assert ran(ok)["status"] == "ok"
    assert (ran(wrong)["status"], ran(wrong)["figures"]) == ("wrong", {"error": 3.0})
    found = ran(out_of_memory)
    assert found["status"] == "failed"
    assert "out of memory" in found["error"].lower()
    assert "test_gpu_check.py:" in found["error"]
    assert ran(skipped) | {"seconds": 0} == {
        "status": "skipped", "seconds": 0, "figures": {}, "error": "no such card",
    }  # fmt: skip
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(record.Over()))
    try:
        found = ran(swallows, 0.3)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (found["status"], found["figures"]) == ("over budget", {"begun": True})
    assert found["seconds"] < 10


STEPS = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, {benchmarks!r})
from gpu_steps import record
from gpu_steps.record import Step

record.STARTING_S, record.GRACE_S = 20, 1


@dataclass
class Setting:
    name = "stand-in"
    device = "cpu"


def good(setting, figures):
    figures["pid"] = os.getpid()


def bad(setting, figures):
    raise RuntimeError("no")


def lost(setting, figures):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(setting, figures):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
    time.sleep(60)


def slow(setting, figures):
    figures["begun"] = True
    Path({began!r}).touch()
    time.sleep(60)


KINDS = {{f.__name__.rstrip("0123456789"): f for f in (good, bad, lost, hangs, slow)}}
names, out = sys.argv[1].split(","), Path({out!r})
steps = [Step(n, {budget}, "", KINDS[n.rstrip("0123456789")]) for n in names]
if len(sys.argv) > 2:
    sys.exit(record.work(steps, Setting(), out, float(sys.argv[2])))


def worker(names, until):
    return [sys.executable, __file__, ",".join(names), repr(until)]


record.supervise(steps, out, {seconds}, worker)
"""


def supervised(
    tmp_path: Path, names: str, budget: int = 2, seconds: float = 60.0
) -> tuple[subprocess.Popen[str], Path, Path]:
    out, began, file = tmp_path / "out.jsonl", tmp_path / "began", tmp_path / "steps.py"
    text = textwrap.dedent(STEPS).format(
        benchmarks=str(BENCHMARKS), out=str(out), began=str(began), budget=budget, seconds=seconds
    )
    file.write_text(text)
    process = subprocess.Popen(
        [sys.executable, str(file), names], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    return process, out, began


def runs(pid: int) -> bool:
    """Whether there is such a process, and it is not merely waiting for its parent to look."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_the_next_step_goes_on(tmp_path: Path) -> None:
    """Behind a failure in the same process; behind a crash and a step that hangs in a fresh one."""
    process, out, _ = supervised(tmp_path, "good1,bad,good2,lost,good3,hangs,good4")
    printed, _ = process.communicate(timeout=120)
    lines = {line["step"]: line for line in lines_of(out)}
    assert {name: line["status"] for name, line in lines.items()} == {
        "good1": "ok", "bad": "failed", "good2": "ok", "lost": "failed", "good3": "ok",
        "hangs": "failed", "good4": "ok",
    }, printed  # fmt: skip
    pids = [lines[f"good{i}"]["figures"]["pid"] for i in (1, 2, 3, 4)]
    assert pids[0] == pids[1]
    assert len(set(pids)) == 3
    assert "exit code -9" in lines["lost"]["error"]
    assert "did not come back" in lines["hangs"]["error"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_measured_stays_when_the_run_is_ended(tmp_path: Path, how: signal.Signals) -> None:
    process, out, began = supervised(tmp_path, "good,slow,bad", budget=60)
    until = time.monotonic() + 60
    while not began.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(how)
    process.communicate(timeout=30)
    lines = lines_of(out)
    assert [line["status"] for line in lines] == ["ok", "stopped"][: 1 + (how == signal.SIGTERM)]
    if how == signal.SIGTERM:
        assert lines[1]["figures"] == {"begun": True}
    until = time.monotonic() + 10
    while runs(lines[0]["figures"]["pid"]):  # nothing is left behind, whatever ended the run
        assert time.monotonic() < until
        time.sleep(0.05)


def test_no_step_starts_when_the_time_is_up(tmp_path: Path) -> None:
    process, out, _ = supervised(tmp_path, "good,bad", seconds=0.5)
    process.communicate(timeout=60)
    assert [line["status"] for line in lines_of(out)] == ["skipped", "skipped"]
    assert lines_of(out)[0]["error"] == "no time left"


def test_wheels_are_brought_without_being_installed(script: ModuleType, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought/__init__.py", "answer = 42\n")
    script.unpack(tmp_path, tmp_path / "into")
    code = "import brought; print(brought.answer)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "into")}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert found.stdout.strip() == b"42"

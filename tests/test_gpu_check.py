"""The stage runner of `make gpu-check`: limits, failures and the report, without a GPU."""

from __future__ import annotations

import importlib.util
import io
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_stages_are_kept_apart(gpu_check: ModuleType) -> None:
    log = io.StringIO()
    runner = gpu_check.Runner(60, log)
    assert runner.run("good", python("print(1); print('{}')"), 30)["lines"] == ["1", "{}"]
    runner.run("bad", python("raise SystemExit('why it failed')"), 30)
    runner.run("env", python("import os; assert os.environ['A'] == 'b'"), 30, A="b")
    statuses = {name: stage["status"] for name, stage in runner.stages.items()}
    assert statuses == {"good": "passed", "bad": "failed", "env": "passed"}
    assert runner.stages["bad"]["tail"] == ["why it failed"]
    assert "why it failed" in log.getvalue()


def test_a_hanging_stage_ends_with_its_children(gpu_check: ModuleType) -> None:
    # The grandchild keeps the pipe open: were it left alive, `run` would wait for it.
    grandchild = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys; print('began', flush=True); subprocess.run({grandchild})"
    runner = gpu_check.Runner(60, io.StringIO())
    started = time.monotonic()
    runner.run("hang", python(code), 2.0)
    assert time.monotonic() - started < 30
    assert runner.stages["hang"]["status"] == "timeout"
    assert runner.stages["hang"]["tail"] == ["began"]


def test_no_stage_starts_when_the_time_is_up(gpu_check: ModuleType) -> None:
    runner = gpu_check.Runner(1, io.StringIO())
    assert runner.run("late", python("raise SystemExit(1)"), 30)["lines"] == []
    assert runner.stages["late"] == {"status": "skipped", "reason": "no time left"}


def test_a_marker_without_tests_is_skipped(gpu_check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_one(): pass\n")
    runner = gpu_check.Runner(60, io.StringIO())
    command = [sys.executable, "-m", "pytest", "-q", "-k", "another", str(tmp_path)]
    runner.run("tests", [*command, "-c", "/dev/null", "-p", "no:cacheprovider"], 30)
    assert runner.stages["tests"]["status"] == "skipped"


def test_all_stages_run_and_benchmarks_are_collected(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "setup.py": "import os; print(os.environ['TORCH_CUDA_ARCH_LIST'])",
        "tests/test_one.py": "import pytest\n@pytest.mark.gpu\ndef test_one(): assert False\n",
        "benchmarks/bench_good.py": "print('table'); print('{\"gbps\": 3.5}')",
        "benchmarks/bench_no_json.py": "print('table')",
        "benchmarks/bench_of_the_cpu.py": "raise SystemExit('is not run')",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    names = ("bench_good", "bench_no_json", "bench_not_asked")
    monkeypatch.setattr(gpu_check, "BENCHMARKS", dict.fromkeys(names, 30))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    log = io.StringIO()
    only = ("build", "tests", "memcheck", "racecheck", "bench_good", "bench_no_json")
    runner = gpu_check.Runner(120, log, only)
    assert gpu_check.check(runner, "9.0") == {"bench_good": {"gbps": 3.5}}
    assert {name: stage["status"] for name, stage in runner.stages.items()} == {
        "build": "passed",
        "tests": "failed",  # and did not stop the rest
        "memcheck": "skipped",
        "racecheck": "skipped",
        "bench_good": "passed",
        "bench_no_json": "failed",
    }
    assert "9.0a" in log.getvalue()

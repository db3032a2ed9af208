"""A test run tells the truth: its summary is seen, and no test decides another's result."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import find_shared

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = "=== 3 passed, 1 skipped in 2.10s (0:00:02) ==="


def run(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_benchmarks_called_by_tests_leave_the_process_to_pytest() -> None:
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = run(
        [*tests, "tests/benchmarks/test_profile_em_step.py"], ROOT, OPENBLAS_CORETYPE="Haswell"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed in" in done.stdout.splitlines()[-1]


def test_only_a_script_itself_may_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from _timing import run_script

    with pytest.raises(RuntimeError, match="call main"):
        run_script(test_only_a_script_itself_may_start_over)


def test_a_script_starts_over_without_what_holds_peers_back(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        "from _timing import run_script\n"
        "def main(): print(sorted(k for k in os.environ if 'OPENBLAS' in k), sys.argv[1:])\n"
        "run_script(main)\n"
    )
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    command = [sys.executable, "script.py", "--quick"]
    done = run(command, tmp_path, PYTHONPATH=path, OPENBLAS_CORETYPE="x", OPENBLAS_L2_SIZE="1")
    assert done.stdout == "[] ['--quick']\n", done.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("os.chdir('/')", "working folder"),
        ("os.environ['LEFT'] = '1'", "$LEFT"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "handler of SIGTERM"),
        ("torch.set_num_threads(torch.get_num_threads() + 1)", "torch's number of threads"),
    ],
)
def test_what_a_test_leaves_changed_is_named(tmp_path: Path, change: str, named: str) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    text = f"import os, signal, torch\ndef test_it(): {change}\n"
    (tmp_path / "test_it.py").write_text(text)
    done = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "."], tmp_path)
    assert done.returncode == 1
    assert f"left changed: {named};" in done.stdout


@pytest.mark.parametrize(
    ("reason", "named"),
    [
        ("needs redis-server (apt-get install redis-server)", "Redis"),
        ("all but these passed: {'Redis': 'no Redis client'}", "Redis"),
        ("needs Ray: pip install 'ray[data]'", "Ray"),
        ("needs a CUDA device: run `make gpu-test` on one", "GPU"),
        ("no `shared` folder with data sets beside this checkout", "data sets beside the checkout"),
        ("could not import 'lightgbm': No module named 'lightgbm'", "lightgbm"),
        ("of another kind", "of another kind"),
    ],
)
def test_the_last_lines_name_what_was_not_tested(tmp_path: Path, reason: str, named: str) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        f"import pytest\ndef test_a(): pytest.skip({reason!r})\ndef test_b(): pass\n"
    )
    done = run([sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "."], tmp_path)
    *_, told, closing = done.stdout.splitlines()
    assert told == f"not tested: {named} (1 test skipped)"
    assert "1 passed, 1 skipped" in closing


def test_data_sets_are_found_beside_a_checkout_and_what_it_was_cloned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("USERIP_FAST_TEST_DATA", raising=False)
    origin, clone = tmp_path / "a" / "ours", tmp_path / "b" / "clone"
    origin.mkdir(parents=True)
    for command in (["init", "-q", origin], ["clone", "-q", origin, clone]):
        subprocess.run(["git", *map(str, command)], check=True, capture_output=True)
    assert find_shared(clone) is None
    (tmp_path / "a" / "shared").mkdir()
    assert find_shared(clone) == find_shared(origin) == tmp_path / "a" / "shared"
    (tmp_path / "b" / "shared").mkdir()
    assert find_shared(clone) == tmp_path / "b" / "shared"
    monkeypatch.setenv("USERIP_FAST_TEST_DATA", str(tmp_path))
    assert find_shared(clone) == tmp_path


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")
def test_ci_starts_a_redis_and_stops_it(tmp_path: Path) -> None:
    done = ci_run(
        tmp_path, f"test:\n\t@echo '{SUMMARY}' $$USERIP_FAST_TEST_REDIS_URL\nray lint:\n", {}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (port,) = re.findall(r"redis://127\.0\.0\.1:(\d+)/0$", done.stdout, re.MULTILINE)
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", int(port))) != 0, "it still runs"


def test_ci_goes_on_where_no_redis_can_be_had(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    wanted = "bash cat dirname echo env grep id make mktemp rm seq sh sleep tee"
    for name in wanted.split():
        (tools / name).symlink_to(str(shutil.which(name)))
    makefile = f"test:\n\t@echo '{SUMMARY}'\nray lint:\n"
    done = ci_run(tmp_path, makefile, {"PATH": str(tools)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none can be installed here" in done.stdout


def ci_run(folder: Path, makefile: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`.ci/run` on a folder whose Makefile stands in for ours."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    (folder / "benchmarks").mkdir()
    (folder / "Makefile").write_text(makefile)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    without = {k: v for k, v in os.environ.items() if k != "USERIP_FAST_TEST_REDIS_URL"}
    return subprocess.run(
        ["bash", ".ci/run"], cwd=folder, env=without | env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "code", "passes"),
    [
        (f"tests/a.py ....\n{SUMMARY}\n", 0, True),
        ("\x1b[32m=== \x1b[1m7 passed\x1b[0m in 0.10s\x1b[0m ===\n", 0, True),
        ("tests/a.py ....\n", 0, False),
        ("", 0, False),
        ("=== 1 failed, 2 passed in 2.10s ===\n", 1, False),
    ],
)
def test_ci_believes_pytest_s_closing_line_alone(
    tmp_path: Path, lines: str, code: int, passes: bool
) -> None:
    (tmp_path / "out").write_text(lines)
    makefile = f"test:\n\t@cat out; exit {code}\nray lint:\n\t@true\n"
    done = ci_run(tmp_path, makefile, {"USERIP_FAST_TEST_REDIS_URL": ""})
    assert lines in done.stdout
    assert (done.returncode == 0) is passes
    assert ("== done" in done.stdout) is passes
    if not passes and not code:
        assert "closing line" in done.stderr

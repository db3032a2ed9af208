"""Shared fixtures. Triton kernels run in its interpreter, unless the `gpu` tests are asked for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers in the tests folder: `import tiny`

# Must be set before triton is imported. Tests marked `gpu` run without it (`make gpu-test`).
if os.environ.get("USERIP_FAST_GPU_TESTS") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes stand beside each other, or others

import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("USERIP_FAST_GPU_TESTS") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run `make gpu-test` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


# What a skipped test would have tested -> what its reason says.
COMPONENTS = {
    "Redis": "redis",
    "Ray": r"\bray\b",
    "Feast": "feast",
    "GPU": "cuda device",
    "CUDA compiler": "nvcc",
    "data sets beside the checkout": "data sets beside this checkout",
    "compiled extension": "_c is not built|compiled extension",
    "small and full disks": "tmpfs|no mount",
}


def component(reason: str) -> str:
    """What a skip leaves untested, by its reason; the reason itself where it is none of ours."""
    reason = reason.removeprefix("Skipped: ")
    if missing := re.match(r"could not import '([^'.]+)", reason):
        return missing[1]
    named = (n for n, said in COMPONENTS.items() if re.search(said, reason, re.IGNORECASE))
    return next(named, reason)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """The last lines name every component that was not tested."""
    yield
    skipped = [str(r.longrepr[2]) for r in terminalreporter.stats.get("skipped", [])]
    counts = Counter(map(component, skipped))
    for name, count in sorted(counts.items()):
        tests = "test" if count == 1 else "tests"
        terminalreporter.write_line(f"not tested: {name} ({count} {tests} skipped)")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _process_state() -> dict[str, Any]:
    """What belongs to the process, so that a change of it would decide other tests' results."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    # Set by pytest, and by libraries when they are first imported.
    theirs = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_", "TRITON_", "KMP_")
    environment = {f"${k}": v for k, v in os.environ.items() if not k.startswith(theirs)}
    return {
        "working folder": Path.cwd(),
        "torch's number of threads": torch.get_num_threads(),
        **{f"handler of {s.name}": signal.getsignal(s) for s in signals},
        **environment,
    }


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    """Names the test that changes the process for those after it."""
    before = _process_state()
    yield
    after = _process_state()
    if changed := sorted(k for k in before | after if before.get(k) != after.get(k)):
        pytest.fail(f"left changed: {', '.join(changed)}; put it back, say by monkeypatch")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Public data sets and models kept beside the checkout; tests that want them skip without."""
    path = find_shared(Path(__file__).resolve().parents[1])
    if path is None:
        pytest.skip(
            "no `shared` folder with data sets beside this checkout or what it was cloned from, "
            "and USERIP_FAST_TEST_DATA names none"
        )
    return path


def find_shared(checkout: Path) -> Path | None:
    """$USERIP_FAST_TEST_DATA, or `shared` beside the checkout or the folder it was cloned from."""
    if named := os.environ.get("USERIP_FAST_TEST_DATA"):
        return Path(named)
    beside = [checkout.parent / "shared"]
    if git := shutil.which("git"):
        command = [git, "-C", str(checkout), "config", "remote.origin.url"]
        origin = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if origin.removeprefix("file://").startswith("/"):
            beside.append(Path(origin.removeprefix("file://")).parent / "shared")
    return next((path for path in beside if path.is_dir()), None)

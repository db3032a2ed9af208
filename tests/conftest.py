"""Shared fixtures. Triton kernels run in its interpreter, unless the `gpu` tests are asked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers in the tests folder: `import tiny`

# Must be set before triton is imported. Tests marked `gpu` run without it (`make gpu-check`).
if os.environ.get("USERIP_FAST_GPU_TESTS") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("USERIP_FAST_GPU_TESTS") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run `make gpu-check` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Public data sets and models kept beside the checkout; tests that want them skip without."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("no `shared` folder with data sets beside this checkout")
    return path

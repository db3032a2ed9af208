"""`userip_fast.cli.env` knows every op and tells the truth about each implementation."""

from __future__ import annotations

import json

import pytest
import torch

from userip_fast import ops
from userip_fast.cli import env


def test_report_covers_every_op() -> None:
    report = env.report()
    json.dumps(report, allow_nan=False)
    assert report["packages"]["torch"] == torch.__version__
    optional = {"redis", "ray", "torch-rechub", "tensorboard", "scikit-learn", "pandas", "polars"}
    assert optional <= set(report["packages"])
    assert sorted(report["ops"]["cpu"]) == env.public_ops()
    for op, implementations in report["ops"]["cpu"].items():
        assert implementations["reference"] is None, op
    failed = {
        f"{op}/{name}": why
        for op, implementations in report["ops"]["cpu"].items()
        for name, why in implementations.items()
        if why and why.startswith("failed:")
    }
    assert failed == {}


def test_format_says_which_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, impl: str, **kwargs: object) -> None:
        if impl != "reference":
            raise IndexError("out of luck")

    monkeypatch.setattr(ops, "sparse_adam", broken)
    text = env.format_report()
    assert "  assign_codes: " in text
    assert "sparse_adam: reference\n      not cuda: failed: IndexError: out of luck" in text

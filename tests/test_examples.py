"""The example scripts as they are, with a tiny LM and few users; and the counts they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import userip_fast as uf

ROOT = Path(__file__).parents[1]
TINY = "--set lm.embedded_tokens=2000 --set lm.embedded_layers=1 --set lm.embedded_hidden=32"
CASES = {
    "goodbooks": ("goodbooks-10k-sample", 298_176, 0, {}),
    "movietweetings": ("movietweetings-142k", 141_695, 0, {}),
    "completejourney": (
        "completejourney-sample",
        75_000,
        0,
        {"unknown item": 222, "empty text": 60},
    ),
    "online_retail": ("online-retail-ii", 805_888, 17_641, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_example(name, shared_dir, tmp_path):
    folder, rows, filtered, bad = CASES[name]
    env = {
        **os.environ,
        "USERIP": f"{sys.executable} -m userip_fast",
        "USERIP_FIT_FLAGS": f"{TINY} --steps 1 --quantization none",
        "USERIP_FAST_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["sh", str(ROOT / "examples" / f"{name}.sh"), str(shared_dir / "data" / folder),
         str(tmp_path), "40"],
        env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    dropped = json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["dropped"]
    assert dropped["rows_read"] == rows
    assert dropped["rows_filtered"] == filtered
    assert dropped["counts"] == bad
    bank = uf.FeatureBank.open(tmp_path / "bank", verify=True)
    assert len(bank) == 40
    model = uf.Model.load(tmp_path / "run" / "model")
    assert bank.model_fingerprint == model.fingerprint
    fitted = uf.FeatureBank.open(tmp_path / "run" / "bank")
    assert (fitted.codes() == bank.codes()).all()

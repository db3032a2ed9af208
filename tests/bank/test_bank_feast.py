"""Feast itself serves what a bank exports, by the repository of examples/feast."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from test_bank_exports import bank

ROOT = Path(__file__).resolve().parents[2]
ASK = """
import json, sys
import feast

names = ["taste", "habit", "model_fingerprint"]
asked = [{"user_id": user} for user in json.loads(sys.argv[1])]
found = feast.FeatureStore(".").get_online_features([f"codes:{n}" for n in names], asked).to_dict()
print(json.dumps([found[n] for n in names]))
"""


@pytest.fixture
def python_with_feast():
    """Feast wants versions of its own: an environment beside ours will do."""
    if named := os.environ.get("USERIP_FAST_TEST_FEAST"):
        return Path(named)
    if importlib.util.find_spec("feast") is None:
        pytest.skip("needs Feast here, or a Python that has it as USERIP_FAST_TEST_FEAST")
    return Path(sys.executable)


@pytest.mark.slow
def test_the_example_serves_the_codes_of_a_bank(python_with_feast, tmp_path):
    made, codes = bank(tmp_path / "bank", np.arange(50), model="m")
    repository = tmp_path / "feast"
    shutil.copytree(ROOT / "examples" / "feast", repository)
    made.to_feast(repository / "codes.parquet", datetime.now(UTC) - timedelta(minutes=1))

    def run(*command):
        python = str(python_with_feast)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        env["PATH"] = f"{python_with_feast.parent}{os.pathsep}{env['PATH']}"
        done = subprocess.run(
            [python, *command] if command[0] == "-c" else command, cwd=repository, env=env,
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("feast", "apply")
    run("feast", "materialize-incremental", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"))
    answer = run("-c", ASK, json.dumps([3, 49, 50, 0]))
    taste, habit, model = json.loads(answer.splitlines()[-1])
    wanted = codes[[3, 49, 0]]
    assert [taste[i] for i in (0, 1, 3)] == wanted[:, 0].tolist()
    assert [habit[i] for i in (0, 1, 3)] == wanted[:, 1].tolist()
    assert model == ["m", "m", None, "m"]
    assert (taste[2], habit[2]) == (None, None)

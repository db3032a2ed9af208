"""The short form of the fuzz run, in a process of its own that may fork."""

import json
import subprocess
import sys
from pathlib import Path


def test_malformed_inputs_end_in_documented_errors():
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--inputs", "400"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["inputs"] >= 400
    fed = {n: c["read"] + c["refused"] for n, c in result["targets"].items()}
    assert len(fed) >= 36
    assert min(fed.values()) >= 3, fed
    assert result["past_first_check"] > 0.5

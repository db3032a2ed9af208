"""The short form of the fuzz run, in a process of its own that may fork."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import lines


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
    assert min(result["covered"].values()) > 0.4, result["covered"]


def test_lines_are_those_of_functions_that_ran(tmp_path):
    source = """
A = [i for i in range(3)]

class B:
    C = 1

    def f(self, x):
        if x:
            return [
                i + 1
                for i in range(x)
            ]
        return "never"

def outer():
    def inner():
        return 1
    return inner
"""
    file = tmp_path / "m.py"
    file.write_text(source)
    names = {}
    exec(compile(source, str(file), "exec"), names)
    assert lines.lines_in(file) == {8, 9, 10, 11, 13, 16, 17, 18}
    ran = lines.Lines([file])
    with ran.traced():
        thread = threading.Thread(target=names["outer"])
        thread.start()
        thread.join()
    assert ran.run[str(file)] == {16, 18}
    with ran.traced():
        names["B"]().f(2)
    assert ran.run[str(file)] == {8, 9, 10, 11, 16, 18}

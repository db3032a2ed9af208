"""The short form of the fault harness, in a process of its own that may fork."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_nothing_is_lost_and_nothing_is_wrong(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("harness.py")), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["counts"]["kills"] >= 10
    assert result["counts"]["damage refused"] >= 1
    assert result["counts"]["event table: runs that ended"] >= 2
    assert result["counts"]["event table: damaged segments made again"] >= 2
    assert result["counts"]["missing shards refused"] == 3
    for kind in ("bits flipped", "truncated"):
        damaged = result["counts"][f"bank: {kind}"]
        assert damaged > 8
        assert result["counts"][f"bank: {kind}, refused"] > 0.8 * damaged
    kinds = "model", "cache", "WORK", "shards", "shards, inferred again", "event table", "blocks"
    for name in kinds:
        for kind in ("bits flipped", "truncated"):
            assert result["counts"][f"{name}: {kind}"] >= 2
    blocks = sum(result["counts"][f"blocks: {kind}"] for kind in ("bits flipped", "truncated"))
    assert result["counts"]["blocks: words about it"] == blocks
    for name in ("model", "cache"):
        assert result["counts"][f"{name}: truncated, refused"] >= 2
    assert result["counts"]["event table: truncated, without effect or made again"] >= 2
    tables = sum(result["counts"][f"event table: {kind}"] for kind in ("bits flipped", "truncated"))
    assert result["counts"]["event table: words about it"] == tables
    assert result["counts"]["generations: opened"] > 3
    assert result["counts"]["two at once: second fit refused"] == 1
    assert result["counts"]["two at once: embedded LM trained once"] == 1
    if result["skipped"]:
        pytest.skip(f"all but these passed: {result['skipped']}")

"""What an EM step moves and launches, counted on the meta device, must not rise."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("trace_em_step")


def test_nothing_rose_and_the_aims_are_met(script, capsys):
    assert script.main(["--check"]) == 0, capsys.readouterr().out
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == set(script.shapes())
    bf16, fp8, streamed = (found["llama-2-7b"][m]["layer"]["both"] for m in script.MODES)
    assert bf16["bytes"] <= 3.2e9
    assert bf16["launches"] <= 30
    assert bf16["operators"]["mm"] == 8
    # Of eight FP8 operands four are cast on their own, in one launch each; four come as e4m3.
    assert fp8["operators"]["cast_rows"] == fp8["casts"] == 4
    assert fp8["cast_bytes"] <= 1.6e9
    # A layer is decoded once each way, but for the two that the turn finds in the buffers.
    assert streamed["operators"]["nf4_dequantize_into"] == 2 * 7
    both = found["llama-2-7b"]["streamed"]["step"]["both"]
    assert both["operators"]["nf4_dequantize_into"] == 2 * 7 * (32 - 2)
    for modes in found.values():
        for of in modes.values():
            layer = of["layer"]
            assert layer["both"]["copies"] == of["step"]["both"]["waits"] == 0
            assert layer["least"]["launches"] < layer["both"]["launches"]
            assert 0.7 < layer["least"]["bytes"] / layer["both"]["bytes"] < 1


def test_the_least_is_what_a_review_counted_by_hand(script):
    """Llama-2-7B, T = 8192: 16 T D + 8 T F values of two bytes; about 17 launches a layer."""
    least = script.least(script.shapes()["llama-2-7b"], "bf16")
    assert least == {"launches": 17, "bytes": 2 * 8192 * (16 * 4096 + 8 * 11008)}


def test_a_rise_is_named(script):
    committed = json.loads(script.COMMITTED.read_text())
    assert script.rises(committed, committed) == []
    worse = copy.deepcopy(committed)
    worse["qwen3-0.6b"]["bf16"]["layer"]["both"]["bytes"] += 1
    (line,) = script.rises(worse, committed)
    assert line.startswith("qwen3-0.6b, bf16, a layer: bytes ")


def test_what_is_counted(script):
    """Each kind of operator once, against a count by hand."""

    def counted(run):
        with script.Counting() as counting:
            run()
        return counting.now

    x = torch.empty(4, 8, device="meta", dtype=torch.bfloat16)
    w = torch.empty(8, 2, device="meta", dtype=torch.bfloat16)
    product = counted(lambda: x @ w)
    assert (product.launches, product.gemm_launches) == (1, 1)
    assert (product.bytes, product.gemm_bytes) == (0, 2 * (32 + 16 + 8))
    add = counted(lambda: x + x[:1].expand(4, 8))  # the broadcast row is read once
    assert (add.launches, add.bytes, add.copies) == (1, 2 * (32 + 8 + 32), 0)
    cast = counted(lambda: x.float())
    assert (cast.casts, cast.cast_bytes) == (1, 32 * 6)
    copies = counted(lambda: (x.t().contiguous(), x.view(32), x.contiguous()))
    assert (copies.launches, copies.copies, copies.bytes) == (1, 1, 128)
    gather = counted(lambda: x.index_select(0, torch.empty(2, device="meta", dtype=torch.int64)))
    assert gather.bytes == 2 * 2 * 8 * 2
    waits = counted(lambda: torch.zeros(3).nonzero())
    assert waits.waits == 1

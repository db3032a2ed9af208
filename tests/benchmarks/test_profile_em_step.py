"""The EM-step benchmark's case and the profile of both engines, on a tiny model."""

import importlib
import json
from pathlib import Path

import pytest
import tiny

from userip_fast.lm import FrozenLM


@pytest.fixture
def scripts(monkeypatch):
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    bench, profile = (importlib.import_module(n) for n in ("bench_em_step", "profile_em_step"))

    def make_lm(device, quick):
        return FrozenLM(
            tiny.model("llama"), bench.NoTokenizer(), source="tiny", quantization="none"
        )

    for module in (bench, profile):
        monkeypatch.setattr(module, "make_lm", make_lm)
    monkeypatch.setattr(bench, "ceilings", lambda device: {})  # seconds of matrix products
    monkeypatch.setattr(bench, "TABLE", 64)
    monkeypatch.setattr(bench, "USERS", 4)
    monkeypatch.setattr(bench, "CASES", {"b50_j8": (3, 9)})
    monkeypatch.setattr(profile, "CASES", {"b50_j8": (3, 9)})
    return bench, profile


def test_both_engines_are_profiled_by_stage(scripts, tmp_path, capsys):
    _, profile = scripts
    profile.main(["--case", "b50_j8", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "profile.json").read_text())
    for name in ("reference", "packed"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["traceEvents"]
        stages = report[name]["stages"]
        parts = ("norms", "attention block", "mlp", "input, head, loss")
        assert set(stages) == {f"{w}: {p}" for w in ("forward", "backward") for p in parts} | {
            "optimiser"
        }
        assert all(ms > 0 for ms in stages.values()), stages
        assert report[name]["operators"]["aten::mm"] > 0
    out = capsys.readouterr().out
    assert "by stage" in out
    assert json.loads(out.splitlines()[-1])["packed"] == report["packed"]


def test_the_em_step_benchmark_ends_in_its_ratios(scripts, capsys):
    bench, _ = scripts
    bench.main(["--rounds", "1", "--case", "b50_j8"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["ratios"]) == {
        "public_b100_j2", "public_b50_j8", "public_as_is", "peft", "peft_bnb",
    }  # fmt: skip
    assert report["ratios"]["public_b50_j8"] > 0
    assert report["memory_mib"]["b50_j8"]["ours"]["step"] > 0
    assert report["cases"]["b50_j8"]["error"] < 1e-4

"""What `userip lm` says of a model, and what comes before it is refused."""

import pytest
import tiny
from families import ATTENTION
from typer.testing import CliRunner

from userip_fast.cli import app
from userip_fast.core.config import LMConfig
from userip_fast.core.errors import UnsupportedError
from userip_fast.lm import describe, gates


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(gates, "_SECONDS", 0.0)


def facts(name, folder, **settings):
    path = ATTENTION[name].save(folder)
    return dict(describe.describe(path, LMConfig(device="cpu", **settings)))


def test_what_a_model_is(tmp_path):
    said = facts("Gemma 2", tmp_path, quantization="none")
    assert said["family"] == "gemma2 (Gemma2ForCausalLM)"
    assert said["shape"] == "2 layers, hidden size 32, 4 heads, 2 of keys, vocabulary 320"
    assert said["attention"] == "window of 8 in 1 layers"
    assert said["head"] == "tied, soft cap 8"
    assert said["stored"] == said["kept as"] == "dense"
    assert said["files"].startswith("model.safetensors, ")
    assert said["positions"] == "256"
    assert said["memory"].startswith("lm.residency=resident")
    assert "tokens/s with the gradient" in said["speed"]


def test_experts_and_what_4_bits_leave_out(tmp_path):
    said = facts("Mixtral", tmp_path)
    assert said["experts"] == "4, 2 for a token"
    assert said["kept as"] == "nf4-double; experts (0.0 M) dense"
    assert said["head"] == "its own"


def test_logits_that_are_scaled_and_ropes_that_are_capped(tmp_path):
    assert facts("Granite", tmp_path / "a")["head"] == "its own, logits times 0.1667"
    assert facts("Phi-4-mini (longrope, partial rotary)", tmp_path / "b")["positions"] == "128"


def test_what_is_refused_is_described_as_far_as_its_files_go(tmp_path):
    said = describe.describe(ATTENTION["Falcon"].save(tmp_path), LMConfig())
    assert next(said) == ("family", "falcon (FalconForCausalLM)")
    with pytest.raises(UnsupportedError, match="attention interface"):
        list(said)


def test_the_command(tmp_path):
    folder = str(tiny.save("llama", tmp_path))
    result = CliRunner().invoke(app, ["lm", folder, "--quantization", "none", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "family       llama (LlamaForCausalLM)\n" in result.stdout
    assert "runs         packed engine" in result.stdout

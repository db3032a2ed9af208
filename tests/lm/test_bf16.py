"""bf16 products: where they are used, what a trial asks, and that gradients never see them."""

import pytest
import tiny
import torch

from userip_fast.core import _extension
from userip_fast.lm import FrozenLM, bf16, bf16_gate
from userip_fast.lm.fuse import fuse

pytestmark = pytest.mark.skipif(
    _extension.why_not() is not None, reason=f"compiled extension: {_extension.why_not()}"
)


@pytest.fixture
def lm(monkeypatch) -> FrozenLM:
    """A small fused LM, on a processor that is said to have the instructions."""
    monkeypatch.setattr(bf16_gate, "has_instructions", lambda: True)
    monkeypatch.setattr(bf16_gate, "_WORTH", 1)
    monkeypatch.setattr(bf16_gate, "MAX_TIME", float("inf"))
    lm = tiny.frozen("llama")
    fuse(lm.model)
    return lm


def test_bf16_without_a_gradient_and_fp32_with_one(lm):
    linear = bf16.fused_linears(lm.model)[0]
    x = torch.randn(7, linear.in_features)
    with torch.no_grad():
        exact = linear(x)
    bf16.set_bf16(lm.model, True)
    with torch.no_grad():
        rounded = linear(x)
    want = torch.nn.functional.linear(x.bfloat16(), linear.weight.bfloat16()).float()
    assert torch.equal(rounded, want)
    assert not torch.equal(rounded, exact)
    leaf = x.clone().requires_grad_()
    assert torch.equal(linear(leaf).detach(), exact)
    bf16.set_bf16(lm.model, False)
    with torch.no_grad():
        assert torch.equal(linear(x), exact)


def test_a_trial_keeps_what_passes(lm, caplog):
    with caplog.at_level("INFO", "userip_fast.lm"):
        report = bf16_gate.try_out(lm)
    assert report is not None
    assert 0 < report.nll_shift < 0.01
    kept = getattr(bf16_gate.fused_linears(lm.model)[0], bf16.ATTRIBUTE) is not None
    assert kept == report.passed
    assert str(report) in caplog.text


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_NLL_SHIFT", -1.0), ("MIN_SAME_CODES", 1.1), ("MAX_TIME", 0.0)]
)
def test_a_trial_drops_what_does_not(lm, monkeypatch, limit, value):
    monkeypatch.setattr(bf16_gate, limit, value)
    report = bf16_gate.try_out(lm)
    assert report is not None
    assert not report.passed
    assert getattr(bf16_gate.fused_linears(lm.model)[0], bf16.ATTRIBUTE) is None


def test_small_models_and_plain_processors_are_left_alone(lm, monkeypatch):
    monkeypatch.setattr(bf16_gate, "has_instructions", lambda: False)
    assert bf16_gate.try_out(lm) is None
    monkeypatch.setattr(bf16_gate, "has_instructions", lambda: True)
    monkeypatch.setattr(bf16_gate, "_WORTH", 1 << 24)
    assert bf16_gate.try_out(lm) is None

"""The doctor passes LMs that are well, and finds a wrong mask or a leak."""

import pytest
import tiny
import torch

from userip_fast.cli.doctor import Check, diagnose
from userip_fast.core.errors import MismatchError
from userip_fast.lm import attention


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_healthy_models_pass(family):
    checks = diagnose(tiny.frozen(family), users=5)
    assert {c.name: (c.error, c.budget) for c in checks if not c.passed} == {}
    assert len({c.name for c in checks}) == len(checks) == 16


def failing(monkeypatch, change):
    """Names of the checks that fail when `change` is applied to what attention is told."""
    right = attention.soft_prompt_attention

    def wrong(q, k, v, pk, pv, segment, prefix_segment, cu_seqlens, *rest, **kwargs):
        told = change({"segment": segment, "prefix": prefix_segment, "cu": cu_seqlens}, kwargs)
        return right(q, k, v, pk, pv, told["segment"], told["prefix"], told["cu"], *rest, **kwargs)

    monkeypatch.setattr(attention, "soft_prompt_attention", wrong)
    return {
        c.name.partition(": ")[2] for c in diagnose(tiny.frozen("llama"), users=5) if not c.passed
    }


def test_a_plain_causal_mask_is_found(monkeypatch):
    def causal(told, kwargs):
        told["segment"] = torch.full_like(told["segment"], kwargs["num_fields"])
        return told

    found = failing(monkeypatch, causal)
    assert {"another field", "another event", "NLL, pack against the oracle"} <= found
    assert "another user" not in found


def test_a_pack_read_as_one_user_is_found(monkeypatch):
    def one_user(told, kwargs):
        told["cu"] = told["cu"][[0, -1]]
        kwargs["max_seqlen"] = int(told["cu"][-1])
        return told

    found = failing(monkeypatch, one_user)
    assert {"another user", "NLL, pack against one user at a time"} <= found


def test_a_parameter_that_still_learns_is_found():
    lm = tiny.frozen("llama")
    lm.model.model.norm.weight.requires_grad_(True)
    assert not next(c for c in diagnose(lm, users=2) if "grad" in c.name).passed


def test_nan_does_not_pass():
    assert not Check("x", float("nan"), 1.0).passed
    assert Check("x", 1.0, 1.0).passed


def test_a_context_too_short_is_refused():
    lm = tiny.frozen("llama")
    lm.max_positions = 40
    with pytest.raises(MismatchError, match="positions"):
        diagnose(lm)

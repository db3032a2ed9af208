"""Fused modules inside models: the same numbers, less memory, and nothing else touched."""

import copy
import logging

import pytest
import tiny
import torch
from test_memory import engine_of, sized, step_of
from torch import nn

from userip_fast.core import _extension
from userip_fast.core.config import LMConfig
from userip_fast.lm import open_lm
from userip_fast.lm.fuse import fuse, unfuse
from userip_fast.lm.trace import Architecture
from userip_fast.testing import assert_close_to_oracle, peak_bytes

needs_kernels = pytest.mark.skipif(
    _extension.why_not() is not None, reason=str(_extension.why_not())
)
WANT = {  # norms, attentions and MLPs of the tiny models
    "llama": (5, 2, 2), "mistral": (5, 2, 2), "qwen2": (5, 2, 2), "qwen3": (9, 2, 2),
    "gemma2": (9, 2, 2), "gemma3": (19, 3, 3), "gpt2": (0, 0, 0),
}  # fmt: skip


def read(model, dtype=torch.float32):
    """Logits and input gradient of two ragged-looking rows, in eager attention."""
    model.set_attn_implementation("eager")
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(3))
    x = x.to(dtype).requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WANT)
def test_fused_model_is_as_near_to_float64_as_the_plain_one(family, dtype):
    model = tiny.model(family, dtype, scale=1.5).requires_grad_(False).eval()
    plain = read(model, dtype)
    oracle = read(copy.deepcopy(model).double(), torch.float64)
    found = fuse(model)
    counts = [
        sum(n for name, n in found.items() if kind in name) for kind in ("Norm", "Attention", "MLP")
    ]
    assert tuple(counts) == WANT[family]
    for got, want, low in zip(read(model, dtype), oracle, plain, strict=True):
        assert_close_to_oracle(got, want, low, ulps=8)
    copied = copy.deepcopy(model)
    for a, b in zip(read(copied, dtype), read(model, dtype), strict=True):
        assert torch.equal(a, b)
    # The copy's overrides are bound to the copy: its weights alone decide what it says.
    for p in copied.parameters():
        p.data.mul_(0.5)
    if sum(found.values()):
        assert not torch.equal(read(copied, dtype)[0], read(model, dtype)[0])
    unfuse(model)
    for a, b in zip(read(model, dtype), plain, strict=True):
        assert torch.equal(a, b)


class OddRMSNorm(nn.Module):
    """Has the look of an RMSNorm and subtracts the mean."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def test_what_only_looks_alike_is_left_alone_and_named(caplog):
    model = nn.Sequential(OddRMSNorm())
    x = torch.randn(3, 8)
    want = model(x)
    with caplog.at_level(logging.INFO, logger="userip_fast.lm"):
        assert not fuse(model)
    assert "OddRMSNorm (0) is not what is fused: it runs as it is" in caplog.text
    assert torch.equal(model(x), want)


@needs_kernels
def test_a_fused_step_takes_less_memory_as_predicted():
    config = sized("llama", 96, 4)
    engine = engine_of(config)
    run, work = step_of(engine, 384, 96)
    plain = peak_bytes(run, "cpu")
    fuse(engine.lm.model)
    took = peak_bytes(run, "cpu")
    assert took < 0.9 * plain
    traced = Architecture(config, torch.float32, "cpu", four_bit=False, fused=True)
    assert abs(traced.step(False, work) / took - 1) < 0.1


@needs_kernels
def test_load_fuses_unless_told_not_to(tmp_path, caplog):
    folder = str(tiny.save("llama", tmp_path))
    with caplog.at_level(logging.INFO, logger="userip_fast.lm"):
        lm = open_lm(folder, LMConfig(path=folder))
    assert "fused element-wise parts of" in caplog.text
    assert "'LlamaRMSNorm': 5" in caplog.text
    assert "forward" in lm.model.model.norm.__dict__
    plain = open_lm(folder, LMConfig(path=folder, fused="off"))
    assert "forward" not in plain.model.model.norm.__dict__

"""The packed engine on a device, against the CPU's reference engine in fp32."""

import copy

import numpy as np
import pytest
import tiny
import torch

from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine
from userip_fast.lm.fuse import fuse
from userip_fast.lm.nf4 import quantize_linears
from userip_fast.lm.residency import set_recompute, settle
from userip_fast.prompts.packing import make_pack

pytestmark = pytest.mark.gpu


def run(engine, behaviour, theta):
    lm = engine.lm
    pack = make_pack(behaviour, np.arange(behaviour.num_users), engine.layout, lm.device, 128)
    x = theta.to(lm.device).requires_grad_()
    nll = engine.nll(pack, x)
    (grad,) = torch.autograd.grad(nll.sum(), x)
    return nll.detach().cpu().double(), grad.cpu().double()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("long_history", [False, True])
def test_device_equals_cpu(family, dtype, long_history):
    """Long histories are cut, and carry loss on feedback alone."""
    cpu = tiny.frozen(family)
    layout = tiny.template(2, 2).layout(cpu.tokenizer)
    few = {"text_weight": 0.0, "chunk_tokens": 40} if long_history else {}
    behaviour = tiny.behaviour(layout, users=40, **few)
    theta = torch.randn(40, layout.num_soft, cpu.hidden_size) * cpu.embedding_rms
    nll, grad = run(ReferenceEngine(cpu, layout), behaviour, theta)

    model = tiny.model(family, dtype).cuda()
    lm = FrozenLM(model, tiny.tokenizer(), source=family, quantization="none")
    low_nll, low_grad = run(ReferenceEngine(lm, layout), behaviour, theta)
    engine = PackedEngine(lm, layout)
    got_nll, got_grad = run(engine, behaviour, theta)
    again_nll, again_grad = run(engine, behaviour, theta)
    eps = torch.finfo(dtype).eps
    for got, low, want in ((got_nll, low_nll, nll), (got_grad, low_grad, grad)):
        budget = 2 * (low - want).abs().max() + 64 * eps * want.abs().max()
        assert (got - want).abs().max() <= budget
    assert torch.equal(got_nll, again_nll)
    assert torch.equal(got_grad, again_grad)


def test_a_user_in_the_last_pack_says_what_it_says_in_a_full_one():
    """cuBLAS chooses kernels by the number of rows, so last bits may move; not more than those."""
    model = tiny.model("llama", torch.bfloat16).cuda()
    lm = FrozenLM(model, tiny.tokenizer(), source="tiny", quantization="none")
    layout = tiny.template(2, 2).layout(lm.tokenizer)
    behaviour = tiny.behaviour(layout, users=40)
    theta = torch.randn(40, layout.num_soft, lm.hidden_size).cuda() * lm.embedding_rms
    engine = PackedEngine(lm, layout)
    found = []
    for rows in (128, 2048, 8192):
        pack = make_pack(behaviour, np.arange(3), layout, lm.device, rows)
        assert pack.num_tokens % rows == 0
        found.append(engine.nll(pack, theta[:3]).detach())
    for nll in found[1:]:
        torch.testing.assert_close(nll, found[0], rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("mode", ["resident", "streamed", "fp8"])
def test_halves_in_every_residency_equal_cpu(family, mode):
    """As a load leaves a model on a GPU: settled, fused, its layers as halves."""
    halves_equal_cpu(family, mode, "cuda")


def halves_equal_cpu(family, mode, device, whole="auto"):
    if mode == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 tensor cores")
    model = tiny.model(family, torch.bfloat16)
    if mode == "streamed":
        quantize_linears(model)
    plain = copy.deepcopy(model)
    settle(plain, "resident", torch.bfloat16)
    named = {"source": family, "quantization": "none"}
    cpu = FrozenLM(plain.float(), tiny.tokenizer(), **named)
    layout = tiny.template(2, 2).layout(cpu.tokenizer)
    behaviour = tiny.behaviour(layout, users=40)
    theta = torch.randn(40, layout.num_soft, cpu.hidden_size) * cpu.embedding_rms
    want = run(ReferenceEngine(cpu, layout), behaviour, theta)

    model = model.to(device)
    settle(model, mode, torch.bfloat16)
    lm = FrozenLM(model, tiny.tokenizer(), **named)
    low = run(ReferenceEngine(lm, layout), behaviour, theta)
    fuse(model, "auto" if device == "cuda" else "reference")
    engine = PackedEngine(lm, layout, whole=whole)
    assert engine.stack is not None
    got = run(engine, behaviour, theta)
    set_recompute(model, True)
    for first, again in zip(got, run(engine, behaviour, theta), strict=True):
        assert torch.equal(first, again)
    for found, plain, exact in zip(got, low, want, strict=True):
        budget = 2 * (plain - exact).norm() + 2.0**-7 * exact.norm()
        assert (found - exact).norm() <= budget

"""Layers as halves: what the modules say, in both directions, in every residency."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine
from userip_fast.lm.fuse import fuse
from userip_fast.lm.nf4 import quantize_linears
from userip_fast.lm.residency import set_recompute, settle
from userip_fast.prompts.packing import make_pack

F32, BF16 = torch.float32, torch.bfloat16
FAMILIES = ("llama", "llama_tied", "mistral", "qwen2", "qwen2_window", "qwen3")


def frozen(model, **kwargs):
    return FrozenLM(model, tiny.tokenizer(), source="tiny", quantization="none", **kwargs)


def step(engine, theta, *, text_weight=0.5, context="sequence", users=9):
    layout = engine.layout
    behaviour = tiny.behaviour(layout, users=users, text_weight=text_weight, context=context)
    pack = make_pack(behaviour, np.arange(users), layout, engine.lm.device, 16)
    x = theta.to(torch.promote_types(engine.lm.dtype, F32)).requires_grad_()
    nll = engine.nll(pack, x)
    (gradient,) = torch.autograd.grad(nll.sum(), x)
    return nll.detach(), gradient


def prompts(lm, users=9, fields=2, m=2):
    torch.manual_seed(0)
    layout = tiny.template(fields, m).layout(lm.tokenizer)
    return layout, torch.randn(users, layout.num_soft, lm.hidden_size) * lm.embedding_rms


def whole_engine(lm, layout, impl="reference"):
    engine = PackedEngine(lm, layout, "reference", whole=impl)
    assert engine.stack is not None
    return engine


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_are_as_near_to_float64_as_the_modules(family, dtype):
    """By the root mean square of the errors of 27 users, of NLL and of the gradient."""
    model = tiny.model(family, dtype)
    lm, wide = frozen(model), frozen(copy.deepcopy(model).double())
    layout, _ = prompts(lm)
    thetas = [torch.randn(9, layout.num_soft, lm.hidden_size) * lm.embedding_rms for _ in "abc"]
    for text, context in ((0.5, "sequence"), (0.0, "independent")):  # all rows, and few

        def run(engine, text=text, context=context):
            found = [step(engine, t.to(dtype), text_weight=text, context=context) for t in thetas]
            return [torch.cat(x).double() for x in zip(*found, strict=True)]

        oracle, low = run(ReferenceEngine(wide, layout)), run(ReferenceEngine(lm, layout))
        fuse(lm.model, "reference")
        for got, want, plain in zip(run(whole_engine(lm, layout)), oracle, low, strict=True):
            error, budget = ((x - want).square().mean().sqrt() for x in (got, plain))
            band = 2 * torch.finfo(torch.float32).eps * want.abs().max()  # an NLL is kept in fp32
            assert error <= 1.5 * budget + band


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_triton_kernels_compute_the_same_layers(family):
    lm = frozen(tiny.model(family))
    layout, theta = prompts(lm, users=3, m=1)
    fuse(lm.model, "reference")
    want = step(whole_engine(lm, layout), theta, users=3)
    engine = PackedEngine(lm, layout, "triton", whole="off", probe=False)
    engine.stack = whole_engine(lm, layout, "triton").stack
    for a, b in zip(step(engine, theta, users=3), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_weights_are_joined_in_place_and_the_modules_still_work():
    lm = frozen(tiny.model("qwen2"))
    layout, theta = prompts(lm)
    want = step(PackedEngine(lm, layout, "reference"), theta)
    values = sum(p.numel() for p in lm.model.parameters())
    fuse(lm.model, "reference")
    first = whole_engine(lm, layout)
    attention = lm.model.model.layers[0].self_attn
    weights = [getattr(attention, n).weight for n in ("q_proj", "k_proj", "v_proj")]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    again = whole_engine(lm, layout)  # finds them joined
    assert (
        first.stack.layers[0][0].qkv.weight.data_ptr()
        == again.stack.layers[0][0].qkv.weight.data_ptr()
    )
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in lm.model.parameters()}  # fmt: skip
    assert sum(held.values()) == 4 * values
    off = PackedEngine(lm, layout, "reference", whole="off")
    assert off.stack is None
    for got in (step(first, theta), step(off, theta)):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("mode", ["resident", "streamed", "fp8"])
def test_every_residency_says_what_its_modules_say(mode):
    def settled():
        model = AutoModelForCausalLM.from_config(
            tiny.config("llama"), attn_implementation="userip_packed"
        )
        if mode != "fp8":
            quantize_linears(model)
        settle(model, mode, F32)
        return frozen(model)

    torch.manual_seed(0)
    lm = settled()
    layout, theta = prompts(lm)
    want = step(PackedEngine(lm, layout, "reference"), theta)
    fuse(lm.model, "reference")
    got = step(whole_engine(lm, layout), theta)
    # FP8 rounds fp32 where the modules round what passed through 32 bits too, and gradients of
    # q, k and v together: near, and not the same.
    near = 0.2 if mode == "fp8" else 1e-5
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) <= near
    assert float((got[0] - want[0]).abs().max()) <= near * float(want[0].abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recomputation_keeps_the_bits_and_saves_what_is_listed(family):
    lm = frozen(tiny.model(family))
    layout, theta = prompts(lm)
    fuse(lm.model, "reference")
    engine = whole_engine(lm, layout)
    kept: dict[int, int] = {}

    def count(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        want = step(engine, theta)
    full = sum(kept.values())
    kept.clear()
    set_recompute(lm.model, True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        got = step(engine, theta)
    assert sum(kept.values()) < full
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_what_only_looks_like_a_common_layer_runs_module_by_module():
    """Granite has Llama's modules, and multiplies what they give by constants of its own."""
    import transformers as tf

    config = tf.GraniteConfig(
        **{k: v for k, v in tiny.config("llama").to_dict().items() if k in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "max_position_embeddings", "bos_token_id",
            "eos_token_id", "pad_token_id",
        )},
        residual_multiplier=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = frozen(AutoModelForCausalLM.from_config(config, attn_implementation="userip_packed"))
    layout, theta = prompts(lm)
    want = step(PackedEngine(lm, layout, "reference"), theta)
    fuse(lm.model, "reference")
    engine = PackedEngine(lm, layout, "reference", whole="reference")
    assert engine.stack is None
    for a, b in zip(step(engine, theta), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    gemma = frozen(tiny.model("gemma2"))  # four norms a layer
    fuse(gemma.model, "reference")
    assert PackedEngine(gemma, *prompts(gemma)[:1], "reference", whole="reference").stack is None


def test_events_that_share_rows_read_them_from_a_stack_too():
    """Several sums ask for one row (`cu_rows` of other length than users): see `Engine.nll`."""
    lm = frozen(tiny.model("llama"))
    layout, theta = prompts(lm)
    fuse(lm.model, "reference")
    behaviour = tiny.behaviour(layout, users=9)
    pack = make_pack(behaviour, np.arange(9), layout, lm.device)
    twice = copy.copy(pack)
    rows = torch.cat([pack.loss_rows, pack.loss_rows[:3]])
    for name, value in {
        "loss_rows": rows,
        "target": torch.cat([pack.target, pack.target[:3]]),
        "loss_weight": torch.cat([pack.loss_weight, pack.loss_weight[:3]]),
        "cu_rows": torch.cat([pack.cu_rows, pack.cu_rows[-1:] + 3]),
        "distinct": torch.unique(rows, return_inverse=True),
    }.items():
        object.__setattr__(twice, name, value)
    for whole in ("reference", "off"):
        engine = PackedEngine(lm, layout, "reference", whole=whole)
        x = theta.clone().requires_grad_()
        nll = engine.nll(twice, x)
        torch.testing.assert_close(nll[:9], engine.nll(pack, theta))
        (gradient,) = torch.autograd.grad(nll.sum(), x)
        if whole == "reference":
            want = nll.detach(), gradient
    torch.testing.assert_close(nll.detach(), want[0])
    torch.testing.assert_close(gradient, want[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="9 users and 10 sums must say which rows are distinct"):
        engine.nll(replace(twice, distinct=None), theta)

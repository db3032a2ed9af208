"""NF4Linear inside models: the same output as bitsandbytes' Linear4bit."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from userip_fast.core.errors import UnsupportedError
from userip_fast.lm.nf4 import NF4Linear, quantize_linears, replace_linear4bit

bnb = pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes' Linear4bit")


def linear4bit(shape=(48, 128), nested=True, compute_dtype=None):
    module = bnb.nn.Linear4bit(
        shape[1],
        shape[0],
        quant_type="nf4",
        compress_statistics=nested,
        compute_dtype=compute_dtype,
    ).to("cpu")
    module.support_avx512bf16_for_cpu = False
    return module


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_output_and_gradient_as_linear4bit(dtype, compute_dtype, nested):
    module = linear4bit(nested=nested, compute_dtype=compute_dtype)
    ours = NF4Linear.from_linear4bit(module)
    x = torch.randn(3, 5, 128, dtype=dtype)
    results = []
    for m in (module, ours):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == dtype
        low = torch.bfloat16 in (dtype, compute_dtype)
        # One rounding to bf16 apart, or fp32 sums of up to 128 terms in another order.
        band = 2 * torch.finfo(torch.bfloat16).eps if low else 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=0, atol=band * float(a.abs().max()))


def test_state_dict_round_trip_with_bitsandbytes_keys():
    module = linear4bit()
    ours = NF4Linear.from_linear4bit(module)
    assert ours.state_dict().keys() == module.state_dict().keys()
    other = NF4Linear.from_linear(nn.Linear(128, 48))
    other.load_state_dict(module.state_dict())
    x = torch.randn(4, 128)
    assert torch.equal(other(x), ours(x))


def test_casting_a_model_leaves_the_scales_alone():
    ours = NF4Linear.from_linear(nn.Linear(80, 48))
    x = torch.randn(4, 80)
    want = ours(x)
    cast = copy.deepcopy(ours).to(torch.bfloat16)
    assert cast.nested_absmax.dtype == torch.float32
    assert cast.bias.dtype == torch.bfloat16
    torch.testing.assert_close(cast(x), want, rtol=0, atol=1e-2)
    assert not list(ours.parameters())


def tiny(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,  # whole blocks a row: all that bitsandbytes' AVX-512 code (0.50) can do
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(
        vocab_size=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(("kind", "layers"), [("llama", 14), ("gpt2", 8)])
def test_quantized_model_equals_one_that_bitsandbytes_quantised(kind, layers, tmp_path):
    pytest.importorskip("accelerate", reason="transformers loads 4-bit models through it")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny(kind)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    ).eval()
    for module in theirs.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    ids = torch.arange(12)[None]
    want = theirs(ids).logits
    assert quantize_linears(model) == layers
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert replace_linear4bit(theirs) == layers
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert isinstance(theirs.get_output_embeddings(), nn.Linear)


def test_a_layer_that_cannot_be_taken_leaves_the_model_whole():
    model = nn.Sequential(linear4bit(), bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu"))
    with pytest.raises(UnsupportedError, match="fp4"):
        replace_linear4bit(model)
    assert all(type(m) is bnb.nn.Linear4bit for m in model)


def test_a_step_keeps_no_dense_weight_and_no_weight_gradient():
    """Forward and backward to the input embeddings; every tensor kept in between is looked at."""
    model = tiny("llama").requires_grad_(False)
    dense_shapes = {tuple(m.weight.shape) for n, m in model.named_modules() if "proj" in n}
    assert quantize_linears(model) == 14
    stored = {b.data_ptr() for b in model.buffers()} | {p.data_ptr() for p in model.parameters()}
    saved = []
    x = torch.randn(1, 9, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(inputs_embeds=x, use_cache=False).logits.logsumexp(-1).sum().backward()
    kept = [t for t in saved if t.data_ptr() not in stored]
    assert not [t.shape for t in kept if {tuple(t.shape), tuple(t.shape[::-1])} & dense_shapes]
    assert len(saved) > len(kept) >= 1
    assert all(p.grad is None for p in model.parameters())
    assert x.grad.abs().sum() > 0


def test_dense_linears_would_be_caught():
    """The same look at a dense model finds its weights, so the test above can fail."""
    model = tiny("llama").requires_grad_(False)
    shapes = {tuple(m.weight.shape) for n, m in model.named_modules() if "proj" in n}
    saved = []
    x = torch.randn(1, 9, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(inputs_embeds=x, use_cache=False).logits.sum().backward()
    assert [t for t in saved if {tuple(t.shape), tuple(t.shape[::-1])} & shapes]

"""Packed engine against reference engine: every family, fp32 and bf16, dense and NF4, ragged users.

A covering design instead of the full product: each family meets both dtypes, dense and NF4 weights;
every number of fields (1 to 8) and of virtual tokens (1 to 4) occurs, both contexts, loss on all
tokens and on feedback alone, histories whole and cut. The oracle is the reference engine in
float64; `test_engine.py` holds both engines against a dense computation that shares no code.
"""

import copy

import numpy as np
import pytest
import tiny
import torch

from userip_fast.core.errors import UnsupportedError
from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine
from userip_fast.lm.masks import Near
from userip_fast.lm.nf4 import NF4Linear, quantize_linears
from userip_fast.lm.residency import set_recompute
from userip_fast.ops import nf4_dequantize
from userip_fast.prompts.layout import ProfileField, PromptTemplate, tokenize_events
from userip_fast.prompts.packing import build_behaviour, iter_packs
from userip_fast.testing import assert_close_to_oracle

F32, BF16 = torch.float32, torch.bfloat16
SEQ, IND = "sequence", "independent"
CASES = [  # family, J, m, dtype, weights, context, loss on text, longest sequence
    ("llama", 1, 1, F32, "none", SEQ, True, None),
    ("llama", 8, 1, BF16, "nf4-double", SEQ, False, 40),
    ("llama_tied", 2, 4, F32, "nf4", IND, False, None),
    ("llama_tied", 5, 2, BF16, "none", SEQ, True, 30),
    ("mistral", 3, 2, F32, "nf4-double", SEQ, True, 30),
    ("mistral", 4, 3, BF16, "none", IND, False, None),
    ("qwen2", 7, 1, F32, "none", SEQ, False, 40),
    ("qwen2", 2, 2, BF16, "nf4", SEQ, True, None),
    ("qwen2_window", 4, 1, F32, "none", SEQ, True, None),
    ("qwen3", 6, 1, F32, "nf4", SEQ, True, None),
    ("qwen3", 1, 4, BF16, "none", IND, False, 30),
    ("gemma2", 2, 3, F32, "none", SEQ, False, None),
    ("gemma2", 7, 1, BF16, "nf4-double", SEQ, True, 40),
    ("gemma3", 5, 1, F32, "nf4-double", IND, True, None),
    ("gemma3", 3, 4, BF16, "none", SEQ, False, 40),
    ("gpt2", 8, 2, F32, "none", SEQ, True, 40),
    ("gpt2", 2, 1, BF16, "nf4", SEQ, False, None),
    ("stories260K", 2, 2, F32, "nf4-double", SEQ, False, None),
    ("stories260K", 4, 1, BF16, "none", SEQ, True, 60),
]


def load(family, dtype, weights, request):
    """The LM under test, and itself in float64 with the same (dequantised) weights."""
    if family == "stories260K":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = request.getfixturevalue("shared_dir") / "models" / family
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="userip_packed", dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        model, tokenizer = tiny.model(family, dtype), tiny.tokenizer()
    if weights != "none":
        assert quantize_linears(model, nested=weights == "nf4-double") > 0
    wide = copy.deepcopy(model)
    for name, module in list(wide.named_modules()):
        if isinstance(module, NF4Linear):
            bias = module.bias is not None
            dense = torch.nn.Linear(module.in_features, module.out_features, bias)
            dense.weight.data = nf4_dequantize(module.nf4_weight, dtype=F32, impl="reference")
            if bias:
                dense.bias.data = module.bias.detach().clone()
            wide.set_submodule(name, dense)
    return (
        FrozenLM(m, tokenizer, source=family, quantization=weights)
        for m in (model, wide.to(torch.float64))
    )


def ragged(lm, layout, context, loss_on_text, longest):
    """Nine users of 1 to 12 events."""
    table = tokenize_events(
        lm.tokenizer, tiny.TEXTS, ["liked", "bad"] * 3, "{text}: {feedback}", "; "
    )
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(random.permutation([1, 1, 2, 3, 4, 5, 7, 9, 12]))])
    return build_behaviour(
        table, random.integers(0, len(tiny.TEXTS), offsets[-1]), offsets, layout, max_tokens=120,
        chunk_tokens=longest, context=context, text_weight=0.5 * loss_on_text, feedback_weight=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields", "m", "dtype", "weights", "context", "text", "longest"),
    CASES,
    ids=["-".join(str(x).removeprefix("torch.") for x in case) for case in CASES],
)
def test_packed_equals_reference(
    family, fields, m, dtype, weights, context, text, longest, request
):
    lm, wide = load(family, dtype, weights, request)
    prompts = ["The user's hobby is", "", "spending level", "likes"] * 2
    template = PromptTemplate(tuple(ProfileField(f"f{j}", prompts[j], m) for j in range(fields)))
    layout = template.layout(lm.tokenizer)
    behaviour = ragged(lm, layout, context, text, longest)
    users = behaviour.num_users
    theta = torch.randn(users, layout.num_soft, lm.hidden_size) * lm.embedding_rms
    weight = torch.rand(users) + 0.5

    def run(engine):
        x = theta.to(engine.lm.dtype).to(torch.promote_types(engine.lm.dtype, F32))
        x = x.requires_grad_()
        nll = torch.zeros(users, dtype=x.dtype)
        order = np.random.default_rng(1).permutation(users)
        for pack in iter_packs(behaviour, order, layout, engine.lm.device, 150):
            index = torch.from_numpy(pack.users)
            nll = nll.index_copy(0, index, engine.nll(pack, x[index]).to(x.dtype))
        (nll * weight.to(nll)).sum().backward()
        return nll.detach(), x.grad

    oracle, low, packed = map(
        run, (ReferenceEngine(wide, layout), ReferenceEngine(lm, layout), PackedEngine(lm, layout))
    )
    # Sums are kept in float32: the band is 16 of its ulps, or one of bfloat16.
    ulps = 16.0 if dtype == F32 else torch.finfo(dtype).eps / torch.finfo(F32).eps
    for i, what in enumerate(("nll", "gradient")):
        assert_close_to_oracle(packed[i], oracle[i], low[i], ulps=ulps, name=what)


def test_the_design_covers_what_it_says():
    families = {f.split("_")[0] for f, *_ in CASES}
    assert families == {*(f.split("_")[0] for f in tiny.FAMILIES), "stories260K"}
    for family in families:
        own = [c for c in CASES if c[0].split("_")[0] == family]
        assert {c[3] for c in own} == {F32, BF16}, family
        assert {c[4] == "none" for c in own} == {True, False}, family
    assert {c[1] for c in CASES} == set(range(1, 9))
    assert {c[2] for c in CASES} == set(range(1, 5))
    assert {c[4] for c in CASES} == {"none", "nf4", "nf4-double"}


def test_rows_without_loss_skip_the_last_mlp():
    """The saving happens, once the share of loss rows is small, and only then."""
    lm = tiny.frozen("llama")
    layout = tiny.template().layout(lm.tokenizer)
    engine = PackedEngine(lm, layout)
    seen = []
    lm.model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    for text, few in ((0.0, True), (1.0, False)):
        b = tiny.behaviour(layout, text_weight=text)
        (pack,) = iter_packs(b, np.arange(b.num_users), layout, lm.device, 10_000)
        engine.nll(pack, torch.zeros(b.num_users, layout.num_soft, lm.hidden_size))
        assert seen.pop() == (len(pack.loss_rows) if few else pack.num_tokens)


STRANGE = {
    "convolutions": ("Lfm2Config", {"full_attn_idxs": [1]}, "layers of type 'conv'"),
    "later tokens": ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "not a causal LM"),
}


def engine_of(config):
    from transformers import AutoModelForCausalLM

    from userip_fast.lm.attention import register

    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="userip_packed", dtype=F32)
    lm = FrozenLM(model, tiny.tokenizer(), source="strange", quantization="none")
    return PackedEngine(lm, tiny.template().layout(lm.tokenizer))


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_supported_is_refused_by_name(name):
    import transformers

    kind, extra, reason = STRANGE[name]
    common = {k: v for k, v in tiny.config("llama").to_dict().items() if k in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "bos_token_id",
        "eos_token_id", "pad_token_id")}  # fmt: skip
    with pytest.raises(UnsupportedError, match=reason):
        engine_of(getattr(transformers, kind)(**common, **extra))


def test_windows_are_those_of_the_masks():
    config = tiny.config("llama")
    config.sliding_window = 8  # Llama reads no such thing
    assert set(engine_of(config).lm.near.values()) == {Near()}
    assert set(engine_of(tiny.config("mistral")).lm.near.values()) == {Near(window=8)}
    mixed = [*engine_of(tiny.config("gemma3")).lm.near.values()]
    assert mixed == [Near(window=8), Near(window=8), Near()]


def test_a_window_that_no_mask_keeps_is_refused():
    lm = tiny.frozen("mistral")
    lm.near.update(dict.fromkeys(lm.near, Near(window=4)))
    with pytest.raises(UnsupportedError, match="a sliding window of 8, and its masks are of 4"):
        PackedEngine(lm, tiny.template().layout(lm.tokenizer))


def test_tokens_mixed_outside_attention_are_refused():
    lm = tiny.frozen("llama")
    layer = lm.model.model.layers[0]
    layer.mlp.register_forward_hook(lambda _, x, y: y + y.roll(1, 1))
    with pytest.raises(UnsupportedError, match="reads packed users in another way"):
        PackedEngine(lm, tiny.template().layout(lm.tokenizer))


def test_a_head_that_does_more_than_a_linear_map_is_refused():
    model = tiny.model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out**3)
    with pytest.raises(UnsupportedError, match="more between hidden states and logits"):
        FrozenLM(model, tiny.tokenizer(), source="strange", quantization="none")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_that_recomputes_reads_the_same_in_both_engines(family):
    """In backward a layer runs again with the attention of its first run, the model's own too."""
    lm = tiny.frozen(family)
    layout = tiny.template().layout(lm.tokenizer)
    behaviour = tiny.behaviour(layout)
    pack = next(iter(iter_packs(behaviour, np.arange(5), layout, lm.device, 10**6)))
    theta = torch.randn(5, layout.num_soft, lm.hidden_size, requires_grad=True)
    for engine in (ReferenceEngine(lm, layout), PackedEngine(lm, layout)):
        found = []
        for on in (False, True):
            set_recompute(lm.model, on)
            nll = engine.nll(pack, theta)
            found.append((nll, *torch.autograd.grad(nll.sum(), theta)))
        set_recompute(lm.model, False)
        assert all(torch.equal(a, b) for a, b in zip(*found))
        assert lm.model.config._attn_implementation == "userip_packed"

"""Where the weights lie changes nothing that the engine reads; FP8 little, or it is refused."""

import copy
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
from collections import Counter, OrderedDict
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from userip_fast.core.config import EMConfig, LMConfig
from userip_fast.core.errors import UnsupportedError
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.steps import Block, EMState
from userip_fast.lm import PackedEngine, fp8, fp8_gate, open_lm, residency
from userip_fast.lm.fp8 import FP8Linear, quantize_rows
from userip_fast.lm.layers import layer_of
from userip_fast.lm.nf4 import quantize_linears
from userip_fast.lm.residency import StreamedLinear, set_recompute, settle, stream_layers
from userip_fast.prompts.packing import make_pack


def four_bit(family):
    """An LM whose linears are in NF4, as a load leaves it before it settles."""
    lm = tiny.frozen(family)
    quantize_linears(lm.model)
    return lm


def read(lm, text_weight=0.5):
    """NLL and theta gradient of some users; without weight on text few rows carry loss."""
    engine = PackedEngine(lm, tiny.template().layout(lm.tokenizer))
    behaviour = tiny.behaviour(engine.layout, text_weight=text_weight)
    users = behaviour.num_users
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(users, engine.layout.num_soft, lm.hidden_size, generator=generator)
    theta.requires_grad_()
    nll = engine.nll(make_pack(behaviour, np.arange(users), engine.layout, lm.device), theta)
    return nll.detach(), torch.autograd.grad(nll.sum(), theta)[0]


def digest_of_a_load(folder, quantization):
    """Of the NLL and gradient that a load of `folder` gives."""
    lm = open_lm(folder, LMConfig(quantization=quantization, device="cpu"))
    nll, grad = read(lm)
    assert torch.isfinite(nll).all()
    assert grad.abs().max() > 0
    return hashlib.sha256(nll.numpy().tobytes() + grad.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_nf4_runs_without_bitsandbytes_and_gives_the_same_bits(tmp_path, quantization):
    """In a process that cannot import it."""
    folder = str(tiny.save("llama", tmp_path / "lm"))
    code = """
        import sys
        sys.modules["bitsandbytes"] = None  # neither found nor imported
        from test_residency import digest_of_a_load
        print(digest_of_a_load(*sys.argv[1:]))
        assert not any(name.startswith("bitsandbytes.") for name in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), folder, quantization],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()[-1]
    assert found != digest_of_a_load(folder, "none")
    if importlib.util.find_spec("bitsandbytes"):
        assert found == digest_of_a_load(folder, quantization)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 80), (33, 64), (16, 32)])
def test_dense_weights_of_bitsandbytes_where_rows_are_no_whole_blocks(kind, shape):
    """Its AVX-512 code (0.50) decodes these wrongly row by row."""
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(shape[1], shape[0], quant_type=kind, compress_statistics=False)
    model = torch.nn.Sequential(linear.to("cpu"))
    state, packed = linear.weight.quant_state, linear.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: state.shape.numel()].long()
    scales = state.absmax.repeat_interleave(state.blocksize)[: len(codes)]
    residency.make_resident(model, torch.float32)
    assert torch.equal(model[0].weight.flatten(), state.code[codes] * scales)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_streamed_equals_resident_in_every_bit(family, recompute):
    lm = four_bit(family)
    settle(lm.model, "resident", lm.dtype)
    want = read(lm), read(lm, 0.0)
    lm = four_bit(family)
    settle(lm.model, "streamed", lm.dtype)
    set_recompute(lm.model, recompute)
    streams = [m.stream for m in lm.model.modules() if isinstance(m, StreamedLinear)]
    assert len({id(s) for s in streams}) == 1
    assert len(streams[0].layers) == lm.model.config.num_hidden_layers
    for weight, wanted in zip((0.5, 0.0, 0.5), (*want, want[0]), strict=True):
        for a, b in zip(read(lm, weight), wanted, strict=True):
            assert torch.equal(a, b)
    # The way back, for which the doctor's wide copy needs the values.
    residency.make_resident(lm.model, lm.dtype)
    assert torch.equal(read(lm)[0], want[0][0])


def deep(layers, width=16):
    """A chain of linears that a stream can pass through."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width)) for _ in range(layers)))
    model = nn.Sequential(OrderedDict(layers=layers)).requires_grad_(False)
    quantize_linears(model)
    return model


def test_a_layer_is_decoded_once_each_way_and_not_at_the_turns():
    model = deep(6)
    dense = copy.deepcopy(model)
    residency.make_resident(dense, torch.float32)
    stream = stream_layers(model, torch.float32)
    names = [n for n, m in model.named_modules() if isinstance(m, StreamedLinear)]
    assert [layer_of(n) for n in names] == [f"layers.{i}" for i in range(6)]
    assert sum(b.numel() for b in stream.buffers) == 2 * 16 * 16
    for decoded in (6 + 4, 6 + 4 + 2 * 4):  # forward and back; then both ends are held already
        x = torch.ones(3, 16, requires_grad=True)
        y = model(x)
        assert torch.equal(y, dense(x))
        y.sum().backward()
        assert stream.decoded == decoded
        assert x.grad.abs().sum() > 0


class Recorder:
    """Stands for CUDA streams: notes who waits for whom, in order."""

    def __init__(self):
        self.log = []

    def side(self):
        recorder = self

        class Side:
            def wait_stream(self, other):
                recorder.log.append(("side waits for all before", None))

            def record_event(self):
                recorder.log.append(("ready", recorder.filling))
                return recorder.filling

        return Side()

    def main(self):
        recorder = self

        class Main:
            def wait_event(self, event):
                recorder.log.append(("main waits for", event))

        return Main()


def test_on_cuda_the_next_layer_is_decoded_on_the_side_in_either_direction(monkeypatch):
    """The order of waits, with streams that only note it: no GPU is needed to get that wrong."""
    model, recorder = deep(4), Recorder()
    stream = stream_layers(model, torch.float32)
    stream.side = recorder.side()
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: recorder.main())
    fill = stream._fill

    def noted(layer, slot):
        recorder.filling = layer
        recorder.log.append(("decode", layer))
        fill(layer, slot)

    stream._fill = noted
    x = torch.ones(2, 16, requires_grad=True)
    model(x).sum().backward()
    waits = "side waits for all before", None

    def decoded(layer):
        return [waits, ("decode", layer), ("ready", layer)]

    assert recorder.log == [
        *decoded(0), ("main waits for", 0), *decoded(1),
        ("main waits for", 1), *decoded(2),
        ("main waits for", 2), *decoded(3),
        ("main waits for", 3),
        ("main waits for", 2), *decoded(1),  # the turn: 2 is still held
        ("main waits for", 1), *decoded(0),
        ("main waits for", 0),
    ]  # fmt: skip


def test_a_layer_that_failed_to_decode_is_not_taken_for_decoded(monkeypatch):
    """As when memory runs out: the buffer then holds half of a layer, or of another one."""
    from userip_fast.lm import residency

    model = tiny.model("llama")
    quantize_linears(model)
    stream = residency.stream_layers(model, torch.float32)
    want = [[stream.weight(i, 0).clone() for i in (0, 1)] for _ in range(2)]
    plain, fail = residency.nf4_dequantize_into, [False]

    def failing(weight, view):
        if fail[0]:
            view.fill_(torch.nan)
            raise RuntimeError("out of memory")
        plain(weight, view)

    monkeypatch.setattr(residency, "nf4_dequantize_into", failing)
    fresh = residency.LayerStream(stream.layers, torch.float32)
    assert torch.equal(fresh.weight(0, 0), want[0][0])
    fail[0] = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            fresh.weight(1, 0)
    fail[0] = False
    assert torch.equal(fresh.weight(1, 0), want[0][1])
    assert torch.equal(fresh.weight(0, 0), want[0][0])


def test_streaming_needs_four_bits():
    with pytest.raises(UnsupportedError, match=r"has none; set lm.quantization=nf4-double"):
        settle(tiny.model("llama"), "streamed", torch.float32)


@pytest.mark.parametrize("mode", ["resident", "streamed", "fp8", "nf4"])
def test_an_em_step_makes_no_weight_gradient_and_keeps_no_linear_input(mode, monkeypatch):
    """One E-step on the tiny Llama: everything that autograd keeps or makes is looked at."""
    lm = four_bit("llama")
    if mode != "nf4":  # "nf4" is a 4-bit model that was not settled: a weight is decoded per call
        settle(lm.model, mode, lm.dtype)
    inner = {
        n: m
        for n, m in lm.model.named_modules()
        if n.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"))
    }
    assert len(inner) == 12
    shapes = {(m.out_features, m.in_features) for m in inner.values()}
    stored = {t.data_ptr() for t in (*lm.model.parameters(), *lm.model.buffers())}
    inputs, saved, made = [], [], []
    for module in inner.values():
        # o_proj is left out: its input is what attention itself needs in backward.
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in func.overloadpacket.__name__:
                made.append(tuple(out.shape))
            return out

    engine = PackedEngine(lm, tiny.template().layout(lm.tokenizer))
    behaviour = tiny.behaviour(engine.layout, users=8)
    block = Block(behaviour, np.arange(8).astype(np.uint64))
    start = torch.randn(engine.layout.num_soft, lm.hidden_size)
    step = GradientEStep(engine, start, EMConfig(steps=1))
    with (
        Products(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        profiles = step.run(block, None, EMState())
    assert not torch.equal(profiles.theta[0], start)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert len(inputs) >= 12  # a step
    kept = {t.untyped_storage().data_ptr() for t in saved} - stored
    read_by_linears = {x.untyped_storage().data_ptr() for x in inputs}
    assert kept
    assert not kept & read_by_linears
    assert made or mode == "nf4"  # there the products are inside the operator
    assert not shapes & set(made)  # dW would be a product of that shape
    dense = [t for t in saved if tuple(t.shape) in shapes and t.data_ptr() not in stored]
    assert not dense


def test_rows_in_e4m3_are_within_half_a_step_and_zeros_stay():
    x = torch.randn(40, 96) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0
    values, scale = quantize_rows(x)
    error = (values.float() * scale[:, None] - x).abs()
    # 3 bits of mantissa; below the smallest normal, 2^-6, steps of 2^-9 of the scale.
    assert bool((error <= x.abs() / 16 + scale[:, None] * 2**-10).all())
    assert bool((values[3].float() == 0).all())


def test_fp8_linear_is_near_the_dense_one_both_ways():
    torch.manual_seed(0)
    dense = nn.Linear(128, 64).requires_grad_(False)
    rounded = FP8Linear(dense.weight, dense.bias)
    results = []
    for layer in (dense, rounded):
        x = torch.randn(5, 33, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for want, got in zip(*results, strict=True):
        error = (got - want).norm() / want.norm()
        assert 0.005 < error < 0.06  # e4m3 rounds both factors by about 2.5 % each
    assert (rounded.dense_weight() - dense.weight).norm() < 0.03 * dense.weight.norm()


def test_fp8_is_loaded_through_its_gate(tmp_path, monkeypatch, caplog):
    folder = str(tiny.save("llama", tmp_path))
    monkeypatch.setattr(
        fp8_gate, "MIN_COSINE", 0.5
    )  # weights four times the usual size amplify errors
    monkeypatch.setattr(fp8_gate, "MAX_NLL_SHIFT", 0.5)
    monkeypatch.setattr(fp8_gate, "MIN_SAME_CODES", 0.2)
    with caplog.at_level(logging.INFO, logger="userip_fast.lm"):
        lm = open_lm(folder, LMConfig(path=folder, residency="fp8"))
    assert sum(isinstance(m, FP8Linear) for m in lm.model.modules()) == 14
    report = lm.fp8_report
    assert 0.5 < report.lowest_cosine <= report.cosine < 1
    assert 0 < report.nll_shift < 0.5
    assert str(report) in caplog.text
    nll, gradient = read(lm)
    assert bool(torch.isfinite(nll).all())
    assert gradient.abs().sum() > 0
    monkeypatch.setattr(fp8_gate, "MIN_COSINE", 1.0)
    with pytest.raises(UnsupportedError, match=r"changes what this LM says too much: NLL shift"):
        open_lm(folder, LMConfig(path=folder, residency="fp8"))


@pytest.fixture
def unasked(monkeypatch, tmp_path):
    """A fused LM whose device is said to take FP8 in `times` of the time, one after the other."""
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fp8_gate, "_why_not_unasked", lambda lm, work: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(fp8_gate, "MIN_COSINE", 0.5)  # as above
    monkeypatch.setattr(fp8_gate, "MAX_NLL_SHIFT", 0.5)
    monkeypatch.setattr(fp8_gate, "MIN_SAME_CODES", 0.2)
    folder = str(tiny.save("llama", tmp_path / "lm"))
    timed = []

    def load(*times):
        left = iter(times)

        def seconds(lm, work):
            timed.append(sum(isinstance(m, FP8Linear) for m in lm.model.modules()))
            assert work.pack_tokens == lm.plan.pack_tokens
            return next(left)

        monkeypatch.setattr(fp8_gate, "step_seconds", seconds)
        return open_lm(folder, LMConfig(path=folder))

    return load, timed


def linears(lm):
    return Counter(type(m).__name__ for n, m in lm.model.named_modules() if n.endswith("_proj"))


def test_auto_takes_fp8_where_it_was_faster_and_the_gate_holds(unasked, caplog):
    load, timed = unasked
    with caplog.at_level(logging.INFO, logger="userip_fast.lm"):
        lm = load(1.0, 0.6)
    assert timed == [0, 14]  # one step in either form
    assert linears(lm) == {"FP8Linear": 14}
    assert lm.fp8_report.passed
    assert lm.fp8_report.time == 0.6
    assert lm.plan.residency == "fp8"
    assert "0.60 of the time" in str(lm.plan)
    assert "FP8 products; in FP8 NLL shift" in caplog.text
    again = load()  # the time is kept, the gate is not
    assert timed == [0, 14]
    assert linears(again) == {"FP8Linear": 14}
    nll, gradient = read(again)
    assert bool(torch.isfinite(nll).all())
    assert gradient.abs().sum() > 0


def test_auto_leaves_fp8_where_it_was_slower(unasked):
    load, timed = unasked
    want = read(load(1.0, 0.95))
    lm = load()  # known: not tried again
    assert len(timed) == 2
    assert lm.fp8_report is None
    assert linears(lm) == {"Linear": 14}
    assert lm.plan.residency == "resident"
    for a, b in zip(read(lm), want, strict=True):
        assert torch.equal(a, b)  # the dense weights came back to the bit


def test_auto_leaves_fp8_where_the_gate_does_not_hold(unasked, monkeypatch):
    monkeypatch.setattr(fp8_gate, "MIN_COSINE", 1.0)
    load, _ = unasked
    lm = load(1.0, 0.5)
    assert not lm.fp8_report.passed
    assert linears(lm) == {"Linear": 14}
    assert lm.plan.residency == "resident"
    monkeypatch.setattr(fp8_gate, "try_out", lambda *_: pytest.fail("tried"))
    folder = lm.folder
    open_lm(str(folder), LMConfig(path=str(folder), residency="resident"))
    open_lm(str(folder), LMConfig(path=str(folder), memory_gib=2.0))


def test_fp8_is_not_tried_where_it_cannot_be(monkeypatch):
    model = deep(1, width=32)
    residency.make_resident(model, torch.float32)
    lm = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, model=model, plan=None,
        architecture=SimpleNamespace(step=lambda recompute, work: 1000),
    )  # fmt: skip
    monkeypatch.setattr(fp8_gate, "free_bytes", lambda device: 10**9)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert fp8_gate._why_not_unasked(lm, None) is None
    for change, why in (
        ({"device": torch.device("cpu")}, "bfloat16 on a GPU"),
        ({"dtype": torch.float32}, "bfloat16 on a GPU"),
        ({"model": nn.Sequential()}, "no linear"),
    ):
        other = SimpleNamespace(**{**vars(lm), **change})
        assert why in fp8_gate._why_not_unasked(other, None)
    monkeypatch.setattr(fp8_gate, "free_bytes", lambda device: 1000)
    assert "are free" in fp8_gate._why_not_unasked(lm, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert "disagree" in fp8_gate._why_not_unasked(lm, None)


def test_fp8_refuses_sizes_that_tensor_cores_do_not_take():
    model = deep(1, width=24)
    residency.make_resident(model, torch.float32)
    with pytest.raises(UnsupportedError, match=r"multiples of 16, layers.0.0 is \(24, 24\)"):
        fp8.convert_linears(model)


def test_gate_fails_for_each_reason():
    good = fp8_gate.GateReport(0.001, 0.999, 0.99, 1.0)
    assert good.passed
    for bad in ({"nll_shift": 0.02}, {"cosine": 0.98}, {"same_codes": 0.9}, {"time": 0.95}):
        assert not fp8_gate.GateReport(**{**vars(good), **bad}).passed

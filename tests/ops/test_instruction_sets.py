"""Every instruction set gives the bits of every other; the choice is measured, kept and forced."""

import json
import logging

import pytest
import torch

from userip_fast import ops
from userip_fast.core import _extension
from userip_fast.core.errors import UserIPError
from userip_fast.ops import isa
from userip_fast.ops._products import frozen_linear, product
from userip_fast.ops.nf4_format import NF4Weight

pytestmark = pytest.mark.skipif(
    _extension.why_not() is not None, reason=f"compiled extension: {_extension.why_not()}"
)


@pytest.fixture
def module():
    """The extension, whose choices are put back afterwards."""
    chosen = isa.settle()
    yield _extension.load()
    for op, name in chosen.items():
        if op != isa.PRODUCTS:
            _extension.load().use_instruction_set(op, name)


def calls():
    """op -> a call of it on sizes that end inside vectors of any length."""
    torch.manual_seed(0)
    x, weight, c = torch.randn(67, 83), torch.randn(83), torch.randn(300, 83)
    angles, heads = torch.randn(67, 22), torch.randn(67, 3, 22)
    vocab, bias = torch.randn(1031, 83), torch.randn(1031)
    target, share = torch.randint(1031, (67,)), torch.rand(67)
    nf4 = [NF4Weight.quantize(torch.randn(shape)) for shape in ((70, 128), (33, 45))]
    rows = [torch.randn(n, w.shape[1]) for w in nf4 for n in (1, 7, 32)]
    events = torch.randint(50, (900,))
    offsets = torch.tensor([0, 0, 3, 90, 91, 900])

    def posteriors():
        for codes in (3, 8, 16, 23, 64, 150):
            table = torch.randn(50, codes)
            prior = torch.randn(codes).log_softmax(0)
            yield from ops.profile_posterior(table, events, offsets, prior, impl="cpu")
            yield from ops.profile_posterior(
                table, events, offsets, prior, weights=events / 50, impl="cpu"
            )

    def entropies():
        for cap in (0.0, 4.0):
            hidden = x.clone().requires_grad_()
            nll = ops.linear_cross_entropy(
                hidden, vocab, target, share, torch.tensor([0, 30, 67]), bias=bias, softcap=cap,
                impl="cpu",
            )  # fmt: skip
            yield nll.detach()
            yield torch.autograd.grad(nll.sum(), hidden)[0]

    def blocks():
        y = x.clone().requires_grad_()
        for out in (
            *ops.rms_norm(y, weight, residual=x, impl="cpu"),
            ops.gated(y, x, impl="cpu"),
            ops.gated(y, x, act="gelu_tanh", impl="cpu"),
            ops.rotate(heads, angles, angles, impl="cpu"),
        ):
            yield out.detach()
            if out.requires_grad:
                yield torch.autograd.grad(out.sum(), y, retain_graph=True)[0]

    def weights():
        for w in nf4:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                yield ops.nf4_dequantize(w, dtype=dtype, impl="cpu")
                for r in rows:
                    if r.shape[1] == w.shape[1]:
                        yield ops.nf4_linear(r.to(dtype), w, impl="cpu")

    def codes():
        for k in (1, 4, 5, 16, 17, 32, 33, 300):
            twice = c[:k].clone()
            twice[k // 2] = twice[-1]  # a tie
            yield from ops.assign_codes_with_margin(x, twice, impl="cpu")
            yield from ops.assign_codes_with_stats(x, twice, impl="cpu")

    return {
        "assign_codes": codes,
        "cross_entropy": entropies,
        "frozen_block": blocks,
        "nf4": weights,
        "profile_posterior": posteriors,
    }


@pytest.mark.parametrize("op", list(calls()))
def test_all_sets_give_the_same_bits(module, op):
    sets = [s for s in module.instruction_sets()[op] if s != "baseline"]
    if len(sets) < 2:
        pytest.skip("the processor has one instruction set")
    found = {}
    for name in sets:
        module.use_instruction_set(op, name)
        torch.manual_seed(1)
        found[name] = list(calls()[op]())
    for name in sets[1:]:
        for ours, first in zip(found[name], found[sets[0]], strict=True):
            assert torch.equal(ours, first), name


def test_the_choice_is_measured_kept_and_read_again(module, tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    usable = isa.choices(module)
    settle = isa.settle.__wrapped__
    chosen = settle()
    assert chosen.keys() == usable.keys()
    assert all(chosen[op] in usable[op] for op in usable)
    store = tmp_path / "cache" / "instruction_sets.json"
    if any(len(sets) > 1 for sets in usable.values()):
        ((key, kept),) = json.loads(store.read_text()).items()
        assert kept == chosen
        assert isa.cpu_name() in key
        monkeypatch.setattr(isa, "measure", lambda *_: pytest.fail("measured again"))
        assert settle() == chosen
        store.write_text("[1]")  # of another form: measured again
        monkeypatch.setattr(isa, "measure", lambda *_: {})
        assert settle() == {op: sets[-1] for op, sets in usable.items()}


def test_without_a_folder_to_keep_it_in_it_is_measured_each_time(
    module, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "file" / "cache"))
    if all(len(sets) < 2 for sets in isa.choices(module).values()):
        pytest.skip("there is nothing to choose")
    with caplog.at_level(logging.INFO, "userip_fast"):
        assert isa.settle.__wrapped__()
    assert "not kept" in caplog.text


def test_one_variable_overrides(module, monkeypatch):
    usable = {"a": ["baseline", "avx2", "avx512"], "b": ["avx2"], isa.PRODUCTS: ["mkl", "onednn"]}
    for value, want in (
        ("", {}),
        ("avx2", {"a": "avx2", "b": "avx2"}),
        ("avx512vl", {"a": "avx2", "b": "avx2"}),
        ("baseline", {"a": "baseline", "b": "avx2"}),
        ("avx2,a=avx512,products=mkl", {"a": "avx512", "b": "avx2", isa.PRODUCTS: "mkl"}),
    ):
        monkeypatch.setenv(isa.VARIABLE, value)
        assert isa.forced(usable) == want
    for wrong in ("sse", "b=avx512", "c=avx2", "products=avx2"):
        monkeypatch.setenv(isa.VARIABLE, wrong)
        with pytest.raises(UserIPError, match=f"{isa.VARIABLE} must be one of .* is {wrong!r}"):
            isa.forced(usable)


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_products_of_either_library(monkeypatch, library):
    if library == "onednn" and isa.onednn() is None:
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(isa, "settle", lambda: {isa.PRODUCTS: library})
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 37, 70), torch.randn(33, 70), torch.randn(33)
    want = x.double() @ w.double().T + b.double()
    leaf = x.clone().requires_grad_()
    y = frozen_linear(leaf, w, b)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(y.square().sum(), leaf)
    torch.testing.assert_close(dx.double(), 2 * want @ w.double(), rtol=1e-5, atol=1e-4)
    assert product(x[0, :0], w).shape == (0, 33)
    assert product(x[0].bfloat16(), w.bfloat16()).dtype == torch.bfloat16

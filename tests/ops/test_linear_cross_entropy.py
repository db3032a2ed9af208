import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from userip_fast.core import _extension
from userip_fast.ops import linear_cross_entropy as lce_op
from userip_fast.ops import linear_cross_entropy_reference
from userip_fast.ops.linear_cross_entropy import _linear_cross_entropy
from userip_fast.testing import assert_close_to_oracle, poisoned_memory

CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not())),
)
IMPLS = ["reference", CPU, "triton"]


# Lanes past the end of the vocabulary compute with -inf in Triton's interpreter; none is stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def make(rows, dim, vocab, users, dtype=torch.float32, bias=False):
    hidden = torch.randn(rows, dim).to(dtype)
    weight = (torch.randn(vocab, dim) / dim**0.5).to(dtype)
    target = torch.randint(vocab, (rows,))
    loss_weight = torch.rand(rows)
    cuts = torch.randint(0, rows + 1, (users - 1,)).sort().values
    cu_rows = torch.cat([torch.tensor([0]), cuts, torch.tensor([rows])])
    return (
        hidden,
        weight,
        target,
        loss_weight,
        cu_rows,
        torch.randn(vocab).to(dtype) if bias else None,
    )


def dense(hidden, weight, target, loss_weight, cu_rows, bias, softcap, scale=1.0):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    token = F.cross_entropy(logits, target, reduction="none") * loss_weight
    user = torch.repeat_interleave(torch.arange(len(cu_rows) - 1), cu_rows.diff())
    return torch.zeros(len(cu_rows) - 1, dtype=token.dtype).index_add(0, user, token)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 1.0), (0.0, 2.7), (5.0, 0.3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 37])
def test_equals_dense_fp64(rows, bias, softcap, scale, dtype, impl, monkeypatch):
    monkeypatch.setattr(
        sys.modules[linear_cross_entropy_reference.__module__], "_CHUNK_BYTES", 4 * 97 * 16
    )
    hidden, weight, target, loss_weight, cu_rows, b = make(rows, 24, 97, 4, dtype, bias)
    grad = torch.rand(4)

    def run(fn, cast):
        h = cast(hidden).requires_grad_()
        nll = fn(h, cast(weight), target, cast(b) if bias else None)
        nll.backward(grad.to(nll.dtype))
        return nll.detach(), h.grad

    with poisoned_memory():
        got = run(
            lambda h, w, t, b: lce_op(
                h, w, t, loss_weight, cu_rows, bias=b, softcap=softcap, scale=scale, impl=impl
            ),
            lambda x: x.detach().clone(),
        )
    low = run(
        lambda h, w, t, bb: dense(h, w, t, loss_weight, cu_rows, bb, softcap, scale).float(),
        lambda x: x.detach().clone(),
    )
    oracle = run(
        lambda h, w, t, bb: dense(h, w, t, loss_weight.double(), cu_rows, bb, softcap, scale),
        lambda x: x.detach().double(),
    )
    # nll is fp32, but the logits are rounded to `dtype` on their way.
    ulps = max(4.0, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    assert_close_to_oracle(got[0], oracle[0], low[0], ulps=ulps, name="nll")
    assert_close_to_oracle(got[1], oracle[1], low[1], name="d_hidden")


def test_opcheck_and_no_grad_is_cheaper():
    impls = ["reference", "triton"] + ["cpu"] * (_extension.why_not() is None)
    hidden, weight, target, loss_weight, cu_rows, b = make(9, 8, 31, 3, bias=True)
    for need_grad, impl in itertools.product((False, True), impls):
        torch.library.opcheck(
            _linear_cross_entropy.op,
            (
                hidden.requires_grad_(need_grad),
                weight,
                target,
                loss_weight,
                cu_rows,
                b,
                3.0,
                0.5,
                need_grad,
                impl,
            ),
        )
    _, d_hidden = linear_cross_entropy_reference(
        hidden.detach(), weight, target, loss_weight, cu_rows
    )
    assert d_hidden.numel() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_large_vocabulary_and_far_apart_logits(impl):
    """Several vocabulary tiles, probabilities from 1 to 0, a weight of 0, and logits of +-80."""
    hidden, weight, target, loss_weight, cu_rows, _ = make(6, 16, 9001, 2)
    hidden = hidden * torch.tensor([0.0, 1.0, 5.0, 20.0, 80.0, 80.0])[:, None]
    loss_weight[3] = 0
    target[4] = (hidden[4] @ weight.T).argmax()
    with poisoned_memory():
        leaf = hidden.clone().requires_grad_()
        nll = lce_op(leaf, weight, target, loss_weight, cu_rows, impl=impl)
        nll.sum().backward()
    wide = hidden.double().requires_grad_()
    oracle = dense(wide, weight.double(), target, loss_weight.double(), cu_rows, None, 0.0)
    oracle.sum().backward()
    torch.testing.assert_close(nll.double(), oracle, rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=3e-6)
    assert not leaf.grad[3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_lost(impl):
    hidden, weight, target, loss_weight, _, _ = make(3, 8, 31, 1)
    hidden[1, 2] = float("nan")
    nll = lce_op(hidden, weight, target, loss_weight, torch.arange(4), impl=impl)
    assert nll.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    hidden, weight, target, loss_weight, _, _ = make(0, 8, 31, 1)
    hidden.requires_grad_()
    nll = lce_op(hidden, weight, target, loss_weight, torch.zeros(3, dtype=torch.int64), impl=impl)
    nll.sum().backward()
    assert nll.tolist() == [0.0, 0.0]
    assert hidden.grad.shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_dense_fp64(dtype, softcap):
    hidden, weight, target, loss_weight, cu_rows, bias = make(300, 64, 9001, 4, dtype, True)
    leaf = hidden.cuda().requires_grad_()
    args = (weight.cuda(), target.cuda(), loss_weight.cuda(), cu_rows.cuda())
    nll = lce_op(leaf, *args, bias=bias.cuda(), softcap=softcap, impl="triton")
    nll.sum().backward()
    wide = hidden.double().requires_grad_()
    oracle = dense(
        wide, weight.double(), target, loss_weight.double(), cu_rows, bias.double(), softcap
    )
    oracle.sum().backward()
    rounding = torch.finfo(dtype).eps
    for got, want in ((nll, oracle), (leaf.grad, wide.grad)):
        error = (got.cpu().double() - want).abs().max()
        assert error <= max(4 * rounding, 1e-5) * want.abs().max()


def test_bad_arguments_are_named():
    hidden, weight, target, loss_weight, cu_rows, _ = make(5, 8, 31, 2)
    with pytest.raises(ValueError, match="must share D"):
        lce_op(hidden, weight[:, :4], target, loss_weight, cu_rows)
    with pytest.raises(ValueError, match="frozen"):
        lce_op(hidden, weight.clone().requires_grad_(), target, loss_weight, cu_rows)
    with pytest.raises(ValueError, match=r"target must be in \[0, 31\), got .* 31"):
        lce_op(hidden, weight, target.index_fill(0, torch.tensor([2]), 31), loss_weight, cu_rows)
    with pytest.raises(ValueError, match="cu_rows must rise from 0 to 5"):
        lce_op(hidden, weight, target, loss_weight, cu_rows.flip(0))
    with pytest.raises(ValueError, match="impl='nope'"):
        lce_op(hidden, weight.detach(), target, loss_weight, cu_rows, impl="nope")

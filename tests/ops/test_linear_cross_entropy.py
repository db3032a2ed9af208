import sys

import pytest
import torch
import torch.nn.functional as F

from userip_fast.ops import linear_cross_entropy as lce_op
from userip_fast.ops import linear_cross_entropy_reference
from userip_fast.ops.linear_cross_entropy import _linear_cross_entropy
from userip_fast.testing import assert_close_to_oracle, poisoned_memory


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


def dense(hidden, weight, target, loss_weight, cu_rows, bias, softcap):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    token = F.cross_entropy(logits, target, reduction="none") * loss_weight
    user = torch.repeat_interleave(torch.arange(len(cu_rows) - 1), cu_rows.diff())
    return torch.zeros(len(cu_rows) - 1, dtype=token.dtype).index_add(0, user, token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_equals_dense_fp64(rows, bias, softcap, dtype, monkeypatch):
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
            lambda h, w, t, bb: lce_op(h, w, t, loss_weight, cu_rows, bias=bb, softcap=softcap),
            lambda x: x.detach().clone(),
        )
    low = run(
        lambda h, w, t, bb: dense(h, w, t, loss_weight, cu_rows, bb, softcap).float(),
        lambda x: x.detach().clone(),
    )
    oracle = run(
        lambda h, w, t, bb: dense(h, w, t, loss_weight.double(), cu_rows, bb, softcap),
        lambda x: x.detach().double(),
    )
    assert_close_to_oracle(got[0], oracle[0], low[0], name="nll")
    assert_close_to_oracle(got[1], oracle[1], low[1], name="d_hidden")


def test_opcheck_and_no_grad_is_cheaper():
    hidden, weight, target, loss_weight, cu_rows, b = make(9, 8, 31, 3, bias=True)
    for need_grad in (False, True):
        torch.library.opcheck(
            _linear_cross_entropy,
            (
                hidden.requires_grad_(need_grad),
                weight,
                target,
                loss_weight,
                cu_rows,
                b,
                3.0,
                need_grad,
                "reference",
            ),
        )
    _, d_hidden = linear_cross_entropy_reference(
        hidden.detach(), weight, target, loss_weight, cu_rows
    )
    assert d_hidden.numel() == 0


def test_bad_arguments_are_named():
    hidden, weight, target, loss_weight, cu_rows, _ = make(5, 8, 31, 2)
    with pytest.raises(ValueError, match="must share D"):
        lce_op(hidden, weight[:, :4], target, loss_weight, cu_rows)
    with pytest.raises(ValueError, match="frozen"):
        lce_op(hidden, weight.requires_grad_(), target, loss_weight, cu_rows)
    with pytest.raises(ValueError, match="impl='nope'"):
        lce_op(hidden, weight.detach(), target, loss_weight, cu_rows, impl="nope")

import pytest
import torch

from userip_fast.ops import SLACK_ROW, prepend_soft_prompts
from userip_fast.ops.prepend_soft_prompts import (
    _forward,
    _gradient,
)
from userip_fast.testing import poisoned_memory


def make(rows, dim, vocabulary=11, soft=4, dtype=torch.float32, soft_dtype=None):
    """Every kind of plan entry; the last soft row is never used."""
    plan = torch.randint(-(soft - 1), vocabulary, (rows,), dtype=torch.int32)
    plan[:: max(1, rows // 3)] = -1
    plan[-1] = SLACK_ROW
    table = torch.randn(vocabulary, dim).to(dtype)
    return table, torch.randn(soft, dim).to(soft_dtype or dtype), plan


def naive(table, soft, plan, scale):
    rows = []
    for p in plan.tolist():
        if p == SLACK_ROW:
            rows.append(torch.zeros(table.shape[1], dtype=table.dtype))
        elif p >= 0:
            rows.append(table[p] * torch.tensor(scale, dtype=table.dtype))
        else:
            rows.append(soft[-p - 1].to(table.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [1.0, 64.3])
@pytest.mark.parametrize(
    ("dtype", "soft_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize(("rows", "dim"), [(1, 5), (7, 16), (40, 33)])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_equals_row_by_row(impl, rows, dim, dtype, soft_dtype, scale):
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16; compiled under `gpu`")
    table, soft, plan = make(rows, dim, dtype=dtype, soft_dtype=soft_dtype)
    grad = torch.randn(rows, dim).to(dtype)
    with poisoned_memory():
        leaf = soft.clone().requires_grad_()
        x = prepend_soft_prompts(table, leaf, plan, scale=scale, impl=impl)
        x.backward(grad)
    assert torch.equal(x, naive(table, soft, plan, scale))
    # sums in plan order, in fp32: exactly what a loop over the plan gives
    want = torch.zeros(soft.shape, dtype=torch.float32)
    for p, g in zip(plan.tolist(), grad.float(), strict=True):
        if p < 0 and p != SLACK_ROW:
            want[-p - 1] += g
    assert leaf.grad.dtype == soft_dtype
    assert torch.equal(leaf.grad, want.to(soft_dtype))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_opcheck_and_empty(impl):
    table, soft, plan = make(9, 8)
    args = (table, soft.requires_grad_(), plan, 1.5, impl)
    torch.library.opcheck(_forward.op, args)
    torch.library.opcheck(_gradient.op, (torch.randn(9, 8), plan, 4, torch.float32, impl))
    for used in (plan[:0], torch.full_like(plan, SLACK_ROW), plan.clamp(min=0)):
        leaf = soft.detach().requires_grad_()
        x = prepend_soft_prompts(table, leaf, used, impl=impl)
        x.sum().backward()
        assert x.shape == (len(used), 8)
        assert not leaf.grad.any()


def test_triton_crosses_blocks_of_columns_and_marks_bad_ids(monkeypatch):
    from userip_fast.kernels import prepend_soft_prompts as kernels

    monkeypatch.setattr(kernels, "_BLOCK_D", 16)
    table, soft, plan = make(8, 37)
    plan[2], plan[5] = 11, -5
    leaf = soft.clone().requires_grad_()
    with poisoned_memory():
        x = prepend_soft_prompts(table, leaf, plan, scale=3.0, impl="triton")
        x.backward(torch.ones_like(x))
    good = torch.tensor([t not in (2, 5) for t in range(8)])
    assert torch.isnan(x[~good]).all()
    assert torch.equal(x[good], naive(table, soft, plan[good], 3.0))
    counts = torch.tensor([(plan == -r - 1).sum() for r in range(4)])
    assert torch.equal(leaf.grad, counts[:, None].expand(4, 37).float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_reference(dtype):
    table, soft, plan = make(3000, 1300, soft=40, dtype=dtype, soft_dtype=torch.float32)
    grad = torch.randn(3000, 1300).to(dtype)
    results = []
    for device, impl in (("cpu", "reference"), ("cuda", "triton")):
        leaf = soft.detach().to(device).requires_grad_()
        x = prepend_soft_prompts(table.to(device), leaf, plan.to(device), scale=64.3, impl=impl)
        x.backward(grad.to(device))
        results.append((x.detach().cpu(), leaf.grad.cpu()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments_are_named():
    table, soft, plan = make(9, 8)
    with pytest.raises(ValueError, match="must share D"):
        prepend_soft_prompts(table, soft[:, :4], plan)
    with pytest.raises(ValueError, match="frozen"):
        prepend_soft_prompts(table.clone().requires_grad_(), soft, plan)
    with pytest.raises(ValueError, match="plan must be int32"):
        prepend_soft_prompts(table, soft, plan.long())
    with pytest.raises(ValueError, match="impl='nope'"):
        prepend_soft_prompts(table, soft, plan, impl="nope")
    with pytest.raises(ValueError, match="scale must be finite"):
        prepend_soft_prompts(table, soft, plan, scale=float("inf"))
    for bad in (11, -5):
        plan[3] = bad
        with pytest.raises(ValueError, match=rf"plan\[3\] is {bad}"):
            prepend_soft_prompts(table, soft, plan)

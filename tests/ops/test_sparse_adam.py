import pytest
import torch

from userip_fast.core import _extension
from userip_fast.ops import sparse_adam
from userip_fast.ops.sparse_adam import _sparse_adam

CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not())),
)
IMPLS = ["reference", CPU, "triton"]


def state(n, dim, seed=0):
    torch.manual_seed(seed)
    theta = torch.randn(n, dim)
    return theta, torch.zeros(n, dim), torch.zeros(n, dim), torch.zeros(n, dtype=torch.int32)


def adam_by_hand(theta, m, v, t, g, lr, beta1, beta2, eps):
    """One row in float64, straight from the paper's algorithm."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return theta - lr * m_hat / (v_hat.sqrt() + eps), m, v


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 7, 64, 2061])
def test_rows_with_different_steps_match_a_hand_computation(impl, dtype, dim):
    theta, m, v, step = state(11, dim)
    hyper = {"lr": 0.03, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6}
    want = [
        (theta[r].double(), torch.zeros(dim).double(), torch.zeros(dim).double()) for r in range(11)
    ]
    count = [0] * 11
    for rows in ([3, 0, 9], [9], [10, 3, 9, 1], [], [9, 10]):  # row 9 takes four steps, row 1 one
        grad = torch.randn(len(rows), dim).to(dtype)
        sparse_adam(theta, m, v, step, torch.tensor(rows).long(), grad, **hyper, impl=impl)
        for i, r in enumerate(rows):
            count[r] += 1
            want[r] = adam_by_hand(*want[r], count[r], grad[i].double(), *hyper.values())
    assert step.tolist() == count
    for got, k in ((theta, 0), (m, 1), (v, 2)):
        torch.testing.assert_close(
            got.double(), torch.stack([w[k] for w in want]), rtol=3e-6, atol=3e-7
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_torch_adam_when_every_row_steps(impl):
    theta, m, v, step = state(5, 37)
    p = theta.clone().requires_grad_()
    optimiser = torch.optim.Adam([p], lr=0.01)
    for seed in range(4):
        torch.manual_seed(seed)
        grad = torch.randn(5, 37)
        p.grad = grad.clone()
        optimiser.step()
        sparse_adam(theta, m, v, step, torch.arange(5), grad, lr=0.01, impl=impl)
    torch.testing.assert_close(theta, p.detach(), rtol=1e-6, atol=5e-7)  # two units at 2.0


@pytest.mark.parametrize("impl", IMPLS)
def test_other_rows_keep_their_bits_and_order_does_not_matter(impl):
    theta, m, v, step = state(9, 130)
    m.normal_()
    v.uniform_(0.1, 1)
    step += 5
    before = [t.clone() for t in (theta, m, v, step)]
    rows, grad = torch.tensor([8, 2, 4]), torch.randn(3, 130)
    sparse_adam(theta, m, v, step, rows, grad, lr=0.1, impl=impl)
    others = torch.tensor([0, 1, 3, 5, 6, 7])
    for now, old in zip((theta, m, v, step), before, strict=True):
        assert torch.equal(now[others], old[others])
        assert not torch.equal(now[rows], old[rows])
    turned = [t.clone() for t in before]
    sparse_adam(*turned, rows.flip(0), grad.flip(0), lr=0.1, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(turned, (theta, m, v, step), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_late_row_takes_a_first_step(impl):
    theta, m, v, step = state(2, 3)
    for _ in range(100):
        sparse_adam(theta, m, v, step, torch.tensor([0]), torch.ones(1, 3), lr=0.01, impl=impl)
    before = theta[1].clone()
    sparse_adam(theta, m, v, step, torch.tensor([1]), torch.ones(1, 3), lr=0.01, impl=impl)
    torch.testing.assert_close(before - theta[1], torch.full((3,), 0.01), rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    theta, m, v, step = state(4, 8)
    args = (theta, m, v, step, torch.tensor([1, 3]), torch.randn(2, 8), 0.1, 0.9, 0.999, 1e-8, impl)
    torch.library.opcheck(_sparse_adam.op, args)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [1, 100, 4096])
def test_gpu_equals_the_reference(dim):
    theta, m, v, step = state(50, dim)
    there = [t.cuda() for t in (theta, m, v, step)]
    for seed in range(3):
        torch.manual_seed(seed)
        rows, grad = torch.randperm(50)[:20], torch.randn(20, dim)
        sparse_adam(theta, m, v, step, rows, grad, lr=0.1, impl="reference")
        sparse_adam(*there, rows.cuda(), grad.cuda(), lr=0.1, impl="triton")
    for got, want in zip(there, (theta, m, v, step), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=3e-6, atol=1e-6)


def test_bad_arguments_are_named():
    theta, m, v, step = state(4, 8)
    rows, grad = torch.tensor([0, 1]), torch.zeros(2, 8)
    with pytest.raises(ValueError, match="rows must be distinct"):
        sparse_adam(theta, m, v, step, torch.tensor([1, 1]), grad, lr=0.1)
    with pytest.raises(ValueError, match=r"rows must be in \[0, 4\)"):
        sparse_adam(theta, m, v, step, torch.tensor([0, 4]), grad, lr=0.1)
    with pytest.raises(ValueError, match=r"in \[0, 4\), got -1"):
        sparse_adam(theta, m, v, step, torch.tensor([-1, 2]), grad, lr=0.1)
    with pytest.raises(ValueError, match="v must be contiguous float32"):
        sparse_adam(theta, m, v.double(), step, rows, grad, lr=0.1)
    with pytest.raises(ValueError, match="step must be contiguous int32"):
        sparse_adam(theta, m, v, step.long(), rows, grad, lr=0.1)
    with pytest.raises(ValueError, match=r"grad must be floating \[2, 8\]"):
        sparse_adam(theta, m, v, step, rows, grad[:1], lr=0.1)
    with pytest.raises(ValueError, match="betas"):
        sparse_adam(theta, m, v, step, rows, grad, lr=0.1, beta2=1.0)
    with pytest.raises(ValueError, match="impl='nope'"):
        sparse_adam(theta, m, v, step, rows, grad, lr=0.1, impl="nope")

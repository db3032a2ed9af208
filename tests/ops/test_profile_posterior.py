import math

import pytest
import torch

from userip_fast.core import _extension
from userip_fast.ops import profile_posterior, profile_posterior_reference
from userip_fast.ops.profile_posterior import _profile_posterior
from userip_fast.testing import assert_close_to_oracle, poisoned_memory

CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not())),
)
IMPLS = ["reference", CPU, "triton"]


def case(codes, users=7, kinds=11, longest=40, weighted=False, seed=0):
    """Ragged users; the second has no event, and neither has the last."""
    torch.manual_seed(seed)
    count = torch.randint(1, longest + 1, (users,))
    count[1::3] = 0
    count[-1] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    total = int(offsets[-1])
    table = -3 * torch.rand(kinds, codes)
    prior = torch.randn(codes).log_softmax(0)
    weights = torch.rand(total) * 2 if weighted else None
    return table, torch.randint(kinds, (total,)), offsets, prior, weights


def by_hand(table, kinds, offsets, log_prior, weights):
    """One user, one event, one code at a time, in float64."""
    resp = torch.empty(len(offsets) - 1, table.shape[1], dtype=torch.float64)
    evidence = []
    for u in range(len(offsets) - 1):
        joint = log_prior.double().clone()
        for n in range(int(offsets[u]), int(offsets[u + 1])):
            w = 1.0 if weights is None else float(weights[n])
            joint += w * table[kinds[n]].double()
        evidence.append(math.log(sum(math.exp(x) for x in (joint - joint.max()).tolist())))
        evidence[-1] += float(joint.max())
        resp[u] = joint - evidence[-1]
    return resp, torch.tensor(evidence, dtype=torch.float64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("codes", [1, 5, 8, 15, 16, 17, 31, 32, 47, 100, 128, 131])
def test_equals_a_sum_by_hand(impl, codes, weighted):
    args = case(codes, weighted=weighted)
    want, want_evidence = by_hand(*args)
    with poisoned_memory():
        resp, evidence = profile_posterior(*args, impl=impl)
    assert_close_to_oracle(resp, want, want.float())
    assert evidence.dtype == torch.float64
    torch.testing.assert_close(evidence, want_evidence, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(resp.exp().sum(1), torch.ones(len(resp)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_event_gives_the_prior_and_no_user_nothing(impl):
    table, kinds, offsets, prior, _ = case(20)
    resp, evidence = profile_posterior(table, kinds, offsets, prior, impl=impl)
    for u in (1, 4, 6):
        torch.testing.assert_close(resp[u], prior, rtol=1e-6, atol=1e-6)
        assert abs(float(evidence[u])) < 1e-6
    none = kinds[:0]
    resp, evidence = profile_posterior(table, none, torch.zeros(3).long(), prior, impl=impl)
    torch.testing.assert_close(resp, prior.expand(2, -1), rtol=1e-6, atol=1e-6)
    resp, evidence = profile_posterior(table, none, torch.zeros(1).long(), prior, impl=impl)
    assert (resp.shape, evidence.shape) == ((0, 20), (0,))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_bits_do_not_depend_on_company_order_or_threads(impl, weighted):
    users = 300 if impl != "triton" else 9
    table, kinds, offsets, prior, weights = case(37, users=users, weighted=weighted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = profile_posterior(table, kinds, offsets, prior, weights, impl=impl)
        torch.set_num_threads(2)
        again = profile_posterior(table, kinds, offsets, prior, weights, impl=impl)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    order = torch.randperm(users)
    count = offsets.diff()[order]
    rows = torch.cat([torch.arange(offsets[u], offsets[u + 1]) for u in order.tolist()])
    turned = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    w = None if weights is None else weights[rows]
    other = profile_posterior(table, kinds[rows], turned, prior, w, impl=impl)
    assert all(torch.equal(a[order], b) for a, b in zip(whole, other))
    a, b = int(offsets[3]), int(offsets[4])
    w = None if weights is None else weights[a:b]
    alone = profile_posterior(table, kinds[a:b], torch.tensor([0, b - a]), prior, w, impl=impl)
    assert all(torch.equal(x[3:4], y) for x, y in zip(whole, alone))


@pytest.mark.parametrize("impl", IMPLS)
def test_long_histories_and_impossible_codes(impl):
    table, kinds, offsets, prior, _ = case(19, users=2, longest=1)
    kinds = torch.randint(len(table), (30_000 if impl != "triton" else 3000,))
    offsets = torch.tensor([0, len(kinds)])
    prior[4] = -torch.inf
    resp, evidence = profile_posterior(table, kinds, offsets, prior, impl=impl)
    joint = prior.double() + table.double()[kinds].sum(0)
    want = joint.logsumexp(0)
    assert abs(float(evidence - want)) < 1e-3  # of some -45,000, whose last bit in fp32 is 4e-3
    possible = [k for k in range(19) if k != 4]
    torch.testing.assert_close(resp[0].double()[possible], (joint - want)[possible])
    assert resp[0, 4] == -torch.inf


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(impl, weighted):
    torch.library.opcheck(_profile_posterior.op, (*case(10, weighted=weighted), impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_arguments_are_named(impl):
    table, kinds, offsets, prior, _ = case(6)

    def run(**changed):
        args = {"table": table, "kinds": kinds, "offsets": offsets, "log_prior": prior, **changed}
        profile_posterior(**args, impl=impl)

    with pytest.raises(ValueError, match=r"table must be float32 \[E, Z\]"):
        run(table=table.double())
    with pytest.raises(ValueError, match="kinds must be int64"):
        run(kinds=kinds.int())
    with pytest.raises(ValueError, match="offsets must have one entry more"):
        run(offsets=offsets[:0])
    with pytest.raises(ValueError, match=r"log_prior must be floating \[6\]"):
        run(log_prior=prior[:5])
    with pytest.raises(ValueError, match="weights must be float32"):
        run(weights=torch.ones(3))
    with pytest.raises(ValueError, match="table must be contiguous"):
        run(table=table.T.contiguous().T)
    with pytest.raises(ValueError, match="offsets must go from 0 to"):
        run(offsets=offsets[1:])
    turned = offsets.clone()
    turned[1] = offsets[-1] + 5
    with pytest.raises(ValueError, match="offsets"):
        run(offsets=turned)
    for kind in (-1, len(table)):
        wrong = kinds.clone()
        wrong[-1] = kind
        with pytest.raises(ValueError, match=r"kinds.* rows of the table"):
            run(kinds=wrong)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl='nope'"):
        profile_posterior(*case(6), impl="nope")


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [1, 16, 100, 1024, 5000])
def test_gpu_equals_the_reference(codes):
    args = case(codes, users=500, weighted=True)
    want = profile_posterior_reference(*args)
    got = profile_posterior(*(x.cuda() for x in args), impl="triton")
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-7, atol=1e-6)

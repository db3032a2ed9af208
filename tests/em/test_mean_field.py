"""The posterior by mean field, on likelihoods from a table: beside brute force, ascent, exact."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.em import Block, EMState, posterior
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.scorer import Scorer

CONFIG = EMConfig(estep="posterior", posterior="mean_field", prune_share=0.0)
SIZES = (3, 4, 2)


class Table:
    """An engine that looks the log likelihood of behaviour up in `log_p` [U, K_1, ..., K_J], and
    remembers what it was asked for. Codewords are their codes' numbers."""

    def __init__(self, log_p):
        self.log_p, self.asked = log_p, []
        lm = tiny.frozen("llama")
        fields = log_p.dim() - 1
        self.layout, self.lm = tiny.template(fields).layout(lm.tokenizer), lm
        self.block = Block(
            tiny.behaviour(self.layout, len(log_p)), np.arange(len(log_p), dtype=np.uint64)
        )
        self.books = [Codebook(torch.arange(float(k))[:, None]) for k in log_p.shape[1:]]
        for book in self.books:
            book.log_prior = torch.randn(len(book)).log_softmax(0)
        prior = [book.log_prior.double() for book in self.books]
        self.joint = log_p + sum(  # [U, K_1, ..., K_J]
            p.view(-1, *[1] * (fields - 1 - j)) for j, p in enumerate(prior)
        )

    def nll(self, pack, rows):
        at = torch.cat([torch.from_numpy(pack.users)[:, None], rows[:, :, 0]], dim=1)
        self.asked += map(tuple, at.tolist())
        at = at.round().long()  # the neutral codeword reads like some code
        return -self.log_p[tuple(at.T)].float()

    def run(self, **settings):
        estep = PosteriorEStep(self, replace(CONFIG, **settings))
        self.asked = []
        return estep.run(self.block, self.books, EMState())


def mean_field_of(joint, z, sweeps=200):
    """[U] ELBO and per field [U, K_j] q of a mean field by brute force over the full table: the
    field with the greatest log sum given the codes `z` [U, J] of the others is updated first."""
    users, sizes = len(joint), joint.shape[1:]
    out_elbo, out_q = [], [torch.zeros(users, k, dtype=torch.float64) for k in sizes]
    for u in range(users):
        q = [torch.nn.functional.one_hot(z[u, j], k).double() for j, k in enumerate(sizes)]

        def update(j, q=q, table=joint[u]):
            expected = table
            for i in reversed(range(len(q))):
                if i != j:
                    expected = (expected.movedim(i, -1) * q[i]).sum(-1)
            return expected

        first = max(range(len(sizes)), key=lambda j: float(update(j).logsumexp(0)))
        q[first] = update(first).softmax(0)
        for _ in range(sweeps):
            for j in range(len(sizes)):
                q[j] = update(j).softmax(0)
        expected = update(0)
        out_elbo.append(float(expected @ q[0] + sum(torch.special.entr(x).sum() for x in q)))
        for j, x in enumerate(q):
            out_q[j][u] = x
    return torch.tensor(out_elbo, dtype=torch.float64), out_q


def test_codes_left_out_do_not_count():
    """The second field's neutral codeword reads like its code 1, whose prior is tiny: what was
    scored beside it is worth more than all combinations of codes."""
    log_p = torch.full((4, 2, 3), -30.0, dtype=torch.float64)
    log_p[:, :, 1] = torch.tensor([0.0, -10.0])
    table = Table(log_p)
    table.books[1].log_prior = torch.tensor([0.5, 1e-9, 0.5]).log()
    exact = table.run(posterior="exact")
    for other in ("ascent", "mean_field"):
        found = table.run(posterior=other)
        assert torch.equal(found.code_ids, exact.code_ids)
        assert (found.elbo <= exact.elbo + 1e-5).all()


def test_mean_field_is_exact_where_the_likelihood_factorises(monkeypatch):
    a, b, c = (2 * torch.randn(40, k, dtype=torch.float64) for k in SIZES)
    table = Table(a[:, :, None, None] + b[:, None, :, None] + c[:, None, None, :])
    exact, found = table.run(posterior="exact"), table.run()
    for r, want in zip(found.log_resp, exact.log_resp):
        likely = want > -8  # what is further behind is left out
        torch.testing.assert_close(r[likely], want[likely], rtol=1e-3, atol=3e-3)
    assert torch.equal(found.code_ids, exact.code_ids)
    # At most three codes a field are light, and each of two fields shows its others without them.
    lost = -2 * np.log1p(-3 * posterior._MIN_WEIGHT)
    assert (found.elbo <= exact.elbo + 1e-5).all()
    assert (found.elbo >= exact.elbo - lost).all()
    monkeypatch.setattr(posterior, "_MIN_WEIGHT", 0.0)
    torch.testing.assert_close(table.run(prune_nats=1e9).elbo, exact.elbo, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_mean_field_is_that_of_brute_force_where_it_does_not(monkeypatch, spread):
    table = Table(spread * torch.randn(40, *SIZES, dtype=torch.float64))
    z = table.run(posterior="ascent").code_ids
    want, q = mean_field_of(table.joint, z)
    monkeypatch.setattr(posterior, "_MIN_WEIGHT", 0.0)
    monkeypatch.setattr(posterior, "_SETTLED", 0.0)
    found = table.run(sweeps=200, prune_nats=1e9)
    torch.testing.assert_close(found.elbo, want, rtol=1e-6, atol=1e-5)
    for r, x in zip(found.log_resp, q):
        torch.testing.assert_close(r.exp().double(), x, rtol=1e-3, atol=1e-3)
    assert (want < table.joint.flatten(1).logsumexp(1) - 1e-3).any()  # not the exact posterior


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_mean_field_lies_between_ascent_and_exact_and_rises(spread):
    table = Table(spread * torch.randn(60, *SIZES, dtype=torch.float64))
    exact, ascent = table.run(posterior="exact"), table.run(posterior="ascent")
    found = table.run()
    for better, worse in ((exact, found), (found, ascent)):
        assert (better.elbo >= worse.elbo - 1e-5).all()
    every = torch.arange(60)
    assert (found.elbo >= table.joint[(every, *ascent.code_ids.T)] - 1e-5).all()
    assert found.elbo.sum() > ascent.elbo.sum() + 1.0
    assert len(set(table.asked)) == len(table.asked)  # no pair is scored twice
    for r in found.log_resp:
        torch.testing.assert_close(r.exp().sum(1), torch.ones(60))
    at = table.log_p[(every, *found.code_ids.T)]
    torch.testing.assert_close(found.nll.double(), -at, rtol=1e-5, atol=1e-5)
    weight = found.candidates.weight
    total = torch.zeros(60, dtype=torch.float64).index_add_(0, found.candidates.users, weight)
    assert (total <= 1 + 1e-9).all()
    assert (total > 1 - 24 * posterior._MIN_WEIGHT).all()

    before = found.elbo - torch.inf
    for sweeps in (3, 4, 5, 9):
        here = table.run(sweeps=sweeps)
        # Where ascent ended a sweep earlier, mean field begins at the same lines.
        z = table.run(sweeps=sweeps - 1, posterior="ascent").code_ids
        same = (z == ascent.code_ids).all(1)
        assert (here.elbo >= before)[same].all()
        before = torch.where(same, here.elbo, before)
    assert same.all()
    again = table.run(sweeps=9)
    assert torch.equal(again.elbo, here.elbo)
    assert all(torch.equal(a, b) for a, b in zip(again.log_resp, here.log_resp))


def test_mean_field_looks_at_no_more_than_so_many_combinations(monkeypatch):
    """Of flat posteriors, that is, whose codes all count; what is left out lowers the objective."""
    table = Table(0.5 * torch.randn(30, 6, 6, dtype=torch.float64))
    ascent, exact, free = table.run(posterior="ascent"), table.run(posterior="exact"), table.run()
    monkeypatch.setattr(posterior, "_EXACT_LIMIT", 4)
    tight = table.run()
    assert tight.forward_equivalents.sum() < 0.9 * free.forward_equivalents.sum()
    assert (tight.elbo >= ascent.elbo - 1e-5).all()
    assert (tight.elbo <= exact.elbo + 1e-5).all()
    assert (tight.elbo <= free.elbo + 1e-5).double().mean() > 0.9
    codes = tight.candidates.codes[tight.candidates.users == 0]
    assert all(len(column.unique()) <= 2 for column in codes.T)


def test_combinations_without_number_are_scored_again(monkeypatch):
    table = Table(torch.randn(30, *SIZES, dtype=torch.float64))
    found = table.run()
    real = Scorer.joint

    def joint(self, users, codes):
        self.radix = [2**21] * 3
        return real(self, users, codes)

    monkeypatch.setattr(Scorer, "joint", joint)
    again = table.run()
    assert torch.equal(found.elbo, again.elbo)
    assert found.forward_equivalents.sum() < again.forward_equivalents.sum()

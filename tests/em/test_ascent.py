"""The posterior by coordinate ascent, on likelihoods from a table."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.em import Block, EMState, posterior
from userip_fast.em.posterior import PosteriorEStep

CONFIG = EMConfig(estep="posterior", posterior="ascent", prune_share=0.0)
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


def test_codes_left_out_do_not_count():
    """The second field's neutral codeword reads like its code 1, whose prior is tiny: what was
    scored beside it is worth more than all combinations of codes."""
    log_p = torch.full((4, 2, 3), -30.0, dtype=torch.float64)
    log_p[:, :, 1] = torch.tensor([0.0, -10.0])
    table = Table(log_p)
    table.books[1].log_prior = torch.tensor([0.5, 1e-9, 0.5]).log()
    exact = table.run(posterior="exact")
    found = table.run()
    assert torch.equal(found.code_ids, exact.code_ids)
    assert (found.elbo <= exact.elbo + 1e-5).all()


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_ascent_lies_below_exact_and_scores_no_pair_twice(spread):
    table = Table(spread * torch.randn(60, *SIZES, dtype=torch.float64))
    exact, found = table.run(posterior="exact"), table.run()
    assert (found.elbo <= exact.elbo + 1e-5).all()
    assert len(set(table.asked)) == len(table.asked)
    at = table.log_p[(torch.arange(60), *found.code_ids.T)]
    torch.testing.assert_close(found.nll.double(), -at, rtol=1e-5, atol=1e-5)
    total = torch.zeros(60, dtype=torch.float64)
    total.index_add_(0, found.candidates.users, found.candidates.weight)
    assert (total <= 1 + 1e-9).all()
    assert (total > 1 - 24 * posterior._MIN_WEIGHT).all()

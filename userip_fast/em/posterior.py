"""The posterior E-step: p(code | behaviour) from the LM's likelihoods under codewords.

A user's soft prompt may only be a codeword, so forward passes say it all:

    p(z[u] = z | behaviour)  is proportional to  prod_j pi_j[z_j] * p_LM(behaviour | C_1[z_1], ...)

- `exact`, while there are few combinations of codes: all of them are scored. The objective is the
  log evidence of the behaviour.
- Coordinate ascent otherwise: one field after another, its codes given those of the others, from
  the mean codeword, until none changes. With L[u, j] the log of the sum over k of the joint with
  z_j = k and the other codes as found, the objective is the mean of L over the fields. Each L is a
  part of the sum that makes the evidence, so the objective is never above `exact`'s; with one field
  they are the same.

In either way the candidates' weights are what maximises the objective (an ELBO), so that an M-step
which raises the expected log joint raises it too. A short prefix of the behaviour weeds candidates
out first: the LM is causal, so its likelihood is a factor of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.em.scorer import Scorer
from userip_fast.em.steps import Block, Candidates, EMState, Profiles
from userip_fast.lm.engine import Engine

_EXACT_LIMIT = 4096
_MIN_WEIGHT = 3e-3  # candidates that an M-step need not look at
_OWN = -2  # stands for a field's own code among those that its line was scored with


class PosteriorEStep:
    """See the module.

    Args:
        engine: Scores packs.
        config: `posterior`, `sweeps`, `prune_share`, `prune_nats`, pack size.
    """

    def __init__(self, engine: Engine, config: EMConfig) -> None:
        self.engine, self.config = engine, config

    def run(self, block: Block, codebooks: list[Codebook] | None, state: EMState) -> Profiles:
        """See `EStep.run`; the codebooks must be there."""
        assert codebooks is not None, "a posterior over codes needs codebooks"
        scorer = Scorer(self.engine, block.behaviour, codebooks, self.config)
        found = (_exact if is_exact(self.config, scorer.sizes) else _ascent)(scorer)
        return Profiles(
            hashes=block.hashes,
            code_ids=found.code_ids,
            nll=found.nll.float(),
            weight=torch.from_numpy(block.behaviour.total_weight),
            forward_equivalents=scorer.cost.float(),
            log_resp=[r.float() for r in found.log_resp],
            elbo=found.elbo,
            candidates=found.candidates,
        )


@dataclass
class _Found:
    code_ids: Tensor  # [U, J]
    nll: Tensor  # [U] fp64, at code_ids
    log_resp: list[Tensor]  # per field [U, K_j] fp64
    elbo: Tensor  # [U] fp64
    candidates: Candidates


def _exact(scorer: Scorer) -> _Found:
    sizes, users = scorer.sizes, scorer.num_users
    combos = torch.cartesian_prod(*[torch.arange(k) for k in sizes]).view(-1, len(sizes))  # [M, J]
    prior = scorer.prior_of(combos)
    every = torch.arange(users)
    alive = torch.ones(users, len(combos), dtype=torch.bool)
    if scorer.prefix is not None:
        alive = scorer.within(scorer.prefix_joint(every, combos.expand(users, -1, -1), prior))
    who, which = alive.nonzero(as_tuple=True)
    log_p = torch.full(alive.shape, -torch.inf, dtype=torch.float64)
    log_p[who, which] = scorer.log_likelihood(who, combos[which])
    joint = log_p + prior
    elbo = joint.logsumexp(1)
    posterior = joint - elbo[:, None]
    grid = posterior.view(users, *sizes)
    log_resp = [
        grid.movedim(1 + j, 1).flatten(2).logsumexp(2) if len(sizes) > 1 else grid
        for j in range(len(sizes))
    ]
    code_ids = torch.stack([r.argmax(1) for r in log_resp], dim=1)
    at = torch.zeros(users, dtype=torch.int64)
    for j, k in enumerate(sizes):
        at = at * k + code_ids[:, j]
    # Each field's best code apart may be a combination that pruning left out.
    lost = log_p[every, at].isinf().nonzero().flatten()
    log_p[lost, at[lost]] = scorer.log_likelihood(lost, code_ids[lost])
    weight = posterior.exp()
    who, which = (weight >= _MIN_WEIGHT).nonzero(as_tuple=True)
    return _Found(
        code_ids,
        -log_p[every, at],
        log_resp,
        elbo,
        Candidates(who, combos[which], weight[who, which]),
    )


def _climb(scorer: Scorer) -> tuple[Tensor, list[Tensor], Tensor]:
    """Where coordinate ascent ends.

    Returns:
        [U, J] codes; per field its line, [U, K_j] fp64 log joint of its codes and of the others'
        it was scored with, -inf for codes that were left out; and [U, J, J] these others' codes.
    """
    sizes, users = scorer.sizes, scorer.num_users
    fields = len(sizes)
    every = torch.arange(users)
    z = torch.tensor(sizes).expand(users, -1).clone()  # the neutral codewords
    alive = [torch.ones(users, k, dtype=torch.bool) for k in sizes]
    if scorer.prefix is not None:  # where to begin, and what to leave out
        for j, size in enumerate(sizes):
            codes = z[:, None].repeat(1, size, 1)
            codes[:, :, j] = torch.arange(size)
            begun = scorer.prefix_joint(every, codes, scorer.log_prior[j][:-1])
            alive[j] = scorer.within(begun)
            z[:, j] = begun.argmax(1)
    line = [torch.full((users, k), -torch.inf, dtype=torch.float64) for k in sizes]
    given = torch.full((users, fields, fields), -1)  # the other fields' codes of each line
    active = every
    for _ in range(scorer.config.sweeps):
        before = z.clone()
        for j in range(fields):
            others = z[active].clone()
            others[:, j] = _OWN
            moved = (given[active, j] != others).any(1)
            stale = active[moved]
            given[stale, j] = others[moved]
            line[j][stale] = -torch.inf
            who, k = alive[j][stale].nonzero(as_tuple=True)
            who = stale[who]
            codes = z[who]
            codes[:, j] = k
            line[j][who, k] = scorer.joint(who, codes)
            alive[j][stale] &= scorer.within(line[j][stale])
            z[stale, j] = line[j][stale].argmax(1)
        active = active[(z != before)[active].any(1)]
        if not len(active):
            break
    return z, line, given


def _ascent(scorer: Scorer) -> _Found:
    z, line, given = _climb(scorer)
    fields = len(line)
    evidence = torch.stack([x.logsumexp(1) for x in line], dim=1)
    log_resp = [x - e[:, None] for x, e in zip(line, evidence.T)]
    parts = []
    for j, r in enumerate(log_resp):
        weight = r.exp() / fields
        who, k = (weight >= _MIN_WEIGHT).nonzero(as_tuple=True)
        codes = given[who, j]
        codes[:, j] = k
        parts.append((who, codes, weight[who, k]))
    who, codes, weight = (torch.cat(x) for x in zip(*parts))
    # The codes found stand in every line.
    pairs = torch.cat([who[:, None], codes], dim=1)
    rows, same = torch.unique(pairs, dim=0, return_inverse=True)
    weight = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, same, weight)
    return _Found(
        z,
        scorer.prior_of(z) - scorer.joint(torch.arange(len(z)), z),
        log_resp,
        evidence.mean(1),
        Candidates(rows[:, 0], rows[:, 1:], weight),
    )


def is_exact(config: EMConfig, sizes: list[int]) -> bool:
    """Whether all combinations of codes are scored."""
    if config.posterior == "auto":
        return math.prod(sizes) <= min(_EXACT_LIMIT, 2 * sum(sizes))
    return config.posterior == "exact"

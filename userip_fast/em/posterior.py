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
- Mean field, if asked for: q(z) = prod_j q_j(z_j), from where coordinate ascent ends. A field's
  update, log q_j(k) = E[log joint with z_j = k] + const over the other fields' q, is kept where it
  raises E_q[log joint] + H(q), which is the objective. It begins at the greatest L of the user, so

      ascent's objective  <=  max_j L[u, j]  <=  mean field's  <=  the log evidence

  To the others a field shows its heaviest codes alone (`_heaviest`): combinations of light codes
  are not scored, and are no part of the objective. Responsibilities are a field's last update.

In each way the candidates' weights are what maximises the objective (an ELBO), so that an M-step
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
_SETTLED = 1e-3  # a mean field that moves no further is found
_OWN = -2  # stands for a field's own code among the codes that its line is given


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
        if is_exact(self.config, scorer.sizes):
            found = _exact(scorer)
        else:
            found = (_mean_field if self.config.posterior == "mean_field" else _ascent)(scorer)
        return Profiles(
            hashes=block.hashes,
            code_ids=found.code_ids,
            nll=found.nll.float(),
            weight=block.weight,
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


@dataclass
class _Lines:
    """Where coordinate ascent ends.

    Attributes:
        z: [U, J] codes.
        joint: Per field [U, K_j] fp64 log joint of its codes and of the others' in `given`; -inf
            for codes that were left out.
        given: [U, J, J] codes that each field's line was scored with, its own being `_OWN`.
    """

    z: Tensor
    joint: list[Tensor]
    given: Tensor

    def codes(self, users: Tensor, field: int, k: Tensor) -> Tensor:
        """[N, J] the codes at which the line of `field` of `users` [N] stands at `k` [N]."""
        codes = self.given[users, field]
        codes[:, field] = k
        return codes


def _climb(scorer: Scorer) -> _Lines:
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
    return _Lines(z, line, given)


def _ascent(scorer: Scorer) -> _Found:
    lines = _climb(scorer)
    z, line = lines.z, lines.joint
    fields = len(line)
    evidence = torch.stack([x.logsumexp(1) for x in line], dim=1)
    log_resp = [x - e[:, None] for x, e in zip(line, evidence.T)]
    parts = []
    for j, r in enumerate(log_resp):
        weight = r.exp() / fields
        who, k = (weight >= _MIN_WEIGHT).nonzero(as_tuple=True)
        parts.append((who, lines.codes(who, j, k), weight[who, k]))
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


def _mean_field(scorer: Scorer) -> _Found:
    sizes, users = scorer.sizes, scorer.num_users
    fields, every = len(sizes), torch.arange(users)
    lines = _climb(scorer)
    line = lines.joint
    shown = round(_EXACT_LIMIT ** (1 / fields))  # codes of a field, at most
    # One field is soft at first, given the codes found of all others.
    elbo, first = torch.stack([x.logsumexp(1) for x in line], dim=1).max(1)
    given = lines.given[every, first]
    q = []
    for j, x in enumerate(line):
        hard = torch.zeros_like(x).scatter_(1, given[:, j : j + 1].clamp_min(0), 1.0)
        q.append(torch.where((first == j)[:, None], _heaviest(x, shown), hard))
    active = every
    for _ in range(scorer.config.sweeps):
        moved = torch.zeros(users, dtype=torch.float64)
        for j, size in enumerate(sizes):
            alive = scorer.within(line[j])
            who, codes, weight = _product([*q[:j], alive.double(), *q[j + 1 :]], active)
            cell = who * size + codes[:, j]
            mean = torch.zeros(users * size, dtype=torch.float64)
            mean = mean.index_add_(0, cell, weight * scorer.joint(who, codes)).view(users, size)
            line[j][active] = mean.masked_fill(~alive, -torch.inf)[active]
            value = line[j].logsumexp(1)
            for i in range(fields):
                if i != j:
                    value += torch.special.entr(q[i]).sum(1)
            better = active[value[active] > elbo[active]]
            new = _heaviest(line[j][better], shown)
            moved[better] = moved[better].maximum((new - q[j][better]).abs().amax(1))
            q[j][better], elbo[better] = new, value[better]
        active = active[moved[active] > _SETTLED]
        if not len(active):
            break
    log_resp = [x.log_softmax(1) for x in line]
    z = torch.stack([r.argmax(1) for r in log_resp], dim=1)
    who, codes, weight = _product(q, every)
    kept = weight >= _MIN_WEIGHT
    return _Found(
        z,
        scorer.prior_of(z) - scorer.joint(every, z),
        log_resp,
        elbo,
        Candidates(who[kept], codes[kept], weight[kept]),
    )


def _heaviest(log_weight: Tensor, most: int) -> Tensor:
    """[N, K] weights that sum to one, those of little or beyond the `most` heaviest being 0."""
    weight = log_weight.softmax(1)
    top = weight.topk(min(most, weight.shape[1])).values
    least = top[:, -1:].clamp_min(_MIN_WEIGHT).minimum(top[:, :1])
    weight = weight.masked_fill(weight < least, 0.0)
    return weight / weight.sum(1, keepdim=True)


def _product(weights: list[Tensor], users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All combinations of codes of which none weighs 0: users [N], codes [N, J], weights [N].

    Args:
        weights: Per field [U, K_j] fp64.
        users: Rows to look at, ascending.
    """
    codes: list[Tensor] = []
    weight = torch.ones(len(users), dtype=torch.float64)
    for w in weights:
        row, k = w[users].nonzero(as_tuple=True)
        users, codes = users[row], [*(c[row] for c in codes), k]
        weight = weight[row] * w[users, k]
    return users, torch.stack(codes, dim=1), weight


def is_exact(config: EMConfig, sizes: list[int]) -> bool:
    """Whether all combinations of codes are scored."""
    if config.posterior == "auto":
        return math.prod(sizes) <= min(_EXACT_LIMIT, 2 * sum(sizes))
    return config.posterior == "exact"

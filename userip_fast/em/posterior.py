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

Either way the responsibilities are what maximises the objective (an ELBO), so that an M-step which
raises the expected log joint raises it too. A short prefix of the behaviour weeds candidates out
first: the LM is causal, so its likelihood is a factor of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from userip_fast.codebook import Codebook
from userip_fast.config import EMConfig
from userip_fast.em.steps import Block, Candidates, EMState, Profiles
from userip_fast.em.units import Units
from userip_fast.lm.engine import Engine
from userip_fast.packing import Behaviour, Int64, iter_packs

_EXACT_LIMIT = 4096
_MIN_WEIGHT = 3e-3  # candidates that an M-step need not look at
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
        exact = is_exact(self.config, scorer.sizes)
        found = _exact(scorer) if exact else _ascent(scorer)
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


class Scorer:
    """Scores (user, codes) pairs of a block, and counts what it costs.

    Attributes:
        log_prior: Per field [K_j + 1] fp64; the last entry, of the neutral codeword, is 0.
        cost: [U] fp64, passes through the LM so far.
    """

    def __init__(
        self,
        engine: Engine,
        behaviour: Behaviour,
        codebooks: list[Codebook],
        config: EMConfig,
    ) -> None:
        self.engine, self.behaviour, self.config = engine, behaviour, config
        self.sizes = [len(book) for book in codebooks]
        self.log_prior = [torch.cat([log_prior(b), torch.zeros(1).double()]) for b in codebooks]
        # Row K_j stands where nothing is known of a field yet: the mean codeword.
        self.tables = soft_tables(
            [
                torch.cat([b.codewords, log_prior(b).exp().float()[None] @ b.codewords])
                for b in codebooks
            ],
            engine,
        )
        self.units = Units.of(behaviour, engine.layout)
        self.prefix: Units | None = None
        # Of shared events a prefix leaves little less to read than all of them.
        if config.prune_share and not self.units.shared:
            tokens = np.ceil(behaviour.lengths * config.prune_share).astype(np.int64)
            self.prefix = Units.of(behaviour.head(tokens), engine.layout)
        self.cost = torch.zeros(behaviour.num_users, dtype=torch.float64)

    @property
    def num_users(self) -> int:
        return self.behaviour.num_users

    def log_likelihood(self, users: Tensor, codes: Tensor, prefix: bool = False) -> Tensor:
        """[N] fp64 of the behaviour of `users` [N] under `codes` [N, J].

        Args:
            prefix: Of the short prefix instead of all behaviour.
        """
        units = self.prefix if prefix else self.units
        assert units is not None
        pairs = units.pairs(users, codes)
        nll = score(self.engine, units.behaviour, pairs.unit, pairs.codes, self.tables, self.config)
        soft = self.engine.layout.num_soft
        # What several users share costs each of them its part.
        rows = torch.from_numpy(units.behaviour.pack_rows(soft))[pairs.unit]
        rows = pairs.sums(rows / pairs.spread(torch.ones(len(users))))
        own = torch.from_numpy(self.behaviour.pack_rows(soft))
        self.cost.index_add_(0, users, rows / own[users])
        return -pairs.sums(nll)

    def prior_of(self, codes: Tensor) -> Tensor:
        """[...] log prior of `codes` [..., J]; a neutral codeword adds nothing."""
        return torch.stack([p[codes[..., j]] for j, p in enumerate(self.log_prior)]).sum(0)

    def prefix_joint(self, users: Tensor, codes: Tensor, log_prior: Tensor) -> Tensor:
        """[N, M] log joint of the prefix and `codes` [N, M, J] of `users` [N]."""
        shape = codes.shape[:2]
        flat = users.repeat_interleave(shape[1])
        log_p = self.log_likelihood(flat, codes.flatten(0, 1), prefix=True)
        return log_p.view(shape) + log_prior

    def within(self, joint: Tensor) -> Tensor:
        """[N, M] bool: candidates close enough to the best of their row."""
        return joint >= joint.max(1, keepdim=True).values - self.config.prune_nats


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


def _ascent(scorer: Scorer) -> _Found:
    sizes, users = scorer.sizes, scorer.num_users
    fields = len(sizes)
    every = torch.arange(users)
    z = torch.tensor(sizes).expand(users, -1).clone()  # the neutral codewords
    alive = [torch.ones(users, k, dtype=torch.bool) for k in sizes]
    if scorer.prefix is not None:  # where to begin, and what to leave out
        for j, size in enumerate(sizes):
            codes = z[:, None].repeat(1, size, 1)
            codes[:, :, j] = torch.arange(size)
            joint = scorer.prefix_joint(every, codes, scorer.log_prior[j][:-1])
            alive[j] = scorer.within(joint)
            z[:, j] = joint.argmax(1)
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
            who, k = alive[j][stale].nonzero(as_tuple=True)
            who = stale[who]
            codes = z[who]
            codes[:, j] = k
            line[j][who, k] = scorer.log_likelihood(who, codes) + scorer.prior_of(codes)
            alive[j][stale] &= scorer.within(line[j][stale])
            z[stale, j] = line[j][stale].argmax(1)
        active = active[(z != before)[active].any(1)]
        if not len(active):
            break
    evidence = torch.stack([x.logsumexp(1) for x in line], dim=1)
    log_resp = [x - e[:, None] for x, e in zip(line, evidence.T)]
    # The last line scored holds the joint at z: it was scored given the other codes as they are.
    nll = torch.full((users,), torch.inf, dtype=torch.float64)
    for j in range(fields):
        others = z.clone()
        others[:, j] = _OWN
        fits = (given[:, j] == others).all(1)
        nll[fits] = (scorer.prior_of(z) - line[j][every, z[:, j]])[fits]
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
        nll,
        log_resp,
        evidence.mean(1),
        Candidates(rows[:, 0], rows[:, 1:], weight),
    )


def is_exact(config: EMConfig, sizes: list[int]) -> bool:
    """Whether all combinations of codes are scored."""
    if config.posterior == "auto":
        return math.prod(sizes) <= min(_EXACT_LIMIT, 2 * sum(sizes))
    return config.posterior == "exact"


def log_prior(book: Codebook) -> Tensor:
    """[K] fp64: the codebook's, or all codes alike."""
    if book.log_prior is None:
        return torch.full((len(book),), -math.log(len(book)), dtype=torch.float64)
    return book.log_prior.double()


def soft_tables(codewords: list[Tensor], engine: Engine) -> list[Tensor]:
    """Codewords [K_j, m_j D] as soft rows [K_j, m_j, D] on the LM's device."""
    return [
        c.to(engine.lm.device, torch.float32).view(len(c), s.stop - s.start, -1)
        for c, s in zip(codewords, engine.layout.field_slices)
    ]


def score(
    engine: Engine,
    behaviour: Behaviour,
    users: Int64,
    codes: Tensor,
    tables: list[Tensor],
    config: EMConfig,
) -> Tensor:
    """[N] fp32 weighted NLL of the behaviour of `users` [N] under `codes` [N, J]; no gradient."""
    out = torch.empty(len(users))
    done = 0
    with torch.no_grad():
        for pack in iter_packs(
            behaviour, users, engine.layout, engine.lm.device, config.pack_tokens
        ):
            here = slice(done, done + pack.num_users)
            picked = codes[here].to(engine.lm.device)
            rows = torch.cat([t[picked[:, j]] for j, t in enumerate(tables)], dim=1)
            out[here] = engine.nll(pack, rows).cpu()
            done += pack.num_users
    return out

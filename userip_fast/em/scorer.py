"""What the LM says of users under codes: log likelihoods, and what they cost."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.em.units import Units
from userip_fast.lm.engine import Engine
from userip_fast.prompts.packing import Behaviour, Int64, iter_packs


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
        self.tables = soft_tables([with_mean(book) for book in codebooks], engine)
        self.units = Units.of(behaviour, engine.layout)
        self.prefix: Units | None = None
        # Of shared events a prefix leaves little less to read than all of them.
        if config.prune_share and not self.units.shared:
            tokens = np.ceil(behaviour.lengths * config.prune_share).astype(np.int64)
            self.prefix = Units.of(behaviour.head(tokens), engine.layout)
        self.cost = torch.zeros(behaviour.num_users, dtype=torch.float64)
        # What `joint` remembers, by pair. A pair's number has user and codes for digits.
        self.radix = [k + 1 for k in self.sizes]
        self._pairs = torch.empty(0, dtype=torch.int64)  # ascending
        self._scored = torch.empty(0, dtype=torch.float64)

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

    def joint(self, users: Tensor, codes: Tensor) -> Tensor:
        """[N] fp64 log joint of `users` [N] and `codes` [N, J]; each pair is scored once.

        Not where a block's users have 2^63 combinations of codes or more: these have no numbers.
        """
        if self.num_users * math.prod(self.radix) >= 2**63:
            return self.log_likelihood(users, codes) + self.prior_of(codes)
        pairs = users
        for radix, k in zip(self.radix, codes.T):
            pairs = pairs * radix + k
        new = torch.unique(pairs)
        new = new[~torch.isin(new, self._pairs)]
        if len(new):
            left, digits = new, []
            for radix in reversed(self.radix):
                digits.append(left % radix)
                left = left // radix
            at = torch.stack(digits[::-1], dim=1)
            scored = self.log_likelihood(left, at) + self.prior_of(at)
            self._pairs, order = torch.cat([self._pairs, new]).sort()
            self._scored = torch.cat([self._scored, scored])[order]
        return self._scored[torch.searchsorted(self._pairs, pairs)]

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


def log_prior(book: Codebook) -> Tensor:
    """[K] fp64: the codebook's, or all codes alike."""
    if book.log_prior is None:
        return torch.full((len(book),), -math.log(len(book)), dtype=torch.float64)
    return book.log_prior.double()


def with_mean(book: Codebook) -> Tensor:
    """[K + 1, m D] fp32: the codewords, and their mean by prior."""
    return torch.cat([book.codewords, log_prior(book).exp().float()[None] @ book.codewords])


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

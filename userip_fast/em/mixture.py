"""A mixture of soft prompts: EM whose parameters are the K x J codewords and the codes' shares.

The E-step is `PosteriorEStep`. The M-step takes a few gradient steps on the
responsibility-weighted NLL of the behaviour (memory grows with codewords, never with users), and
sets each field's prior to the mean responsibility. A round that lowers the objective of the fixed
training users, or of users held out, is taken back and tried again with smaller steps; so it never
falls, and codewords do not go on to learn the training users by heart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from userip_fast.codebook import Codebook
from userip_fast.config import EMConfig
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.scorer import log_prior, soft_tables
from userip_fast.em.starts import Starts, kind_of_start
from userip_fast.em.steps import Block, Candidates, EMState, Profiles
from userip_fast.em.units import Units
from userip_fast.lm.engine import Engine
from userip_fast.packing import iter_packs
from userip_fast.prompts import ProfileField

logger = logging.getLogger("userip_fast.em")

_MOMENTUM = 0.7
_TRIAL_ROUNDS = 2
_FEWEST_USERS = 50  # below that all of them train
_SEED_STEP = 7919


@dataclass
class MixtureStats:
    """Sums over users: per field the gradient [K_j, m_j D] of the weighted NLL and the
    responsibilities [K_j], fp64, and the NLL itself. `a + b` adds two.
    """

    gradient: list[Tensor]
    counts: list[Tensor]
    nll: float

    def __add__(self, other: MixtureStats) -> MixtureStats:
        return MixtureStats(
            [a + b for a, b in zip(self.gradient, other.gradient)],
            [a + b for a, b in zip(self.counts, other.counts)],
            self.nll + other.nll,
        )


class MixtureMStep:
    """Gradient steps on codewords, priors from responsibilities.

    A step goes along the running mean of a codeword's gradient, by a fixed root mean square. Adam
    would turn each tiny coordinate into a full step, and most directions of a gradient from few
    users are noise.

    Args:
        engine: Scores packs.
        config: Pack size.
        lr: Root mean square of a step, in units of the embedding RMS.
    """

    def __init__(self, engine: Engine, config: EMConfig, lr: float) -> None:
        self.engine, self.config, self.lr = engine, config, lr
        self.mean: list[Tensor] = []

    def stats(
        self, block: Block, candidates: Candidates, codebooks: list[Codebook]
    ) -> MixtureStats:
        """One pass, forward and backward, over every candidate.

        Gradients of single candidates are added in their order in fp64: packs leave no trace.
        """
        engine, slices = self.engine, self.engine.layout.field_slices
        tables = soft_tables([book.codewords for book in codebooks], engine)
        gradient = [torch.zeros_like(book.codewords, dtype=torch.float64) for book in codebooks]
        counts = [torch.zeros(len(book), dtype=torch.float64) for book in codebooks]
        for j, n in enumerate(counts):
            n.index_add_(0, candidates.codes[:, j], candidates.weight)
        units = Units.of(block.behaviour, engine.layout)
        pairs = units.pairs(candidates.users, candidates.codes)
        weights = pairs.spread(candidates.weight)
        total, done = 0.0, 0
        for pack in iter_packs(
            units.behaviour, pairs.unit, engine.layout, engine.lm.device, self.config.pack_tokens
        ):
            here = slice(done, done + pack.num_users)
            done += pack.num_users
            codes, weight = pairs.codes[here], weights[here]
            picked = codes.to(engine.lm.device)
            rows = torch.cat([t[picked[:, j]] for j, t in enumerate(tables)], dim=1)
            rows.requires_grad_()
            nll = engine.nll(pack, rows)
            (grad,) = torch.autograd.grad(nll.sum(), rows)
            grad = grad.cpu().double() * weight[:, None, None]
            total += float(nll.detach().cpu().double() @ weight)
            for j, s in enumerate(slices):
                gradient[j].index_add_(0, codes[:, j], grad[:, s].flatten(1))
        return MixtureStats(gradient, counts, total)

    def apply(self, stats: MixtureStats, codebooks: list[Codebook]) -> list[Codebook]:
        """The codebooks after one more step, with priors from `stats` (one user more per code)."""
        # Per user of a code, so that where responsibilities change the mean stays one.
        gradient = [g / (n[:, None] + 1) for g, n in zip(stats.gradient, stats.counts)]
        before = self.mean or [torch.zeros_like(g) for g in gradient]
        self.mean = [_MOMENTUM * m + (1 - _MOMENTUM) * g for m, g in zip(before, gradient)]
        size = self.lr * self.engine.lm.embedding_rms
        out = []
        for book, mean, counts in zip(codebooks, self.mean, stats.counts):
            rms = mean.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
            new = Codebook((book.codewords - size * mean / rms).float())
            new.log_prior = ((counts + 1) / (counts + 1).sum()).log().float()
            out.append(new)
        return out


@dataclass(frozen=True)
class Fitted:
    """Codebooks, and what they are worth.

    Attributes:
        profiles: Of the training users.
        objective: Sum of the training users' ELBO, in nats.
        held_out: The same of users whom the M-step never sees; 0 where there are none.
        gain: By how much the last round raised the objective; None before the first round, and 0
            after a round in vain.
        lr: Step size of the next round.
    """

    codebooks: list[Codebook]
    profiles: Profiles
    objective: float
    held_out: float
    gain: float | None
    lr: float


class Mixture:
    """EM on some users.

    Args:
        users: Every `1 / held_out`-th of them, in hash order, judges instead of training.
        engine: Scores packs.
        config: Everything about E- and M-steps.
        fields: Those of which codes may change places. Codes that began as words keep them.
    """

    def __init__(
        self,
        users: Block,
        engine: Engine,
        config: EMConfig,
        fields: tuple[ProfileField, ...] = (),
    ) -> None:
        self.engine, self.config = engine, config
        self.loose = [
            j
            for j, f in enumerate(fields)
            if f.codebook_size > 1 and kind_of_start(config, f) != "words"
        ]
        self.estep = PosteriorEStep(engine, config)
        index = np.arange(len(users.hashes))
        judges = np.zeros(len(index), np.bool_)
        if config.held_out and len(index) >= _FEWEST_USERS:
            judges = index % round(1 / config.held_out) == 0
        self.training = users.select(index[~judges])
        self.held_out = users.select(index[judges])

    def rounds(self, codebooks: list[Codebook], lr: float | None = None) -> Iterator[Fitted]:
        """The state before the first round and after each round, without end.

        A round stays if it lowers the ELBO neither of the training users nor of those held out;
        else it is taken back, and the next one takes smaller steps. Where a round gains little, or
        nothing, codes are split and merged, field by field, on the same condition. Given codebooks
        and step size a round is determined, so that a run can go on from a saved state.
        """
        best = self._judge(codebooks, lr or self.config.codeword_lr)
        while True:
            yield best
            gain = 0.0
            tried = self._round(best)
            if self._no_worse(tried, best):
                gain, best = tried.objective - best.objective, tried
            if gain < self.config.gain * abs(best.objective):
                # Where steps lead nowhere any more, a leap may.
                for field in self.loose:
                    tried = self._round(self._judge(self._leap(best, field), best.lr))
                    if self._no_worse(tried, best):
                        gain, best = gain + tried.objective - best.objective, tried
            best = replace(best, gain=gain, lr=best.lr if gain else best.lr / 2)

    def _round(self, at: Fitted) -> Fitted:
        mstep = MixtureMStep(self.engine, self.config, at.lr)
        codebooks = at.codebooks
        assert at.profiles.candidates is not None
        for _ in range(self.config.codeword_steps):
            stats = mstep.stats(self.training, at.profiles.candidates, codebooks)
            codebooks = mstep.apply(stats, codebooks)
        return self._judge(codebooks, at.lr)

    def _no_worse(self, tried: Fitted, best: Fitted) -> bool:
        return tried.objective >= best.objective and tried.held_out >= best.held_out

    def _leap(self, at: Fitted, field: int) -> list[Codebook]:
        """Split and merge: the field's most used code becomes two, a step to either side, of which
        one takes the place of its least used code, whose users find another."""
        assert at.profiles.log_resp is not None
        used = at.profiles.log_resp[field].double().exp().sum(0)
        split, merged = int(used.argmax()), int(used.argmin())
        book = at.codebooks[field]
        generator = torch.Generator().manual_seed(self.config.seed + _SEED_STEP * field)
        side = torch.randn(book.dim, generator=generator)
        side *= at.lr * self.engine.lm.embedding_rms
        codewords, shares = book.codewords.clone(), log_prior(book).exp()
        codewords[merged] = codewords[split] - side
        codewords[split] += side
        shares[split] = shares[merged] = shares[split] / 2
        new = Codebook(codewords)
        new.log_prior = (shares / shares.sum()).log().float()
        return [*at.codebooks[:field], new, *at.codebooks[field + 1 :]]

    def record(self, at: Fitted, round_: int) -> dict[str, Any]:
        """What metrics.jsonl says of a round: ELBO and gain in nats per user."""
        trained, judged = len(self.training.hashes), len(self.held_out.hashes)
        return {
            "round": round_,
            "elbo": at.objective / trained,
            "elbo_held_out": at.held_out / judged if judged else None,
            "gain": None if at.gain is None else at.gain / trained,
            "lr": at.lr,
        }

    def _judge(self, codebooks: list[Codebook], lr: float) -> Fitted:
        profiles = self.estep.run(self.training, codebooks, EMState())
        held_out = 0.0
        if len(self.held_out.hashes):
            held_out = _total(self.estep.run(self.held_out, codebooks, EMState()))
        return Fitted(codebooks, profiles, _total(profiles), held_out, None, lr)

    def best_start(self, fields: tuple[ProfileField, ...], start: Tensor) -> list[Codebook]:
        """First codebooks; where they are drawn, the likeliest of `restarts` after some rounds."""
        config = self.config
        starts = Starts(self.training, self.engine, config, fields, start)
        if config.restarts == 1 or not starts.drawn:
            return starts.draw(config.seed)
        found = []
        for i in range(config.restarts):
            rounds = self.rounds(starts.draw(config.seed + _SEED_STEP * i))
            *_, last = islice(rounds, 1 + _TRIAL_ROUNDS)
            found.append(last)
            value = last.objective + last.held_out
            logger.info("start %d of %d: ELBO %.2f", i + 1, config.restarts, value)
        return max(found, key=lambda f: f.objective + f.held_out).codebooks


def is_last(record: dict[str, Any], em: EMConfig) -> bool:
    """Whether the round of a `Mixture.record` is the last."""
    if record["round"] >= em.max_rounds or record["lr"] <= em.codeword_lr / 4:
        return True
    return bool(record["gain"]) and record["gain"] < em.gain * abs(record["elbo"])


def _total(profiles: Profiles) -> float:
    assert profiles.elbo is not None
    return float(profiles.elbo.sum())

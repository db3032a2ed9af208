"""A mixture of soft prompts: EM whose parameters are the K x J codewords and the codes' shares.

The E-step is that of its users (`userip_fast.em.crowd`). The M-step takes a few gradient steps on
the responsibility-weighted NLL of the behaviour (memory grows with codewords, never with users),
and sets each field's prior to the mean responsibility. A round that lowers the objective of the
fixed training users, or of users held out, is taken back and tried again with smaller steps; so it
never falls, and codewords do not go on to learn the training users by heart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core import heap
from userip_fast.core.config import EMConfig
from userip_fast.em.crowd import Found, MixtureStats, Users
from userip_fast.em.scorer import log_prior
from userip_fast.em.starts import Starts, ToldUsers, kind_of_start
from userip_fast.lm.engine import Engine
from userip_fast.prompts.layout import ProfileField

logger = logging.getLogger("userip_fast.em")

_MOMENTUM = 0.7
_TRIAL_ROUNDS = 2
_LENGTHS = (1.0, 0.7, 0.5, 0.35)  # of codewords, from the shared start
_SEED_STEP = 7919


class MixtureMStep:
    """Gradient steps on codewords, priors from responsibilities.

    A step goes along the running mean of a codeword's gradient, by a fixed root mean square. Adam
    would turn each tiny coordinate into a full step, and most directions of a gradient from few
    users are noise.

    Args:
        size: Root mean square of a step.
    """

    def __init__(self, size: float) -> None:
        self.size = size
        self.mean: list[Tensor] = []

    def apply(self, stats: MixtureStats, codebooks: list[Codebook]) -> list[Codebook]:
        """The codebooks after one more step, with priors from `stats` (one user more per code)."""
        # Per user of a code, so that where responsibilities change the mean stays one.
        gradient = [g / (n[:, None] + 1) for g, n in zip(stats.gradient, stats.counts)]
        before = self.mean or [torch.zeros_like(g) for g in gradient]
        self.mean = [_MOMENTUM * m + (1 - _MOMENTUM) * g for m, g in zip(before, gradient)]
        out = []
        for book, mean, counts in zip(codebooks, self.mean, stats.counts):
            rms = mean.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
            new = Codebook((book.codewords - self.size * mean / rms).float())
            new.log_prior = ((counts + 1) / (counts + 1).sum()).log().float()
            out.append(new)
        return out


@dataclass(frozen=True)
class Fitted:
    """Codebooks, and what they are worth.

    Attributes:
        found: By an E-step with them.
        gain: By how much the last round raised the objective; None before the first round, and 0
            after a round in vain.
        lr: Step size of the next round.
        lm_tokens: Rows that the LM read in the last round; forward and backward count one each.
    """

    codebooks: list[Codebook]
    found: Found
    gain: float | None
    lr: float
    lm_tokens: int = 0


class Mixture:
    """EM on some users.

    Args:
        users: Who train and who judge.
        engine: Scores packs.
        config: Everything about E- and M-steps.
        fields: Those of which codes may change places. Codes that began as words keep them.
        told: See `Starts`.
    """

    def __init__(
        self,
        users: Users,
        engine: Engine,
        config: EMConfig,
        fields: tuple[ProfileField, ...] = (),
        told: ToldUsers | None = None,
    ) -> None:
        self.users, self.engine, self.config, self.told = users, engine, config, told
        self.loose = [
            j
            for j, f in enumerate(fields)
            if f.codebook_size > 1 and kind_of_start(config, f, told is not None) != "words"
        ]

    def rounds(self, codebooks: list[Codebook], lr: float | None = None) -> Iterator[Fitted]:
        """The state before the first round and after each round, without end.

        A round stays if it lowers the ELBO neither of the training users nor of those held out;
        else it is taken back, and the next one takes smaller steps. Where a round gains little, or
        nothing, codes are split and merged, field by field, on the same condition. Given codebooks
        and step size a round is determined, so that a run can go on from a saved state.
        """
        before = self.users.lm_tokens
        best = self._judge(codebooks, lr or self.config.codeword_lr)
        while True:
            yield replace(best, lm_tokens=self.users.lm_tokens - before)
            gain, before = 0.0, self.users.lm_tokens
            tried = self._round(best)
            if self._no_worse(tried, best):
                gain, best = tried.found.objective - best.found.objective, tried
            if gain < self.config.gain * abs(best.found.objective):
                # Where steps lead nowhere any more, a leap may.
                for field in self.loose:
                    tried = self._round(self._judge(self._leap(best, field), best.lr))
                    if self._no_worse(tried, best):
                        gain += tried.found.objective - best.found.objective
                        best = tried
            best = replace(best, gain=gain, lr=best.lr if gain else best.lr / 2)

    def _round(self, at: Fitted) -> Fitted:
        mstep = MixtureMStep(at.lr * self.engine.lm.embedding_rms)
        codebooks = at.codebooks
        for _ in range(self.config.codeword_steps):
            codebooks = mstep.apply(self.users.stats(at.found, codebooks), codebooks)
        return self._judge(codebooks, at.lr)

    def _no_worse(self, tried: Fitted, best: Fitted) -> bool:
        a, b = tried.found, best.found
        return a.objective >= b.objective and a.held_out >= b.held_out

    def _leap(self, at: Fitted, field: int) -> list[Codebook]:
        """Split and merge: the field's most used code becomes two, a step to either side, of which
        one takes the place of its least used code, whose users find another."""
        used = at.found.used[field]
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
        trained, judged = self.users.trained, self.users.judged
        return {
            "round": round_,
            "elbo": at.found.objective / trained,
            "elbo_held_out": at.found.held_out / judged if judged else None,
            "gain": None if at.gain is None else at.gain / trained,
            "lr": at.lr,
            "lm_tokens": at.lm_tokens,
        }

    def _judge(self, codebooks: list[Codebook], lr: float) -> Fitted:
        found = self.users.judge(codebooks)
        heap.trim()
        return Fitted(codebooks, found, None, lr)

    def best_start(self, fields: tuple[ProfileField, ...], start: Tensor) -> list[Codebook]:
        """First codebooks; where they are drawn, the likeliest of `restarts` after some rounds."""
        config = self.config
        starts = Starts(self.users.some, self.engine, config, fields, start, self.told)
        if self.told is not None and "told" in starts.kinds:
            return self._by_length(starts.draw(config.seed), start)
        if config.restarts == 1 or not starts.drawn:
            return starts.draw(config.seed)
        found = []
        for i in range(config.restarts):
            rounds = self.rounds(starts.draw(config.seed + _SEED_STEP * i))
            *_, last = islice(rounds, 1 + _TRIAL_ROUNDS)
            found.append(last)
            value = _worth(last)
            logger.info("start %d of %d: ELBO %.2f", i + 1, config.restarts, value)
        return max(found, key=_worth).codebooks

    def _by_length(self, codebooks: list[Codebook], start: Tensor) -> list[Codebook]:
        """The likeliest of codewords nearer to the shared start: what the LM says of a user who is
        a group may be too sure of each of its users."""
        rows = [start[s].flatten() for s in self.engine.layout.field_slices]

        def at(length: float) -> list[Codebook]:
            books = []
            for book, row in zip(codebooks, rows):
                books.append(Codebook(row + length * (book.codewords - row)))
                books[-1].log_prior = book.log_prior
            return books

        return max(map(at, _LENGTHS), key=lambda books: self.users.judge(books).objective)


def is_last(record: dict[str, Any], em: EMConfig) -> bool:
    """Whether the round of a `Mixture.record` is the last."""
    if record["round"] >= em.max_rounds or record["lr"] <= em.codeword_lr / 4:
        return True
    return bool(record["gain"]) and record["gain"] < em.gain * abs(record["elbo"])


def _worth(at: Fitted) -> float:
    return at.found.objective + at.found.held_out

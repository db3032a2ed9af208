"""The LM's mixture of codes with free probabilities in the LM's place.

Every code has its own p(item | code) for choices, or p(word | item, code) for ratings, smoothed
towards what no code tells, or what it tells of the words that an item shares with others; EM on the
same users. It takes less than a minute, and is where the LM's codewords start and a rival that they
are judged by. By items alone it knows nothing of one that it has not met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from userip_fast.codebook.books import Codebook
from userip_fast.em.shared_words import SharedWords, row_sums
from userip_fast.lm.foldin import kind_vectors
from userip_fast.prompts.packing import Int64, ragged_arange

Float64 = npt.NDArray[np.float64]

_ROUNDS = 30
_STARTS = 3
_DIMS = 16  # singular directions of a start
_SHRINK = (0.1, 0.3, 1.0, 3.0)
_RATED_PRIOR = 10.0  # events of an item that say as much as what no code, or no item, tells
_POWERS = (1.0, 0.5, 0.25, 0.1)
WORD_PRIORS = (None, 100.0, 30.0)
"""Events that factors of words start with (`SharedWords`); None for no such factors."""


@dataclass(frozen=True)
class _Counts:
    """Which kinds [N] of event users have, each once: user u those from `offsets[u]`."""

    offsets: Int64
    kinds: Int64
    num_kinds: int

    @property
    def user(self) -> Int64:
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def some(self, users: npt.NDArray[np.bool_]) -> _Counts:
        kept = users[self.user]
        ends = np.cumsum(np.diff(self.offsets)[users])
        return _Counts(np.concatenate([[0], ends]), self.kinds[kept], self.num_kinds)

    def times(self, table: Float64) -> Float64:
        """[U, K] sums over a user's kinds of `table` [E, K]."""
        return row_sums(table, self.kinds, self.offsets)

    def transposed(self, resp: Float64) -> Float64:
        """[E, K] sums over a kind's users of `resp` [U, K]."""
        return row_sums(resp, *self._users)

    @cached_property
    def _users(self) -> tuple[Int64, Int64]:
        """As `kinds` and `offsets`, the users of each kind."""
        order = np.argsort(self.kinds, kind="stable")
        ends = np.cumsum(np.bincount(self.kinds, minlength=self.num_kinds))
        return self.user[order], np.concatenate([[0], ends])


class FreeMixture:
    """A mixture over kinds of event: an item, or an item with a word of feedback.

    Args:
        offsets, item: Events of U users, in CSR; the items are 0 .. num_items - 1.
        level: [N] feedback word of each event, 0 .. words - 1, the best last; None for choices.
        codes: K.
        texts: Of the items, whose words are to be known; None for items alone.

    Attributes:
        table: [E, K] log p(kind of event | code); of an item never met 0 throughout, or how much
            likelier than usual its words make it.
        log_prior: [K].
        shrink, power: How far codes are drawn to what no code tells, in units of a code's mass,
            and of the likelihood; such that held-out users' later events are told best by their
            earlier ones. Posteriors of the whole likelihood are overconfident.
        pooled: The prior of `WORD_PRIORS` by which words of texts are told, chosen alike.
    """

    def __init__(
        self,
        offsets: Int64,
        item: Int64,
        level: Int64 | None,
        num_items: int,
        codes: int,
        seed: int = 0,
        words: int = 1,
        texts: Sequence[str] | None = None,
    ) -> None:
        self.items, self.codes = num_items, codes
        self.words = 1 if level is None else words
        self.shared = SharedWords.among(texts or [])
        self.shrink, self.power = 1.0, 1.0
        self.pooled: float | None = None
        counts = self._counts(offsets, item, level)
        held = np.arange(len(offsets) - 1) % 5 == 4
        if held.sum() >= 5 and (~held).sum() >= codes:
            place = np.arange(len(item)) - np.repeat(offsets[:-1], np.diff(offsets))
            early = place < np.repeat(np.diff(offsets) // 2, np.diff(offsets))
            first, later = (self._some(offsets, item, level, m).some(held) for m in (early, ~early))
            learned = counts.some(~held)
            tells: dict[tuple[float | None, float, float], float] = {}

            def consider(pooled: float | None, shrink: float) -> None:
                self.pooled, self.shrink = pooled, shrink
                self._fit(learned, seed)
                found = {(pooled, shrink, p): self._predicts(first, later, p) for p in _POWERS}
                tells.update(found)

            for pooled in WORD_PRIORS if self.shared.words else (None,):
                consider(pooled, 1.0)
            pooled = max(tells, key=lambda way: tells[way])[0]
            for shrink in _SHRINK if level is None else ():
                if shrink != 1:
                    consider(pooled, shrink)
            self.pooled, self.shrink, self.power = max(tells, key=lambda way: tells[way])
        self._fit(counts, seed)

    def posterior(
        self, offsets: Int64, item: Int64, level: Int64 | None, power: float | None = None
    ) -> Float64:
        """[U, K] p(code | events), the likelihood tempered by `power`, if not told otherwise."""
        return self._posterior(self._counts(offsets, item, level), power or self.power)

    def log_affinity(self, item: Int64) -> Float64:
        """[N, K] of items under each code: log p(item | code) less the log p of no code; or the
        log p of the best word."""
        if self.words == 1:
            return np.asarray(self.table[item] - self.usual[item][:, None])
        return np.asarray(self.table[item * self.words + self.words - 1])

    def probability(self) -> Float64:
        """[I, K] p(item | code) of choices; 0 of an item never met."""
        return np.where(self.usual[:, None] < 0, np.exp(self.table), 0.0)

    def score(self, posterior: Float64, item: Int64) -> Float64:
        """[N] log of `log_affinity`'s exponential, averaged by [N, K] `posterior`."""
        return np.asarray(np.log((posterior * np.exp(self.log_affinity(item))).sum(1)))

    def _counts(self, offsets: Int64, item: Int64, level: Int64 | None) -> _Counts:
        kind = item.astype(np.int64) * self.words + (0 if level is None else level)
        num_kinds, users = self.items * self.words, len(offsets) - 1
        user = np.repeat(np.arange(users), np.diff(offsets))
        # An item bought again tells less than another one.
        pair = np.unique(user * num_kinds + kind)
        ends = np.cumsum(np.bincount(pair // num_kinds, minlength=users))
        return _Counts(np.concatenate([[0], ends]), pair % num_kinds, num_kinds)

    def _some(
        self, offsets: Int64, item: Int64, level: Int64 | None, kept: npt.NDArray[np.bool_]
    ) -> _Counts:
        some = np.concatenate([[0], np.cumsum(kept)])[offsets]
        return self._counts(some, item[kept], None if level is None else level[kept])

    def _fit(self, counts: _Counts, seed: int) -> None:
        found = []
        for start in range(_STARTS):
            self._log_factors = np.zeros((len(self.shared.words), self.words * self.codes))
            resp = self._start(counts, seed * _STARTS + start)
            for _ in range(_ROUNDS):
                self._learn(counts, resp)
                resp = self._posterior(counts, 1.0)
            joint = counts.times(self.table) + self.log_prior
            told = float(np.logaddexp.reduce(joint, axis=1).sum())
            found.append((told, -start, resp, self._log_factors))
        _, _, resp, self._log_factors = max(found, key=lambda f: f[:2])
        self._learn(counts, resp)

    def _start(self, counts: _Counts, seed: int) -> Float64:
        """[U, K] responsibilities of clusters of the users' leading singular directions."""
        users = len(counts.offsets) - 1
        if users <= self.codes or len(np.unique(counts.kinds)) <= self.codes:
            random = np.random.default_rng(seed)
            return np.asarray(random.dirichlet(np.full(self.codes, 0.3), users))
        x = counts.times(self._vectors(counts, seed))
        x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-12
        told = torch.from_numpy(x).float()
        code = Codebook.kmeans(told, self.codes, seed=seed, iterations=100).assign(told)[0]
        return np.asarray(np.eye(self.codes)[code.numpy()])

    def _vectors(self, counts: _Counts, seed: int) -> Float64:
        """[E, r] of kinds; with those of their words, each with the same reaction."""
        user, kinds, num_kinds = counts.user, counts.kinds, counts.num_kinds
        if self.pooled is None:
            return kind_vectors(user, kinds, num_kinds, seed, _DIMS).astype(np.float64)
        item, level = kinds // self.words, kinds % self.words
        each = np.diff(self.shared.offsets)[item]
        word = self.shared.of[ragged_arange(self.shared.offsets[item], each)]
        of_word = num_kinds + word * self.words + np.repeat(level, each)
        user, kinds = np.append(user, np.repeat(user, each)), np.append(kinds, of_word)
        both = num_kinds + len(self.shared.words) * self.words
        x = kind_vectors(user, kinds, both, seed, _DIMS).astype(np.float64)
        of_words = x[num_kinds:].reshape(len(self.shared.words), -1)
        return np.asarray(x[:num_kinds] + self.shared.spread(of_words).reshape(num_kinds, -1))

    def _learn(self, counts: _Counts, resp: Float64) -> None:
        """M-step: probabilities of kinds under codes, smoothed."""
        self.log_prior = np.log((resp.sum(0) + 1.0) / (len(resp) + self.codes))
        own = counts.transposed(resp)  # [E, K]
        every = own.sum(1)
        if self.words == 1:
            p = every / max(every.sum(), 1.0)
            mass = own.sum(0)
            prior = self.shrink * mass.mean()
            met = p > 0
            self.usual = np.log(np.where(met, p, 1.0))
            base = self._with_words(p[:, None, None], own[:, None], mass, axis=0)[:, 0]
            told = (own + prior * base) / (mass + prior)
            of_words = 0.0 if self.pooled is None else self._of_words(p)
            self.table = np.where(met[:, None], np.log(np.where(met[:, None], told, 1.0)), of_words)
            return
        own = own.reshape(self.items, self.words, self.codes)
        word = every.reshape(self.items, self.words)
        usual = (word.sum(0) + 1.0) / (word.sum() + self.words)  # a word may never be used
        by_item = (word + _RATED_PRIOR * usual) / (word.sum(1, keepdims=True) + _RATED_PRIOR)
        mass = own.sum(0)  # [words, K]
        by_code = (mass + _RATED_PRIOR * usual[:, None]) / (mass.sum(0) + _RATED_PRIOR)
        base = by_item[:, :, None] * (by_code / usual[:, None])
        base /= base.sum(1, keepdims=True)
        events = own.sum(1, keepdims=True)
        base = self._with_words(base, own, events, axis=1)
        p = (own + _RATED_PRIOR * base) / (events + _RATED_PRIOR)
        self.usual = np.log(by_item[:, -1])
        self.table = np.log(p).reshape(-1, self.codes)

    def _with_words(self, base: Float64, own: Float64, events: Float64, axis: int) -> Float64:
        """`base` [I, W, K or 1], which adds up to one along an axis, times the factors of the
        items' words after one more round; `events` are expected of `own` [I, W, K]."""
        if self.pooled is None:
            return base

        def scaled() -> Float64:
            told = base * np.exp(self.shared.spread(self._log_factors)).reshape(own.shape)
            return np.asarray(told / told.sum(axis, keepdims=True))

        flat = (len(own), -1)
        expected = (scaled() * events).reshape(flat)
        self._log_factors = self.shared.scaled(
            self._log_factors, own.reshape(flat), expected, self.pooled
        )
        return scaled()

    def _of_words(self, p: Float64) -> Float64:
        """[I, K] log of how much likelier than usual items are by their words, of shares p [I]."""
        told = self.shared.spread(self._log_factors)
        return np.asarray(told - np.log(p @ np.exp(told)))

    def _posterior(self, counts: _Counts, power: float) -> Float64:
        joint = power * counts.times(self.table) + self.log_prior
        joint -= joint.max(1, keepdims=True)
        p = np.exp(joint)
        return np.asarray(p / p.sum(1, keepdims=True))

    def _predicts(self, first: _Counts, later: _Counts, power: float) -> float:
        """Log probability of later events, each on its own, by the posterior after the first."""
        resp = self._posterior(first, power)
        told = np.exp(self.table[later.kinds])
        return float(np.log((resp[later.user] * told).sum(1)).sum())

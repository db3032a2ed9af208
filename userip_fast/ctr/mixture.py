"""The rival that matters most: the LM's mixture of codes, with free probabilities and no LM.

Every code has its own p(item | code) for choices, or p(word | item, code) for ratings, smoothed
towards what no code tells; EM on the same users, with as many codes as all fields have combinations
of.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from userip_fast.ctr.vectors import Float64
from userip_fast.packing import Int64

_ROUNDS = 30
_STARTS = 3
_DIMS, _COMMON = 16, 10.0  # singular directions of a start; common kinds weigh less
_SHRINK = (0.1, 0.3, 1.0, 3.0)
_RATED_PRIOR = 10.0  # events of an item that say as much as what no code, or no item, tells
_POWERS = (1.0, 0.5, 0.25, 0.1)


class Mixture:
    """A mixture over kinds of event: an item, or an item with a word of feedback.

    Args:
        offsets, item: Events of U users, in CSR; the items are 0 .. num_items - 1.
        level: [N] feedback word of each event, 0 .. words - 1, the best last; None for choices.
        codes: K.

    Attributes:
        table: [E, K] log p(kind of event | code); of an item never met 0 throughout.
        log_prior: [K].
        shrink, power: How far codes are drawn to what no code tells, in units of a code's mass,
            and of the likelihood; such that held-out users' later events are told best by their
            earlier ones. Posteriors of the whole likelihood are overconfident.
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
    ) -> None:
        self.items, self.codes = num_items, codes
        self.words = 1 if level is None else words
        counts = self._counts(offsets, item, level)
        held = np.arange(counts.shape[0]) % 5 == 4
        self.shrink, self.power = 1.0, 1.0
        if held.sum() >= 5 and (~held).sum() >= codes:
            place = np.arange(len(item)) - np.repeat(offsets[:-1], np.diff(offsets))
            early = place < np.repeat(np.diff(offsets) // 2, np.diff(offsets))
            first, later = (self._some(offsets, item, level, m)[held] for m in (early, ~early))
            tells: dict[tuple[float, float], float] = {}
            for self.shrink in _SHRINK if level is None else (1.0,):
                self._fit(counts[~held], seed)
                tells |= {(self.shrink, p): self._predicts(first, later, p) for p in _POWERS}
            self.shrink, self.power = max(tells, key=lambda way: tells[way])
        self._fit(counts, seed)

    def posterior(self, offsets: Int64, item: Int64, level: Int64 | None) -> Float64:
        """[U, K] p(code | events), the likelihood tempered by `power`."""
        return self._posterior(self._counts(offsets, item, level), self.power)

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

    def _counts(self, offsets: Int64, item: Int64, level: Int64 | None) -> sp.csr_matrix:
        kind = item.astype(np.int64) * self.words + (0 if level is None else level)
        shape = (len(offsets) - 1, self.items * self.words)
        counts = sp.csr_matrix((np.ones(len(kind)), kind, offsets), shape=shape, copy=True)
        counts.sum_duplicates()
        counts.data[:] = 1.0  # an item bought again tells less than another one
        return counts

    def _some(
        self, offsets: Int64, item: Int64, level: Int64 | None, kept: np.ndarray
    ) -> sp.csr_matrix:
        some = np.concatenate([[0], np.cumsum(kept)])[offsets]
        return self._counts(some, item[kept], None if level is None else level[kept])

    def _fit(self, counts: sp.csr_matrix, seed: int) -> None:
        found = []
        for start in range(_STARTS):
            resp = self._start(counts, seed * _STARTS + start)
            for _ in range(_ROUNDS):
                self._learn(counts, resp)
                resp = self._posterior(counts, 1.0)
            joint = counts @ self.table + self.log_prior
            found.append((np.logaddexp.reduce(joint, axis=1).sum(), start, resp))
        self._learn(counts, max(found, key=lambda f: (f[0], -f[1]))[2])

    def _start(self, counts: sp.csr_matrix, seed: int) -> Float64:
        """[U, K] responsibilities of clusters of the users' leading singular directions."""
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.preprocessing import normalize

        met = np.flatnonzero(np.asarray((counts > 0).sum(0)).ravel() > 1)
        if len(met) <= self.codes or counts.shape[0] <= self.codes:
            random = np.random.default_rng(seed)
            return np.asarray(random.dirichlet(np.full(self.codes, 0.3), counts.shape[0]))
        some = counts[:, met]
        weighted = some @ sp.diags(1 / np.sqrt(np.asarray(some.sum(0)).ravel() + _COMMON))
        dims = min(_DIMS, len(met) - 1, counts.shape[0] - 1)
        x = TruncatedSVD(dims, random_state=seed).fit_transform(weighted)
        code = KMeans(self.codes, n_init=1, random_state=seed).fit_predict(normalize(x))
        return np.asarray(np.eye(self.codes)[code])

    def _learn(self, counts: sp.csr_matrix, resp: Float64) -> None:
        """M-step: probabilities of kinds under codes, smoothed."""
        self.log_prior = np.log((resp.sum(0) + 1.0) / (len(resp) + self.codes))
        own = np.asarray(counts.T @ resp)  # [E, K]
        every = own.sum(1)
        if self.words == 1:
            p = every / max(every.sum(), 1.0)
            mass = own.sum(0)
            prior = self.shrink * mass.mean()
            met = p > 0
            self.usual = np.log(np.where(met, p, 1.0))
            told = (own + prior * p[:, None]) / (mass + prior)
            self.table = np.where(met[:, None], np.log(np.where(met[:, None], told, 1.0)), 0.0)
            return
        own = own.reshape(self.items, self.words, self.codes)
        word = every.reshape(self.items, self.words)
        usual = (word.sum(0) + 1.0) / (word.sum() + self.words)  # a word may never be used
        by_item = (word + _RATED_PRIOR * usual) / (word.sum(1, keepdims=True) + _RATED_PRIOR)
        mass = own.sum(0)  # [words, K]
        by_code = (mass + _RATED_PRIOR * usual[:, None]) / (mass.sum(0) + _RATED_PRIOR)
        base = by_item[:, :, None] * (by_code / usual[:, None])
        base /= base.sum(1, keepdims=True)
        p = (own + _RATED_PRIOR * base) / (own.sum(1, keepdims=True) + _RATED_PRIOR)
        self.usual = np.log(by_item[:, -1])
        self.table = np.log(p).reshape(-1, self.codes)

    def _posterior(self, counts: sp.csr_matrix, power: float) -> Float64:
        joint = power * np.asarray(counts @ self.table) + self.log_prior
        joint -= joint.max(1, keepdims=True)
        p = np.exp(joint)
        return np.asarray(p / p.sum(1, keepdims=True))

    def _predicts(self, first: sp.csr_matrix, later: sp.csr_matrix, power: float) -> float:
        """Log probability of later events, each on its own, by the posterior after the first."""
        resp = self._posterior(first, power)
        who, kind = later.nonzero()
        return float(np.log((resp[who] * np.exp(self.table[kind])).sum(1)).sum())

"""AUC, log loss, and how far to trust a difference: users are resampled, and seeds with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userip_fast.prompts.packing import Int64

Float64 = NDArray[np.float64]


def auc(
    label: NDArray[np.float32], score: NDArray[np.float32], weight: Float64 | None = None
) -> Float64:
    """[B] area under the ROC curve, ties counted half; exact.

    Args:
        label, score: [N].
        weight: [B, N] non-negative weights of the rows; None is one row of ones.
    """
    ranks = _Ranks(label, score)
    w = np.ones((1, len(score))) if weight is None else weight
    return ranks.area(w[:, ranks.negative], w[:, ranks.positive])


class _Ranks:
    """Which rows are positive and negative [P], [N - P], the negatives by score; and how many
    negatives are below each positive, and below or level with it."""

    def __init__(self, label: NDArray[np.float32], score: NDArray[np.float32]) -> None:
        self.positive, negative = np.flatnonzero(label > 0), np.flatnonzero(label <= 0)
        self.negative = negative[np.argsort(score[negative], kind="stable")]
        ordered, own = score[self.negative], score[self.positive]
        self.below = np.searchsorted(ordered, own, side="left")
        self.level = np.searchsorted(ordered, own, side="right")

    def area(self, negative: NDArray[Any], positive: NDArray[Any]) -> Float64:
        """[B] from weights [B, N - P] and [B, P]; 0.5 where a side weighs nothing."""
        sums = np.zeros((len(negative), negative.shape[1] + 1), np.float64)
        np.cumsum(negative, axis=1, out=sums[:, 1:])
        beaten = (sums[:, self.below] + sums[:, self.level]) / 2
        pairs = positive.sum(1, dtype=np.float64) * sums[:, -1]
        won = np.einsum("bp,bp->b", beaten, positive)
        return np.asarray(np.divide(won, pairs, out=np.full(len(sums), 0.5), where=pairs > 0))


def log_loss(label: NDArray[np.float32], score: NDArray[np.float32]) -> float:
    """Mean negative log likelihood in nats."""
    p = np.clip(score.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(label > 0, np.log(p), np.log(1 - p))))


@dataclass(frozen=True)
class Bootstrap:
    """Resamplings shared by all features, so that differences are paired.

    Attributes:
        weight: [B, U] how often each test user is drawn.
        seed: [B, S] seeds drawn with replacement.
        user: [N] test user of each row, 0 .. U - 1.
    """

    weight: Float64
    seed: Int64
    user: Int64

    @classmethod
    def draw(cls, user: Int64, seeds: int, replicates: int, seed: int = 0) -> Bootstrap:
        users, dense = np.unique(user, return_inverse=True)
        random = np.random.default_rng(seed)
        share = np.full(len(users), 1 / len(users))
        weight = random.multinomial(len(users), share, replicates).astype(np.float64)
        return cls(weight, random.integers(0, seeds, (replicates, seeds)), dense)

    def auc(self, label: NDArray[np.float32], scores: list[NDArray[np.float32]]) -> Float64:
        """[B] AUC of each resampling, the mean over its seeds."""
        by_seed = np.empty((len(scores), len(self.weight)))
        for s, score in enumerate(scores):
            ranks = _Ranks(label, score)
            owners = self.user[ranks.negative], self.user[ranks.positive]
            for a in range(0, len(self.weight), 8):  # 8 replicates of the rows at a time
                some = self.weight[a : a + 8]
                by_seed[s, a : a + 8] = ranks.area(*(np.take(some, u, axis=1) for u in owners))
        return np.asarray(by_seed[self.seed, np.arange(len(self.weight))[:, None]].mean(1))


def paired(a: Float64, b: Float64, difference: float) -> dict[str, Any]:
    """Difference of two features: 95 % interval, and two-sided p of the bootstrap.

    Args:
        a, b: [B] AUCs of the same resamplings.
        difference: As measured.
    """
    d = a - b
    low, high = np.quantile(d, [0.025, 0.975])
    tail = min((d <= 0).mean(), (d >= 0).mean())
    return {
        "difference": difference,
        "ci95": [float(low), float(high)],
        "p": float(min(1.0, 2 * (tail * len(d) + 1) / (len(d) + 1))),
    }

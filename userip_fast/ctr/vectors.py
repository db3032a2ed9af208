"""What the cluster baselines read of a user: fixed vectors from the same events that the LM reads.

Every baseline sees the events with their feedback words (or items chosen and passed over) exactly
as the behaviour text tells them, so none has information that another lacks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from userip_fast.data import Events
from userip_fast.data.attributes import Attribute
from userip_fast.prompts.packing import Int64

Float64 = NDArray[np.float64]
_TEXT_DIMS = 32
_FACTORS = 8


def attribute_matrix(attributes: list[Attribute]) -> Float64:
    """[I, sum of sizes] shares of each value in an item."""
    blocks = []
    for a in attributes:
        block = np.zeros((len(a.values), a.size))
        rows = np.repeat(np.arange(len(a.values)), a.values.shape[1])
        np.add.at(block, (rows, a.values.ravel()), 1.0)
        block = block[:, 1:]
        blocks.append(block / np.maximum(block.sum(1, keepdims=True), 1))
    return np.concatenate(blocks, axis=1)


def tfidf_matrix(texts: list[str], seed: int) -> Float64:
    """[I, 32] item texts as TF-IDF, its leading singular directions."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    x = TfidfVectorizer(min_df=2 if len(texts) > 100 else 1, sublinear_tf=True).fit_transform(texts)
    dims = min(_TEXT_DIMS, x.shape[1] - 1, x.shape[0] - 1)
    svd: Any = TruncatedSVD(max(dims, 1), random_state=seed)
    return np.asarray(svd.fit_transform(x))


def pooled(events: Events, matrix: Float64) -> Float64:
    """[U, 2 D] mean of `matrix` [I, D] over the items of best and of worst feedback, by all events.

    Items passed over were drawn, not met: they are left out, and so is the worst half then.
    """
    lengths = np.maximum(np.diff(events.offsets), 1)[:, None]
    if events.level is None:
        levels: list[NDArray[np.bool_]] = [np.ones(events.num_events, bool)]
    elif events.words[0] == "chosen":
        levels = [events.level == 0]
    else:
        levels = [events.level == len(events.words) - 1, events.level == 0]
    user = np.repeat(np.arange(events.num_users), np.diff(events.offsets))
    halves = []
    for kept in levels:
        total = np.zeros((events.num_users, matrix.shape[1]))
        item = events.item_index[kept]
        known = item < len(matrix)
        np.add.at(total, user[kept][known], matrix[item[known]])
        halves.append(total / lengths)
    return np.concatenate(halves, axis=1)


class Ridge:
    """Matrix factorisation by alternating ridge regressions; a new user is one more regression.

    Predicts a value, less the item's mean, from [1, item factors]. Source: "Large-scale Parallel
    Collaborative Filtering for the Netflix Prize", AAIM 2008 (there with weighted ridges).

    Args:
        offsets, item: Events of users, in CSR.
        value: [N] what is to be predicted.
    """

    def __init__(
        self,
        offsets: Int64,
        item: NDArray[np.integer[Any]],
        value: NDArray[np.floating[Any]],
        num_items: int,
        seed: int,
        ridge: float = 2.0,
    ) -> None:
        self.ridge = ridge
        value, item = value.astype(np.float64), item.astype(np.int64)
        count = np.bincount(item, minlength=num_items)
        self.mean = float(value.mean())
        self.item_mean = np.bincount(item, value - self.mean, num_items) / (count + 5.0)
        y = value - self.mean - self.item_mean[item]
        random = np.random.default_rng(seed)
        self.v = np.concatenate(
            [np.ones((num_items, 1)), random.normal(0, 0.1, (num_items, _FACTORS))], axis=1
        )
        by_item = np.argsort(item, kind="stable")
        item_offsets = np.concatenate([[0], np.cumsum(count)])
        user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        for _ in range(8):
            u = self._solve(self.v[item], y, offsets)
            left = (y - u[user, 0])[by_item]  # a user's own mean is no item's doing
            self.v[:, 1:] = self._solve(u[user, 1:][by_item], left, item_offsets)

    def users(
        self,
        offsets: Int64,
        item: NDArray[np.integer[Any]],
        value: NDArray[np.floating[Any]],
    ) -> Float64:
        """[U, 1 + factors] of any users."""
        y = value.astype(np.float64) - self.mean - self.item_mean[item]
        return self._solve(self.v[item], y, offsets)

    def _solve(self, x: Float64, y: Float64, offsets: Int64) -> Float64:
        """Ridge regression of each CSR segment."""
        d = x.shape[1]
        gram = _segment_sums((x[:, :, None] * x[:, None, :]).reshape(len(x), d * d), offsets)
        right = _segment_sums(x * y[:, None], offsets)
        gram = gram.reshape(-1, d, d) + self.ridge * np.eye(d)
        return np.asarray(np.linalg.solve(gram, right[..., None])[..., 0])


def _segment_sums(x: Float64, offsets: Int64) -> Float64:
    """Sums of rows `offsets[i]:offsets[i + 1]`; of an empty segment zero."""
    out = np.zeros((len(offsets) - 1, x.shape[1]))
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):
        out[filled] = np.add.reduceat(x, offsets[:-1][filled], axis=0)
    return out


def feedback_values(events: Events) -> Float64:
    """[N] feedback as a number: the word's place, items chosen above those passed over."""
    if events.level is None:
        return np.ones(events.num_events)
    value = events.level.astype(np.float64)
    return 1 - value if events.words[0] == "chosen" else value

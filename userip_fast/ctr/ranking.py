"""The whole catalogue ranked for a user: Recall@20 and NDCG@100 of later choices.

The protocol of "Variational Autoencoders for Collaborative Filtering" (WWW 2018): a user is known
by some events, whose items are taken out of the ranking, and the others are to be found.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from userip_fast.ctr.numbers import Fit
from userip_fast.ctr.protocols import Task
from userip_fast.ctr.vectors import Float64
from userip_fast.em.free import FreeMixture
from userip_fast.prompts.packing import Int64

_CHUNK = 1 << 22  # scores at a time
Score = Callable[[Int64], Float64]
"""[n] rows of the test view -> [n, I] scores."""


def rank_choices(task: Task, scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    """Name -> `recall20` and `ndcg100`, means over test users.

    To be found are the items of the test rows of label 1 that the profile does not hold.
    """
    view = int(task.test.view.max())
    data, rows = task.views[view], task.view_rows(view)
    good = (task.test.label == 1) & (task.test.kind == 0)
    users = np.unique(task.test.user[good])
    users = users[rows[users] >= 0]
    shape = (task.data.num_users, task.data.num_items)
    wanted = sp.csr_matrix(
        (np.ones(good.sum()), (task.test.user[good], task.test.item[good])), shape=shape
    )
    wanted.data[:] = 1
    out = {}
    for name, score in scores.items():
        recall, ndcg = [], []
        for some in np.array_split(users, -(-len(users) * shape[1] // _CHUNK)):
            at = rows[some]
            s = np.array(score(at), np.float64)
            events = [np.arange(data.offsets[u], data.offsets[u + 1]) for u in at]
            owner = np.repeat(np.arange(len(at)), [len(e) for e in events])
            s[owner, data.item_index[np.concatenate(events)]] = -np.inf
            hits = wanted[some].toarray()
            best = _top(s, 100)
            found = np.take_along_axis(hits, best, axis=1)
            total = hits.sum(1)
            recall.append(found[:, :20].sum(1) / np.minimum(total, 20))
            gain = 1 / np.log2(np.arange(2, found.shape[1] + 2))
            ideal = np.cumsum(gain)[np.minimum(total, found.shape[1]).astype(int) - 1]
            ndcg.append((found * gain).sum(1) / ideal)
        out[name] = {
            "recall20": float(np.concatenate(recall).mean()),
            "ndcg100": float(np.concatenate(ndcg).mean()),
        }
    return out


def choice_scores(
    fit: Fit,
    mixture: FreeMixture | None,
    posterior: Float64 | None,
    affinity: NDArray[np.float32] | None,
    joint: NDArray[np.float32] | None,
) -> dict[str, Score]:
    """Rankers, those that need no LM first.

    Args:
        fit: On everything that training knows.
        mixture, posterior: A mixture and [V, K] its posterior of the test view's users.
        affinity, joint: [I, Z] how much likelier than by anybody items are chosen under codes, and
            [V, Z] p(codes | profile). Popularity is put back.
    """
    view = len(fit.task.views) - 1
    popular = fit.counts.astype(np.float64)
    scores: dict[str, Score] = {"popularity": lambda at: np.tile(popular, (len(at), 1))}

    def foldin(at: Int64) -> Float64:
        model = fit.als[min(fit.als)]
        return np.asarray(fit.folded(model, view)[at] @ model.item_factors.T)

    known = fit.matrix(fit.known)
    cosine = sp.csr_matrix(known @ sp.diags(1 / np.sqrt(np.maximum(fit.counts, 1.0))))
    own = fit.matrix(fit.task.views[view])
    scaled = sp.csr_matrix(own @ sp.diags(1 / np.sqrt(np.maximum(fit.counts, 1.0))))

    def item_item(at: Int64) -> Float64:
        return np.asarray((scaled[at] @ known.T @ cosine).toarray())

    scores |= {"foldin": foldin, "item_item": item_item}
    if mixture is not None and posterior is not None:
        told = mixture.probability()
        scores["mixture"] = lambda at: posterior[at] @ told.T
    if affinity is not None and joint is not None:

        def by_affinity(at: Int64) -> Float64:
            return np.asarray(np.log(joint[at] @ affinity.T) + np.log(popular + 0.1))

        def both(at: Int64) -> Float64:
            parts = (foldin(at), by_affinity(at))
            return np.asarray(
                sum((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in parts)
            )

        scores |= {"affinity": by_affinity, "foldin + affinity": both}
    return scores


def _top(scores: Float64, n: int) -> Int64:
    """[N, n] the highest of each row, best first."""
    n = min(n, scores.shape[1])
    some = np.argpartition(-scores, n - 1, axis=1)[:, :n]
    order = np.argsort(-np.take_along_axis(scores, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)

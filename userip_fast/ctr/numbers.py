"""What any production team has without an LM: statistics of items and users, and scores of pairs.

All of it is fitted on the teachers and on the row users, yet never on those of a training row's own
fold (see `protocols`): a training row is read by the fit without its fold, a test row by the one
that knows all. What a user is known by are the events of the row's view, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from userip_fast.core.errors import UnavailableError
from userip_fast.ctr.protocols import Rows, Task
from userip_fast.ctr.vectors import Float64, Ridge, attribute_matrix
from userip_fast.data import Interactions
from userip_fast.data.attributes import Attribute
from userip_fast.prompts.packing import Int64

_PRIOR = 10.0  # events at the mean that an item's rate starts with
_USER_PRIOR = 2.0
_NEAREST = 3  # items of the profile that stand for it in a text score
_RANKS = (16, 64)
_CHUNK = 1 << 16  # rows at a time


class Fit:
    """Statistics and scores, fitted on `known` and on training rows.

    Args:
        known: Histories.
        rows: Training rows of the same users; for choices they give the items' rates.
    """

    def __init__(
        self, task: Task, known: Interactions, rows: Rows, attributes: list[Attribute]
    ) -> None:
        self.task, self.known, self.rows = task, known, rows
        self.attributes = attributes
        items = known.num_items
        self.counts = known.item_counts()
        if task.choices:
            hits = np.bincount(rows.item, rows.label, items)
            seen = np.bincount(rows.item, minlength=items)
        else:
            hits, seen = np.bincount(known.item_index, self._hits(known), items), self.counts
        self.mean = float(hits.sum() / max(seen.sum(), 1))
        self.rate = (hits + _PRIOR * self.mean) / (seen + _PRIOR)

    def item_numbers(self) -> dict[str, Float64]:
        """Name -> [I] smoothed share of label 1, and log count."""
        return {"item_rate": self.rate, "item_count": np.log1p(self.counts)}

    def user_numbers(self, view: int) -> dict[str, Float64]:
        """Name -> [V + 1] statistics of a view's users; the last is of a user without events.

        Of ratings the mean, the share above the threshold and the mean excess over the items' own
        rates; of choices the mean log count of the items, and the number of events.
        """
        data = self.task.views[view]
        n = np.append(data.history_lengths, 0).astype(np.float64)
        user, users = data.users_of_events(), len(n)

        def sums(x: Float64) -> Float64:
            return np.bincount(user, x, users).astype(np.float64)

        if self.task.choices:
            logs = np.log1p(self.counts)
            usual = float(self.counts @ logs / max(self.counts.sum(), 1))
            # Half of a history stands for all of it where a training row reads its half.
            halves = 2.0 if len(self.task.views) > 1 and view < 2 else 1.0
            return {
                "user_popularity": (sums(logs[data.item_index]) + usual) / (n + 1),
                "user_events": np.log1p(n * halves),
            }
        assert data.rating is not None
        assert self.known.rating is not None
        rating, hit = data.rating.astype(np.float64), self._hits(data)
        usual = float(self.known.rating.mean())
        k = _USER_PRIOR
        return {
            "user_rating": (sums(rating) + k * usual) / (n + k),
            "user_share": (sums(hit) + k * self.mean) / (n + k),
            "user_excess": sums(hit - self.rate[data.item_index]) / (n + k),
        }

    def base(self, rows: Rows) -> dict[str, Float64]:
        """Name -> [N] what every feature has."""
        out = {name: x[rows.item] for name, x in self.item_numbers().items()}
        by_view = [self.user_numbers(v) for v in range(len(self.task.views))]
        told = [np.stack(list(by.values()), axis=1) for by in by_view]
        own = self._per_view(rows, lambda v, at, _: told[v][at], columns=told[0].shape[1])
        return out | dict(zip(by_view[0], own.T))

    def foldin(self, rows: Rows) -> dict[str, Float64]:
        """Name -> [N] scores of matrix factorisation, users folded in by their view.

        Choices: implicit ALS ("Collaborative Filtering for Implicit Feedback Datasets", ICDM
        2008) on a 0/1 matrix, by `implicit`. Ratings: biased ALS; the whole prediction, and what is
        left of it without the biases.
        """
        if self.task.choices:
            return {f"foldin_{rank}": self._products(rows, rank) for rank in self.als}
        model = self.ridge
        users = []
        for view in self.task.views:
            assert view.rating is not None
            own = model.users(view.offsets, view.item_index, view.rating)
            users.append(np.vstack([own, np.zeros(own.shape[1])]))

        def taste(v: int, at: Int64, item: Int64) -> Float64:
            return np.asarray(np.einsum("nd,nd->n", users[v][at, 1:], model.v[item, 1:]))

        own = self._per_view(rows, taste)
        user = self._per_view(rows, lambda v, at, _: users[v][at, 0])
        return {"foldin": model.item_mean[rows.item] + user + own, "foldin_taste": own}

    @cached_property
    def als(self) -> dict[int, Any]:
        """Rank -> implicit's model."""
        return {rank: _implicit_als(self.matrix(self.known), rank) for rank in _RANKS}

    @cached_property
    def ridge(self) -> Ridge:
        known = self.known
        assert known.rating is not None
        return Ridge(known.offsets, known.item_index, known.rating, known.num_items, seed=0)

    def text(self, rows: Rows, texts: sp.csr_matrix) -> dict[str, Float64]:
        """Name -> [N] how near the item's text is to those of the profile.

        The mean of the three nearest and, of ratings, the mean excess weighed by nearness.
        """

        def near(v: int, at: Int64, item: Int64) -> Float64:
            return self._nearest(v, at, item, texts)

        two = self._per_view(rows, near, columns=2)
        out = {"text_near": two[:, 0]}
        if not self.task.choices:
            out["text_liked"] = two[:, 1]
        return out

    def attribute_affinity(self, rows: Rows) -> dict[str, Float64]:
        """Attribute -> [N] how much the profile's weight lies on the item's values."""
        profiles = [self._profile(v) for v in range(len(self.task.views))]

        def affinity(a: Attribute) -> Float64:
            share = sp.csr_matrix(attribute_matrix([a]))
            tastes = [profile @ share for profile in profiles]

            def score(v: int, at: Int64, item: Int64) -> Float64:
                return np.asarray(tastes[v][at].multiply(share[item]).sum(1)).ravel()

            return self._per_view(rows, score)

        return {f"affinity_{a.name}": affinity(a) for a in self.attributes}

    def popularity(self, rows: Rows) -> Float64:
        return self.counts[rows.item].astype(np.float64)

    def weights(self, view: int) -> Float64:
        """[E] of a view's events: 1 for a choice, for a rating its excess over item and user."""
        data = self.task.views[view]
        if self.task.choices:
            return np.ones(data.num_events)
        excess = self._hits(data) - self.rate[data.item_index]
        return excess - self.user_numbers(view)["user_excess"][data.users_of_events()]

    def _hits(self, data: Interactions) -> Float64:
        assert data.rating is not None
        return (data.rating >= self.task.threshold).astype(np.float64)

    def matrix(self, data: Interactions) -> sp.csr_matrix:
        """[users, items] of zeros and ones."""
        shape = (data.num_users, data.num_items)
        ones = np.ones(data.num_events, np.float32)
        matrix = sp.csr_matrix((ones, data.item_index, data.offsets), shape=shape, copy=True)
        matrix.sum_duplicates()  # in place, so of a copy
        matrix.data[:] = 1
        return matrix

    def _profile(self, view: int) -> sp.csr_matrix:
        """[V + 1, I] the weights of a view's events, a mean per user; the last row is empty."""
        data = self.task.views[view]
        n = np.maximum(data.history_lengths, 1)[data.users_of_events()]
        offsets = np.append(data.offsets, data.num_events)
        shape = (data.num_users + 1, data.num_items)
        values = (self.weights(view) / n, data.item_index, offsets)
        return sp.csr_matrix(values, shape=shape, copy=True)

    def folded(self, model: Any, view: int) -> NDArray[np.float32]:
        """[V + 1, rank] a view's users by implicit's model; the last is of nobody."""
        data = self.task.views[view]
        users = model.recalculate_user(np.arange(data.num_users), self.matrix(data))
        return np.vstack([users, np.zeros((1, users.shape[1]), users.dtype)])

    def _products(self, rows: Rows, rank: int) -> Float64:
        model = self.als[rank]
        users = [self.folded(model, v) for v in range(len(self.task.views))]
        items = model.item_factors
        return self._per_view(
            rows, lambda v, at, item: np.einsum("nd,nd->n", users[v][at], items[item])
        )

    def _nearest(self, view: int, at: Int64, item: Int64, texts: sp.csr_matrix) -> Float64:
        data = self.task.views[view]
        offsets = np.append(data.offsets, data.num_events)
        weight, out = self.weights(view), np.zeros((len(at), 2))
        count = np.diff(offsets)[at]
        order = np.argsort(count, kind="stable")  # rows of equal length make matrices
        for n in np.unique(count[count > 0]):
            those = order[np.searchsorted(count[order], n) : np.searchsorted(count[order], n + 1)]
            for rows in np.array_split(those, -(-len(those) * int(n) // _CHUNK)):
                events = offsets[at[rows]][:, None] + np.arange(n)
                own = np.repeat(item[rows], n)
                product = texts[data.item_index[events.ravel()]].multiply(texts[own])
                cosine = np.asarray(product.sum(1)).reshape(len(rows), n)
                out[rows, 0] = np.sort(cosine, axis=1)[:, -_NEAREST:].mean(1)
                total = (cosine * weight[events]).sum(1)
                out[rows, 1] = total / (np.abs(cosine).sum(1) + 0.5)
        return out

    def _per_view(
        self, rows: Rows, score: Callable[[int, Int64, Int64], Any], columns: int = 0
    ) -> Float64:
        """[N] or [N, columns] `score(view, row of the view, item)` of each row."""
        out = np.zeros((len(rows), columns) if columns else len(rows))
        for v in np.unique(rows.view).tolist():
            here = np.flatnonzero(rows.view == v)
            user = self.task.view_rows(v)[rows.user[here]]
            for part in np.array_split(np.arange(len(here)), -(-len(here) // _CHUNK)):
                out[here[part]] = score(v, user[part], rows.item[here[part]])
        return out


class Numbers:
    """The numbers of all rows of a task, each row's from a fit that does not know its user.

    Args:
        attributes: Item columns.
    """

    def __init__(self, task: Task, attributes: list[Attribute]) -> None:
        self.task, self.attributes = task, attributes
        self._fits: dict[int, Fit] = {}

    def fit(self, without: int) -> Fit:
        """Fitted on everyone but the users of fold `without`; -1 leaves none out."""
        if without not in self._fits:
            task = self.task
            kept = task.pool.select_users(np.flatnonzero(task.pool_fold != without))
            known = Interactions.concat([task.learn, kept])
            rows = task.train.take(task.fold[task.train.user] != without)
            self._fits[without] = Fit(task, known, rows, self.attributes)
        return self._fits[without]

    def columns(self, kind: str) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Side ("train", "valid", "test") -> name -> [N] of one kind of numbers.

        Args:
            kind: "base", "foldin", "text", "attribute_affinity" or "popularity".
        """
        found = {}
        for side in ("train", "valid", "test"):
            rows: Rows = getattr(self.task, side)
            fold = np.full(len(rows), -1) if side == "test" else self.task.fold[rows.user]
            out: dict[str, NDArray[np.float32]] = {}
            for f in np.unique(fold).tolist():
                here = np.flatnonzero(fold == f)
                for name, values in self._of(kind, self.fit(f), rows.take(here)).items():
                    out.setdefault(name, np.zeros(len(rows), np.float32))[here] = values
            found[side] = out
        return found

    def _of(self, kind: str, fit: Fit, rows: Rows) -> dict[str, Float64]:
        if kind == "text":
            return fit.text(rows, self.texts)
        if kind == "popularity":
            return {"popularity": fit.popularity(rows)}
        return dict(getattr(fit, kind)(rows))

    @cached_property
    def texts(self) -> sp.csr_matrix:
        """[I, terms] item texts as TF-IDF rows of length 1."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = self.task.data.item_text.to_pylist()
        counts = TfidfVectorizer(min_df=2 if len(texts) > 100 else 1, sublinear_tf=True)
        return sp.csr_matrix(counts.fit_transform(texts))


def _implicit_als(matrix: sp.csr_matrix, rank: int) -> Any:
    try:
        from implicit.cpu.als import AlternatingLeastSquares
    except ImportError as e:
        raise UnavailableError(
            f"feature foldin needs implicit's ALS (extra ctr): pip install implicit; {e}"
        ) from e
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):  # it has threads of its own
        model = AlternatingLeastSquares(
            factors=rank, regularization=10.0, alpha=10.0, iterations=15, random_state=0,
            num_threads=torch.get_num_threads(),
        )  # fmt: skip
        model.fit(matrix, show_progress=False)
    return model

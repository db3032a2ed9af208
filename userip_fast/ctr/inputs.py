"""What a recommender is given: columns of rows, put together by feature.

Every feature has the same base: the item's id, attributes and statistics, and the user's statistics
(`numbers`); with a feature come its parts. A part's columns are made once for all rows and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userip_fast.ctr.cells import Arrays, Cells, data_digest, digest
from userip_fast.ctr.config import CTRConfig
from userip_fast.ctr.features import ImpossibleError, Profiles
from userip_fast.ctr.numbers import Numbers
from userip_fast.ctr.protocols import Rows, Task
from userip_fast.data.attributes import item_attributes
from userip_fast.prompts.packing import Int64

SIDES = ("train", "valid", "test")
_CLIP = 5.0
_LONGEST = 50  # events of a profile that `history` reads

_WITHOUT_LM = (
    "probabilities:mixture", "score:mixture", "number:foldin", "number:text",
    "number:attribute_affinity",
)  # fmt: skip
_OF_LM = ("code:ids", "probabilities:ids", "score:ids")
PARTS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "mixture_ids": ("code:mixture",),
    **{
        f: (f"code:{f}", f"probabilities:{f}", f"score:{f}") for f in ("mixture", "mixture_words")
    },
    "foldin": ("number:foldin",),
    "history": ("history",),
    "text": ("number:text",),
    "ids_prob": _OF_LM[:2],
    "affinity": _OF_LM[2:],
    "ids_affinity": _OF_LM,
    "theta": ("score:theta",),
    "all": _WITHOUT_LM,
    "all+ids": (*_WITHOUT_LM, *_OF_LM),
    **{
        f: (f"code:{f}",)
        for f in (
            "random", "generosity", "kmeans_attributes", "kmeans_tfidf", "kmeans_states",
            "mf_clusters", "paper", "ids",
        )
    },
}  # fmt: skip
"""Feature -> what it adds to the base."""


@dataclass(frozen=True)
class Column:
    """A categorical input. `values` [N] or [N, L] int64 in [0, size); with L, the mean over the
    non-zero ones is taken."""

    name: str
    size: int
    values: Int64


@dataclass(frozen=True)
class Number:
    """A numerical input. `values` [N] float32, of training mean 0 and deviation 1."""

    name: str
    values: NDArray[np.float32]


@dataclass(frozen=True)
class History:
    """Items of the profile, told in the numbers of the column `of`. `values` [N, L] int64, 0 for
    no item."""

    name: str
    of: str
    values: Int64


Input = Column | Number | History


class Inputs:
    """Columns of the rows of a task.

    Args:
        profiles: Codes by feature.
        store: Keeps what was made.

    Attributes:
        attributes: Item columns that recommenders and clusters read.
    """

    def __init__(self, task: Task, ctr: CTRConfig, profiles: Profiles, store: Cells) -> None:
        self.ctr = ctr
        self.task, self.profiles, self.store = task, profiles, store
        self.attributes = item_attributes(task.data.items, ctr.attributes)
        self.numbers = Numbers(task, self.attributes)
        self._about = [data_digest(d) for d in (task.data, task.learn, task.pool, *task.views)]
        self._rows = [_digest(getattr(task, side).__dict__) for side in SIDES]
        items = np.unique(task.train.item)
        self.item_id = np.zeros(task.data.num_items, np.int64)  # 0: not met in training
        self.item_id[items] = 1 + np.arange(len(items))

    def of(self, feature: str, seed: int) -> dict[str, list[Input]]:
        """Side -> the columns of a feature.

        Raises:
            ImpossibleError: The data cannot have this feature.
        """
        parts = [self.part(name, seed) for name in ("base", *PARTS[feature])]
        return {side: [x for part in parts for x in part[side]] for side in SIDES}

    def part(self, name: str, seed: int) -> dict[str, list[Input]]:
        """Side -> the columns of one part."""
        kind, _, what = name.partition(":")
        if kind == "base":
            found = self._base()
        elif kind == "history":
            found = {side: self._history(self._side(side)) for side in SIDES}
        elif kind == "number":
            found = self._standardised(self.number_part(what))
        elif kind == "score":
            scores = {"ids": self.affinities, "theta": self.told}
            told = scores[what](seed) if what in scores else self.mixture_scores(seed, what)
            found = self._standardised(told)
        else:
            found = self._profile(kind, what, seed)
        return found

    def profile(self, feature: str, seed: int) -> list[Arrays]:
        """Per view what `Profiles.read` tells, for all users of the task."""
        return [self._read(feature, v, seed) for v in range(len(self.task.views))]

    def number_part(self, kind: str) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Side -> name -> [N], as measured; see `Numbers.columns`."""
        key = {
            "kind": f"number_{kind}", "data": self._about, "rows": self._rows, "version": 1,
            "attributes": [a.name for a in self.attributes],
        }  # fmt: skip

        def compute() -> Arrays:
            found = self.numbers.columns(kind)
            return {f"{side}.{n}": x for side, by in found.items() for n, x in by.items()}

        flat = self.store.get(key, compute)
        out: dict[str, dict[str, NDArray[np.float32]]] = {side: {} for side in SIDES}
        for name, x in flat.items():
            side, _, rest = name.partition(".")
            out[side][rest] = x
        return out

    def _side(self, side: str) -> Rows:
        rows: Rows = getattr(self.task, side)
        return rows

    def _base(self) -> dict[str, list[Input]]:
        told = self.number_part("base")
        if not self.ctr.user_statistics:
            told = {
                side: {name: x for name, x in by.items() if not name.startswith("user_")}
                for side, by in told.items()
            }
        numbers = self._standardised(told)
        out: dict[str, list[Input]] = {}
        for side in SIDES:
            rows = self._side(side)
            out[side] = [Column("item", int(self.item_id.max()) + 1, self.item_id[rows.item])]
            for a in self.attributes:
                values = a.values[rows.item]
                values = values if values.shape[1] > 1 else values[:, 0]
                out[side].append(Column(f"item_{a.name}", a.size, values))
            if self.task.user_ids:
                out[side].append(Column("user", self.task.data.num_users, rows.user))
            out[side] += numbers[side]
        return out

    def read_key(self, feature: str, view: int, seed: int) -> dict[str, Any]:
        """Of the cell that holds a feature's profiles of a view."""
        key = {"kind": "codes", "seed": seed, "view": self._about[3 + view]}
        return key | self.profiles.key(feature)

    def _read(self, feature: str, view: int, seed: int) -> Arrays:
        data = self.task.views[view]
        key = self.read_key(feature, view, seed)
        found = self.store.get(key, lambda: self.profiles.read(feature, data, seed))
        at = self.task.data.user_index(data.user_keys)
        users = self.task.data.num_users
        codes = np.tile(np.array(self.profiles.sizes), (users, 1))
        codes[at] = found["codes"]
        out = {"codes": codes}
        if (p := found.get("probabilities")) is not None:
            out["probabilities"] = np.tile(p.mean(0), (users, 1))  # of users the view lacks
            out["probabilities"][at] = p
        return out

    def _profile(self, kind: str, feature: str, seed: int) -> dict[str, list[Input]]:
        views = self.profile(feature, seed)
        if kind == "code":
            codes = np.stack([v["codes"] for v in views])
            found: dict[str, list[Input]] = {}
            for side in SIDES:
                own = codes[self._side(side).view, self._side(side).user]
                found[side] = [
                    Column(f"{feature}_{j}", size + 1, own[:, j])
                    for j, size in enumerate(self.profiles.sizes)
                ]
            return found
        if "probabilities" not in views[0]:
            raise ImpossibleError(
                f"{feature} has no probabilities: a nearest codeword tells none; choose "
                "em.estep=posterior"
            )
        p = np.stack([v["probabilities"] for v in views])
        told = {}
        for side in SIDES:
            own = p[self._side(side).view, self._side(side).user]
            told[side] = {f"{feature}_p{k}": own[:, k] for k in range(own.shape[1])}
        return self._standardised(told)

    def mixture_scores(
        self, seed: int, feature: str = "mixture"
    ) -> dict[str, dict[str, NDArray[np.float32]]]:
        mixture = self.profiles.mixture(seed, feature == "mixture_words")
        p = np.stack([v["probabilities"] for v in self.profile(feature, seed)])
        return {
            side: {feature: mixture.score(p[r.view, r.user], r.item).astype(np.float32)}
            for side in SIDES
            for r in [self._side(side)]
        }

    def affinities(self, seed: int) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Side -> name -> [N] log odds of the best reaction, or log lift of the choice,
        p(codes | profile) averaged over."""
        table, codes = self.affinity_table(seed)
        views = self.profile("ids", seed)
        p = np.stack([self.profiles.joint(v["probabilities"], codes) for v in views])
        out = {}
        for side in SIDES:
            rows = self._side(side)
            mean = np.einsum("nz,nz->n", p[rows.view, rows.user], table[rows.item])
            odds = mean / (1 - mean) if self.profiles.format.words else mean
            out[side] = {"affinity": np.log(odds).astype(np.float32)}
        return out

    def told(self, seed: int) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Side -> name -> [N] the LM's score of the item, told of the user instead of codes; no
        seed of EM changes it."""
        key = {
            "kind": "theta",
            "rows": self._rows,
            "views": self._about,
            **self.profiles.key("ids"),
        }
        del key["table"]  # it needs none

        def compute() -> Arrays:
            found = {}
            for side in SIDES:
                rows = self._side(side)
                out = np.zeros(len(rows), np.float32)
                for v in np.unique(rows.view).tolist():
                    here = np.flatnonzero(rows.view == v)
                    user = self.task.view_rows(v)[rows.user[here]]
                    out[here] = self.profiles.told(self.task.views[v], user, rows.item[here])
                found[side] = out
            return found

        return {side: {"theta": x} for side, x in self.store.get(key, compute).items()}

    def affinity_table(self, seed: int) -> tuple[NDArray[np.float32], Int64 | None]:
        """[I, Z] p(the best reaction | item, codes), and the codes, None for all combinations."""
        key = {"kind": "affinity", "seed": seed, **self.profiles.key("ids")}
        key["items"] = self._about[0]
        found = self.store.get(key, lambda: self.profiles.affinity(self.task.data, seed))
        return found["p"], found.get("codes")

    def _history(self, rows: Rows) -> list[Input]:
        """The profile's items in two lists: of label 1, and of label 0 (ratings alone)."""
        task = self.task
        longest = min(_LONGEST, max(int(v.history_lengths.max()) for v in task.views))
        names = ("chosen",) if task.choices else ("liked", "other")
        out = {name: np.zeros((len(rows), longest), np.int64) for name in names}
        for v, view in enumerate(task.views):
            user = view.users_of_events()
            if task.choices:
                kept = [np.ones(view.num_events, bool)]
            else:
                assert view.rating is not None
                kept = [view.rating >= task.threshold, view.rating < task.threshold]
            here = np.flatnonzero(rows.view == v)
            at = task.view_rows(v)[rows.user[here]]
            for name, mask in zip(names, kept):
                # The latest events, from the left.
                back = np.cumsum(mask[::-1])[::-1] - mask
                ends = np.append(back, 0)[view.offsets[1:]]
                place = back - ends[user]
                some = mask & (place < longest)
                table = np.zeros((view.num_users + 1, longest), np.int64)
                table[user[some], place[some]] = self.item_id[view.item_index[some]]
                out[name][here] = table[at]
        return [History(f"history_{name}", "item", values) for name, values in out.items()]

    @staticmethod
    def _standardised(
        told: Mapping[str, Mapping[str, NDArray[np.float32]]],
    ) -> dict[str, list[Input]]:
        """By the training rows' mean and deviation, at most `_CLIP` of them from the mean."""
        out: dict[str, list[Input]] = {side: [] for side in SIDES}
        for name, x in told["train"].items():
            mean, deviation = float(x.mean(dtype=np.float64)), float(x.std(dtype=np.float64))
            for side in SIDES:
                z = (told[side][name] - mean) / (deviation or 1.0)
                out[side].append(Number(name, np.clip(z, -_CLIP, _CLIP).astype(np.float32)))
        return out


def some_rows(columns: list[Input], rows: Int64) -> list[Input]:
    """Columns of some rows."""

    def taken(column: Any) -> Any:
        return replace(column, values=column.values[rows])

    return [taken(c) for c in columns]


def inputs_digest(columns: Mapping[str, list[Input]]) -> str:
    """Of everything that a recommender is given."""
    return digest(
        {
            side: [[c.name, type(c).__name__, _digest(c.__dict__)] for c in some]
            for side, some in columns.items()
        }
    )


def _digest(values: Mapping[str, Any]) -> str:
    h = hashlib.sha256()
    for name, x in values.items():
        told = np.ascontiguousarray(x).tobytes() if isinstance(x, np.ndarray) else repr(x).encode()
        h.update(name.encode() + told)
    return h.hexdigest()[:16]

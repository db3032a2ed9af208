"""Feedback of each event: levels of ratings, or purchases against sampled items passed over.

The result is one flat `Events`, which the prompts layer turns into behaviour text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.errors import DataError, MismatchError
from userip_fast.core.keys import canonical_keys, hash_keys, key_order, mix64, seeded
from userip_fast.core.profiles import NEGATIVE_WORDS, SAMPLING_POWER
from userip_fast.data.arrow import combine, to_numpy
from userip_fast.data.interactions import Interactions

if TYPE_CHECKING:
    from userip_fast.data.stream import InteractionStream

RATING_WORDS = ("disliked", "okay", "liked")
_MAX_CUT_POINTS = 1024  # more distinct ratings than this are first thinned to their quantiles
_MAX_DRAWS = 16  # random draws before a negative is drawn exactly among the items left


@dataclass(frozen=True)
class Events:
    """What users did and how it went: U users, N events in all, stored flat (CSR).

    Attributes:
        user_keys: [U] int64 or large_string.
        offsets: [U + 1] int64; user u's events are `offsets[u]:offsets[u + 1]`.
        item_index: [N] int32, rows of `item_keys` and `item_text`.
        item_keys: [M] int64 or large_string: the data's items, then sampled ones it lacks.
        item_text: [M] large_string.
        level: [N] int8, index of the feedback word; None without feedback.
        words: The feedback words; empty without feedback.
    """

    user_keys: pa.Array
    offsets: NDArray[np.int64]
    item_index: NDArray[np.int32]
    item_keys: pa.Array
    item_text: pa.Array
    level: NDArray[np.int8] | None = None
    words: tuple[str, ...] = ()

    @property
    def num_users(self) -> int:
        return len(self.user_keys)

    @property
    def num_events(self) -> int:
        return len(self.item_index)

    def users(self, start: int, stop: int) -> Events:
        """The events of users `start:stop`; the items stay."""
        offsets = self.offsets[start : stop + 1]
        here = slice(offsets[0], offsets[-1])
        return replace(
            self,
            user_keys=self.user_keys.slice(start, stop - start),
            offsets=offsets - offsets[0],
            item_index=self.item_index[here],
            level=None if self.level is None else self.level[here],
        )

    def select_users(self, users: NDArray[np.int64]) -> Events:
        """The events of some users, ascending rows; the items stay."""
        lengths = np.diff(self.offsets)
        here = np.repeat(np.isin(np.arange(self.num_users), users), lengths)
        return replace(
            self,
            user_keys=self.user_keys.take(pa.array(users)),
            offsets=np.concatenate([[0], np.cumsum(lengths[users])]).astype(np.int64),
            item_index=self.item_index[here],
            level=None if self.level is None else self.level[here],
        )


@dataclass(frozen=True)
class FeedbackScale:
    """Ratings to words: `words[i]` from `thresholds[i - 1]` up to, not including, `thresholds[i]`.

    Attributes:
        words: Lowest rating first; [n] distinct.
        thresholds: [n - 1] strictly ascending.
    """

    words: tuple[str, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.words) != len(self.thresholds) + 1:
            raise DataError(
                f"a feedback scale of {len(self.words)} words needs {len(self.words) - 1} "
                f"thresholds, got {len(self.thresholds)}"
            )
        _check_words(self.words)
        if not np.isfinite(self.thresholds).all() or (np.diff(self.thresholds) <= 0).any():
            raise DataError(f"feedback thresholds must be finite and ascend, got {self.thresholds}")

    @classmethod
    def fit(cls, ratings: NDArray[Any], words: Sequence[str] = RATING_WORDS) -> FeedbackScale:
        """Thresholds at which the words are used as equally often as the ratings allow.

        Equally: the sum of squared word counts is least; ties go to the lower threshold. With fewer
        distinct ratings than words, words are dropped from the middle.

        Raises:
            DataError: There are fewer than two words or distinct finite ratings.
        """
        values, counts = np.unique(np.asarray(ratings, np.float64), return_counts=True)
        return cls.fit_counts(values, counts, words)

    @classmethod
    def fit_counts(
        cls,
        values: NDArray[np.float64],
        counts: NDArray[np.int64],
        words: Sequence[str] = RATING_WORDS,
    ) -> FeedbackScale:
        """`fit` from distinct ratings, ascending, and how often each occurs."""
        if not np.isfinite(values).all():
            raise DataError("feedback scale: ratings must be finite")
        if len(words) < 2 or len(values) < 2:
            raise DataError(
                f"a feedback scale needs two words and two distinct ratings, got {tuple(words)} "
                f"and {values.tolist()}"
            )
        n = min(len(words), len(values))
        words = (*words[: (n + 1) // 2], *words[len(words) - n // 2 :])
        total = np.concatenate([[0], np.cumsum(counts)])  # ratings below each distinct value
        cuts = np.arange(len(values) + 1)
        if len(cuts) > _MAX_CUT_POINTS:
            steps = np.linspace(0, total[-1], _MAX_CUT_POINTS)
            cuts = np.unique(np.searchsorted(total, steps))
        below = total[cuts].astype(np.float64)
        # cost[b]: least sum of squares when the first words end before cut b; a word is never empty
        square = np.square(below[None, :] - below[:, None])
        square[np.tril_indices(len(cuts))] = np.inf
        cost, chosen = square[0], []
        for _ in range(n - 1):
            choices = cost[:, None] + square
            chosen.append(choices.argmin(0))
            cost = choices.min(0)
        end, thresholds = len(cuts) - 1, []
        for step in reversed(chosen):
            end = int(step[end])
            thresholds.append(float(values[cuts[end]]))
        return cls(words, tuple(reversed(thresholds)))

    def level(self, ratings: NDArray[Any]) -> NDArray[np.int8]:
        """[n] index of each rating's word."""
        found = np.searchsorted(self.thresholds, np.asarray(ratings, np.float64), side="right")
        return found.astype(np.int8)

    def to_dict(self) -> dict[str, Any]:
        return {"words": list(self.words), "thresholds": list(self.thresholds)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> FeedbackScale:
        return cls(tuple(value["words"]), tuple(value["thresholds"]))


@dataclass(frozen=True)
class Catalogue:
    """Items and how often they were chosen, from training data; kept with a model.

    Attributes:
        item_keys: [I] int64 or large_string, in key order.
        item_text: [I] large_string.
        counts: [I] int64, at least 1.
    """

    item_keys: pa.Array
    item_text: pa.Array
    counts: NDArray[np.int64]

    @classmethod
    def from_interactions(cls, data: Interactions | InteractionStream) -> Catalogue:
        """The items that occur, in an order that does not depend on any file."""
        counts = data.item_counts()
        used = np.flatnonzero(counts)
        keys = data.item_keys.take(used)
        used = used[key_order(keys, hash_keys(keys))]
        return cls(data.item_keys.take(used), data.item_text.take(used), counts[used])

    @cached_property
    def text_of(self) -> dict[Any, str]:
        """Item key -> item text."""
        return dict(zip(self.item_keys.to_pylist(), self.item_text.to_pylist()))

    def to_table(self) -> pa.Table:
        return pa.table({"item": self.item_keys, "text": self.item_text, "count": self.counts})

    @classmethod
    def from_table(cls, table: pa.Table) -> Catalogue:
        """The inverse of `to_table`.

        Raises:
            DataError: Columns are missing or of another type, or counts are not positive.
        """
        if table.column_names != ["item", "text", "count"]:
            raise DataError(
                f"a catalogue has columns item, text and count, this has {table.column_names}"
            )
        texts, counts = combine(table["text"]), combine(table["count"])
        if (texts.type, counts.type) != (pa.large_string(), pa.int64()) or texts.null_count:
            raise DataError(f"catalogue: text and counts are {texts.type} and {counts.type}")
        if counts.null_count or (to_numpy(counts) < 1).any():
            raise DataError("catalogue: counts must be positive")
        return cls(canonical_keys(table["item"]), texts, to_numpy(counts))


@dataclass(frozen=True)
class Negatives:
    """How items passed over are sampled: by popularity to a power, anew for each event.

    Attributes:
        catalogue: The items to sample from.
        n: Negatives of each event.
        power: Of an item's count.
        seed: Of the draws.
        words: For the item chosen, and for those passed over.
    """

    catalogue: Catalogue
    n: int = 1
    power: float = SAMPLING_POWER
    seed: int = 0
    words: tuple[str, str] = NEGATIVE_WORDS

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DataError(f"negatives: n must be at least 1, got {self.n}")
        if not 0 <= self.power < float("inf"):
            raise DataError(f"negatives: power must be finite and not negative, got {self.power}")
        if len(self.words) != 2:
            raise DataError(f"negatives: two words are needed, got {self.words}")
        _check_words(self.words)


def make_events(data: Interactions, feedback: FeedbackScale | Negatives | None = None) -> Events:
    """Events with their feedback.

    Args:
        data: The histories visible at this time; nothing else is known.
        feedback: A scale for the ratings, a way to sample negatives, or None for no feedback.

    Raises:
        DataError: A scale is given and the data has no ratings.
    """
    if isinstance(feedback, Negatives):
        return _add_negatives(data, feedback)
    level = None
    if feedback is not None:
        ratings = data.rating
        if ratings is None and data.constant_rating is not None:
            ratings = np.full(data.num_events, data.constant_rating, np.float32)
        if ratings is None:
            raise DataError(
                "feedback needs ratings, and the data has none; read it with rating=..."
            )
        level = feedback.level(ratings)
    return Events(
        user_keys=data.user_keys,
        offsets=data.offsets,
        item_index=data.item_index,
        item_keys=data.item_keys,
        item_text=data.item_text,
        level=level,
        words=feedback.words if feedback is not None else (),
    )


def _add_negatives(data: Interactions, how: Negatives) -> Events:
    """Each event becomes a group of 1 + n: the item chosen and n passed over, in a drawn order.

    A draw depends on the seed, the user's key, the item's key and how many times the user had
    chosen that item before; and on which draws the user's visible history refuses.
    So it is the same in any block, order of users, or file, and more events change an earlier draw
    only where it fell on a new item. The order within a group is drawn too: were the chosen item
    always first, the words could be told without reading the items.

    A user who chose every item of the catalogue gets no negatives.
    """
    catalogue, n = how.catalogue, how.n
    if len(catalogue.item_keys) and catalogue.item_keys.type != data.item_keys.type:
        raise MismatchError(
            f"items are {data.item_keys.type} here and {catalogue.item_keys.type} in the catalogue"
        )
    num_events, num_catalogue = data.num_events, len(catalogue.item_keys)
    user = data.users_of_events()
    in_catalogue = pc.fill_null(pc.index_in(data.item_keys, value_set=catalogue.item_keys), -1)
    catalogue_of_item = to_numpy(in_catalogue).astype(np.int64)
    chosen = catalogue_of_item[data.item_index]
    pairs = np.sort((user * num_catalogue + chosen)[chosen >= 0])  # what each user has seen

    key = seeded(hash_keys(data.user_keys), how.seed)[user]
    key ^= hash_keys(data.item_keys)[data.item_index]
    key = mix64(mix64(key) ^ _repeats(user * data.num_items + data.item_index).astype(np.uint64))
    keys = mix64(np.repeat(key, n) + np.tile(np.arange(1, n + 1, dtype=np.uint64), num_events))
    users = np.repeat(user, n)

    weight = catalogue.counts.astype(np.float64) ** how.power
    negatives = np.full(num_events * n, -1, np.int64)
    left = np.arange(num_events * n) if num_catalogue else np.zeros(0, np.int64)
    for attempt in range(_MAX_DRAWS):
        draw = _draw(weight, mix64(keys[left] ^ np.uint64(attempt)))
        pair = users[left] * num_catalogue + draw
        place = np.minimum(np.searchsorted(pairs, pair), max(len(pairs) - 1, 0))
        refused = pairs[place] == pair if len(pairs) else np.zeros(len(pair), bool)
        negatives[left[~refused]] = draw[~refused]
        left = left[refused]
    # Users who have seen nearly all there is; `left` is ascending, so each one's draws adjoin.
    for own in np.split(left, np.flatnonzero(np.diff(users[left])) + 1) if len(left) else ():
        u = users[own[0]]
        a, b = np.searchsorted(pairs, [u * num_catalogue, (u + 1) * num_catalogue])
        rest = np.delete(np.arange(num_catalogue), pairs[a:b] - u * num_catalogue)
        if len(rest):
            negatives[own] = rest[_draw(weight[rest], mix64(keys[own] ^ np.uint64(_MAX_DRAWS)))]

    # Items: the data's own, then those sampled from the catalogue that the data lacks.
    item_of_catalogue = np.full(num_catalogue + 1, -1, np.int64)  # the last stays -1: no negative
    known = np.flatnonzero(catalogue_of_item >= 0)
    item_of_catalogue[catalogue_of_item[known]] = known
    sampled = np.flatnonzero(np.bincount(negatives + 1, minlength=num_catalogue + 1)[1:])
    extra = sampled[item_of_catalogue[sampled] < 0]
    item_of_catalogue[extra] = data.num_items + np.arange(len(extra))

    # Groups of 1 + n, the chosen item swapped into its drawn place.
    items = np.empty((num_events, n + 1), np.int64)
    items[:, 0] = data.item_index
    items[:, 1:] = item_of_catalogue[negatives].reshape(num_events, n)
    level = np.ones((num_events, n + 1), np.int8)
    level[:, 0] = 0
    event, slot = np.arange(num_events), (mix64(key) % np.uint64(n + 1)).astype(np.int64)
    items[event, 0], items[event, slot] = items[event, slot], items[event, 0].copy()
    level[event, 0], level[event, slot] = level[event, slot], level[event, 0].copy()
    there = items >= 0
    lengths = np.concatenate([[0], np.cumsum(there.sum(1))])
    return Events(
        user_keys=data.user_keys,
        offsets=lengths[data.offsets].astype(np.int64),
        item_index=items[there].astype(np.int32),
        item_keys=pa.concat_arrays([data.item_keys, catalogue.item_keys.take(extra)]),
        item_text=pa.concat_arrays([data.item_text, catalogue.item_text.take(extra)]),
        level=level[there],
        words=how.words,
    )


def _draw(weight: NDArray[np.float64], bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """An index for each 64 random bits, in proportion to `weight`."""
    cumulative = np.cumsum(weight)
    point = (bits >> np.uint64(11)) * (2.0**-53) * cumulative[-1]
    found = np.searchsorted(cumulative, point, side="right")
    capped: NDArray[np.int64] = np.minimum(found, len(weight) - 1)
    return capped


def _repeats(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many times each code occurred before."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    start = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(codes) else order
    count = np.arange(len(codes)) - np.repeat(start, np.diff(np.append(start, len(codes))))
    result = np.empty(len(codes), np.int64)
    result[order] = count
    return result


def _check_words(words: Sequence[str]) -> None:
    if len(set(words)) != len(words) or any(not word.strip() for word in words):
        raise DataError(f"feedback words must be distinct and not empty, got {tuple(words)}")

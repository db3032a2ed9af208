"""Who teaches, who trains, who is tested, and which events a profile may be read from.

Users are drawn by the hash of their key into three sets, the same in any selection of the log:

    teachers  their whole histories are `Task.learn`, from which LM, codes, clusters and mixtures
              are learned. They have no rows.
    row users their rows train the recommenders (and a tenth of them only stop the training).
    new users are tested. Nothing of theirs is learned from.

Cheap fits (item statistics, fold-in) also read `Task.pool`, the row users' histories, but never
those of the row's own user: row users lie in folds, and what a training row sees was fitted without
its fold. So nothing learned that reaches a row has seen any event of the row's user.

Every row names the *view* that its user's profile is read from, and a view holds no event that the
row must not know:

    new-users   one view, each user's first n events. Rows are the later events.
    cold, warm  row and new users are cut in time: training part, then test rows. Test rows read
                the view of the whole training part; training rows at even places of it read the
                view of the odd places, and the reverse. The new users' training part is cut to
                their first five events, so that there are cold users in every log.

Rows are rated events (label: rating >= Q) or, without ratings or with label "chosen", events
against sampled items. Of choices, an item that the profile holds already is a repeat: repeats are
no training rows, and are reported apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from userip_fast.core.errors import DataError
from userip_fast.core.keys import hash_keys, seeded
from userip_fast.ctr.config import CHOSEN, CTRConfig, threshold
from userip_fast.data import Interactions, split_by_time
from userip_fast.prompts.packing import Int64

Mask = NDArray[np.bool_]

MATCHED, REPEAT = 1, 2
"""Kinds of test rows that stand apart: a sampled item as popular as the one chosen; an item that
the profile holds."""
_SHORTEST = 4  # events of a teacher
_DRAWS = 16  # until a sampled item is given up


@dataclass(frozen=True)
class Rows:
    """N labelled rows.

    Attributes:
        user, item: [N] int64, rows of the task's users and items.
        view: [N] int64, which view the user's profile comes from.
        label: [N] float32, 0 or 1.
        kind: [N] int8; 0 for the rows that count, else `MATCHED` or `REPEAT`.
    """

    user: Int64
    item: Int64
    view: Int64
    label: NDArray[np.float32]
    kind: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: NDArray[np.integer] | Mask) -> Rows:
        return Rows(
            self.user[index], self.item[index], self.view[index], self.label[index],
            self.kind[index],
        )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One protocol on one log.

    Attributes:
        data: All users that have rows; `Rows.user` and `Rows.item` are rows of it.
        learn: Histories of the teachers.
        pool: Histories of the row users, up to their last training row.
        fold: [data.num_users] int64 fold of each user with training rows, -1 for the others.
        pool_fold: [pool.num_users] the same for the pool.
        views: Histories to infer profiles from.
        train, valid, test: Rows; `valid` only stops training early.
        label: What 1 means, in words.
        choices: Whether rows are events against sampled items.
        threshold: Lowest rating of label 1; infinite for choices.
        user_ids: Whether the recommender has a column of user ids.
    """

    data: Interactions
    learn: Interactions
    pool: Interactions
    fold: Int64
    pool_fold: Int64
    views: tuple[Interactions, ...]
    train: Rows
    valid: Rows
    test: Rows
    label: str
    choices: bool
    threshold: float
    user_ids: bool

    def view_rows(self, view: int) -> Int64:
        """[data.num_users] row of each user in a view, -1 where the view lacks the user."""
        at = self.data.user_index(self.views[view].user_keys)
        out = np.full(self.data.num_users, -1)
        out[at] = np.arange(len(at))
        return out


def make_task(data: Interactions, config: CTRConfig) -> Task:
    """Splits a log by the config's protocol.

    Raises:
        DataError: No user has events enough, there are fewer users than folds, or a side is left
            without rows or with one label.
    """
    if config.label == CHOSEN:
        data = replace(data, rating=None, constant_rating=None)
    learn_from = data
    if config.period == "earlier":
        if config.protocol != "new-users":
            raise DataError("period=earlier goes with protocol new-users")
        learn_from, data = split_by_time(data, 0.5)
    # What is learned depends on neither protocol nor n: one model serves all.
    learn = learn_from.select_users(np.flatnonzero(learn_from.history_lengths >= _SHORTEST))
    learn = _head(learn.select_users(np.flatnonzero(_drawn(learn, config) == 2)), config)
    if not learn.num_users:
        raise DataError(
            f"no user with {_SHORTEST} events or more is left to learn profiles from; take a "
            "longer log or a smaller new_fraction and rows_fraction"
        )
    build = _new_users if config.protocol == "new-users" else _cold_or_warm
    task = build(data, learn, config)
    for name in ("train", "valid", "test"):
        labels = getattr(task, name).label
        if not len(labels) or labels.min() == labels.max():
            raise DataError(
                f"protocol {config.protocol}: the {name} rows ({len(labels):,}) do not have both "
                f"labels ({task.label}); take more users, another label or another protocol"
            )
    return task


def _new_users(data: Interactions, learn: Interactions, config: CTRConfig) -> Task:
    n = config.first
    side = _drawn(data, config)
    held_item = _held_items(data, config)
    pool = _head(data.select_users(np.flatnonzero(side == 1)), config)
    if not (data.history_lengths > n).any():
        raise DataError(f"protocol new-users: no user has more than first={n} events")
    data = _head(data.select_users(np.flatnonzero((side < 2) & (data.history_lengths > n))), config)
    new = _drawn(data, config) == 0
    place, user = _places(data), data.users_of_events()
    view = _damaged(_without(data.first_events(n), held_item), new, config)
    row = (place >= n) & (place < n + config.rows_per_user)
    # Rows are sampled by what is popular in truth, held out or not.
    make = _Labels(data, [learn, pool], [place < n], row & new[user], config, held_item)
    learn, pool = _without(learn, held_item), _without(pool, held_item)
    one = np.zeros(len(place), np.int64)
    own = row & ~new[user] & ~held_item[data.item_index]
    train, test = make.train(own, one), make.test(one)
    held = seeded(hash_keys(data.user_keys), config.split_seed + 7) % np.uint64(10) == 0
    return make.task(
        learn, pool, (view,), train, held[train.user], test, np.where(new, -1, _folds(data, config))
    )


def _held_items(data: Interactions, config: CTRConfig) -> Mask:
    """[I] items of which nothing but test rows knows."""
    bits = seeded(hash_keys(data.item_keys), config.split_seed + 23)
    return np.asarray(bits < np.uint64(config.hold_items * 2.0**64))


def _without(data: Interactions, items: Mask) -> Interactions:
    """`data` without events of `items` [I]."""
    return data.select_events(~items[data.item_index]) if items.any() else data


def _cold_or_warm(data: Interactions, learn: Interactions, config: CTRConfig) -> Task:
    data = data.select_users(
        np.flatnonzero((_drawn(data, config) < 2) & (data.history_lengths > 1))
    )
    if not data.num_users:
        raise DataError(f"protocol {config.protocol}: no user has more than one event")
    data = _head(data, config)
    lengths = data.history_lengths
    last = np.maximum(1, np.ceil(lengths * config.last_fraction)).astype(np.int64)
    cut = np.where(_drawn(data, config) == 0, config.cold_rows, lengths)
    trained = np.minimum(cut, lengths - last)
    place, user = _places(data), data.users_of_events()
    history = place < trained[user]
    recent = history & (place >= trained[user] - config.rows_per_user)
    if config.protocol == "cold":
        tested = trained <= config.cold_rows
    else:
        tested = trained >= config.warm_rows
    test_events = ~history & (place < trained[user] + config.rows_per_user) & tested[user]
    odd = place % 2 == 1
    # Training rows at even places read the first, those at odd places the second.
    profiles = [history & odd, history & ~odd, history]
    views = [data.select_events(mask) for mask in profiles]
    views[2] = _damaged(views[2], None, config)
    pool = data.select_events(history)
    make = _Labels(data, [learn, pool], profiles, test_events, config)
    train, test = make.train(recent, place % 2), make.test(np.full(len(place), 2))
    held = np.random.default_rng(config.split_seed + 7).random(len(train)) < 0.1
    return make.task(learn, pool, tuple(views), train, held, test, _folds(data, config))


def _drawn(data: Interactions, config: CTRConfig) -> Int64:
    """[U] 0 for new users, 1 for those with training rows, 2 for teachers: by key and seed."""
    bits = seeded(hash_keys(data.user_keys), config.split_seed)
    shares = np.cumsum([config.new_fraction, config.rows_fraction])
    cuts = np.array([int(min(share, 1.0) * (2.0**64 - 2048)) for share in shares], np.uint64)
    return np.searchsorted(cuts, bits, side="right")


def _folds(data: Interactions, config: CTRConfig) -> Int64:
    """[U] fold of each user, by key and seed."""
    bits = seeded(hash_keys(data.user_keys), config.split_seed + 19)
    return (bits % np.uint64(config.folds)).astype(np.int64)


def _head(data: Interactions, config: CTRConfig) -> Interactions:
    return data if config.max_users is None else data.head_users(config.max_users)


def _places(data: Interactions) -> Int64:
    """[E] how many events of the same user come before."""
    return np.asarray(np.arange(data.num_events) - data.offsets[:-1][data.users_of_events()])


class _Labels:
    """Makes the rows of a task: rated events, or events against sampled items.

    Args:
        data: The users with rows.
        known: Histories that training knows, for popularity and the median rating.
        profiles: Per view the [E] events of `data` it is made of, undamaged.
        test: [E] events that become test rows.
        held: [I] items that training rows must not have; None for none.
    """

    def __init__(
        self,
        data: Interactions,
        known: list[Interactions],
        profiles: list[Mask],
        test: Mask,
        config: CTRConfig,
        held: Mask | None = None,
    ) -> None:
        self.held = np.zeros(data.num_items, bool) if held is None else held
        self.data, self.profiles, self.tested, self.config = data, profiles, test, config
        self.choices = data.rating is None
        self.threshold = float("inf")
        if self.choices:
            if config.label not in (None, CHOSEN):
                raise DataError(
                    f"label={config.label!r} needs ratings, and the data has none that vary"
                )
            self.label = f"chosen, against {config.negatives} sampled items"
            self.pair = data.users_of_events() * data.num_items + data.item_index
            self.seen = np.sum([d.item_counts() for d in known], axis=0)
            self.random = np.random.default_rng(config.split_seed + 11)
            return
        ratings = known[0].rating
        assert ratings is not None
        if config.label is not None:
            self.threshold = threshold(config.label)
        else:
            values = np.unique(ratings)
            above = values[values > np.median(ratings)]
            self.threshold = float(above[0] if len(above) else values[-1])
        self.label = f"rating>={self.threshold:g}"

    def train(self, mask: Mask, view: Int64) -> Rows:
        """Rows of the events `mask` [E] that read the views `view` [E]."""
        rows = self._positives(mask, view)
        if not self.choices:
            return rows
        # A training row's sampled items may be items of the test: the future is not known there.
        rows = rows.take(rows.kind == 0)
        outside = ~self.tested
        occurs = ((self.seen > 0) | self._occurs(outside)) & ~self.held
        return self._against(rows, self._sampled(rows, np.unique(self.pair[outside]), occurs))

    def test(self, view: Int64) -> Rows:
        """Test rows, those that stand apart included."""
        rows = self._positives(self.tested, view)
        if not self.choices:
            return rows
        own = np.unique(self.pair)
        occurs = (self.seen > 0) | self._occurs(np.ones(len(self.pair), bool))
        once = rows.take(rows.kind == 0)
        none, kind = np.zeros_like(once.label), np.full_like(once.kind, MATCHED)
        matched = Rows(once.user, self._matched(once, own, occurs), once.view, none, kind)
        sampled = self._against(rows, self._sampled(rows, own, occurs))
        fields = ("user", "item", "view", "label", "kind")
        both = ([getattr(r, f) for r in (sampled, matched)] for f in fields)
        rows = Rows(*map(np.concatenate, both))
        return rows.take(rows.item >= 0)

    def task(
        self,
        learn: Interactions,
        pool: Interactions,
        views: tuple[Interactions, ...],
        train: Rows,
        held: Mask,
        test: Rows,
        fold: Int64,
    ) -> Task:
        users = len(np.unique(train.user))
        if users < self.config.folds:
            raise DataError(
                f"protocol {self.config.protocol}: {users} users have training rows, fewer than "
                f"folds={self.config.folds}; take more users or fewer folds"
            )
        return Task(
            self.data, learn, pool, fold, _folds(pool, self.config), views, train.take(~held),
            train.take(held), test, self.label, self.choices, self.threshold,
            self.config.protocol == "warm",
        )  # fmt: skip

    def _positives(self, mask: Mask, view: Int64) -> Rows:
        item = self.data.item_index[mask].astype(np.int64)
        kind = np.zeros(len(item), np.int8)
        if self.choices:
            label = np.ones(len(item), np.float32)
            for v, profile in enumerate(self.profiles):
                known = np.isin(self.pair[mask], self.pair[profile])
                kind[known & (view[mask] == v)] = REPEAT
        else:
            assert self.data.rating is not None
            label = (self.data.rating[mask] >= self.threshold).astype(np.float32)
        return Rows(self.data.users_of_events()[mask], item, view[mask], label, kind)

    def _occurs(self, mask: Mask) -> Mask:
        return np.bincount(self.data.item_index[mask], minlength=self.data.num_items) > 0

    def _against(self, rows: Rows, drawn: Int64) -> Rows:
        """Each row and its sampled items `drawn` [N, n], -1 for none; those of repeats left out."""
        n = drawn.shape[1]
        item = np.concatenate([rows.item[:, None], drawn], axis=1)
        label = np.zeros(item.shape, np.float32)
        label[:, 0] = 1
        kind = np.zeros(item.shape, np.int8)
        kind[:, 0] = rows.kind
        item[:, 1:][rows.kind == REPEAT] = -1
        out = Rows(
            np.repeat(rows.user, 1 + n), item.ravel(), np.repeat(rows.view, 1 + n), label.ravel(),
            kind.ravel(),
        )  # fmt: skip
        return out.take(out.item >= 0)

    def _sampled(self, rows: Rows, forbidden: Int64, occurs: Mask) -> Int64:
        """[N, negatives] items by popularity^0.75 that the user does not have; -1 for none.

        One is added to each count, so that an item seen only in tests is not always label 1.
        """
        cumulative = np.cumsum(np.where(occurs, self.seen + 1.0, 0.0) ** 0.75)
        items = self.data.num_items

        def draw(rows: Int64) -> Int64:
            point = self.random.random(len(rows)) * cumulative[-1]
            found = np.searchsorted(cumulative, point, side="right")
            return np.asarray(np.minimum(found, items - 1))

        n = self.config.negatives
        return self._drawn(np.repeat(rows.user, n), draw, forbidden).reshape(-1, n)

    def _matched(self, rows: Rows, forbidden: Int64, occurs: Mask) -> Int64:
        """[N] items of the same decile of training counts as the row's own; -1 for none."""
        there = np.flatnonzero(occurs)
        cuts = np.unique(np.quantile(self.seen[there], np.arange(1, 10) / 10))
        decile = np.searchsorted(cuts, self.seen, side="right")
        by = there[np.argsort(decile[there], kind="stable")]
        first = np.searchsorted(decile[by], np.arange(len(cuts) + 2))
        own = decile[rows.item]

        def draw(at: Int64) -> Int64:
            a, b = first[own[at]], first[own[at] + 1]
            return np.asarray(by[a + (self.random.random(len(at)) * (b - a)).astype(np.int64)])

        return self._drawn(rows.user, draw, forbidden)

    def _drawn(self, user: Int64, draw: Callable[[Int64], Int64], forbidden: Int64) -> Int64:
        """[N] what `draw` gives for the rows asked for, again where the user has the item."""
        out = np.full(len(user), -1, np.int64)
        left = np.arange(len(user))
        for _ in range(_DRAWS):
            found = draw(left)
            taken = np.isin(user[left] * self.data.num_items + found, forbidden)
            out[left[~taken]] = found[~taken]
            left = left[taken]
        return out


def _damaged(view: Interactions, users: Mask | None, config: CTRConfig) -> Interactions:
    """The view with the histories of `users` [U] (None: all) damaged, to see what codes stand.

    drop:P leaves out each event with probability P (one stays), noise:P puts a drawn event's item
    in its place, shuffle reorders.
    """
    if not config.damage:
        return view
    what, _, amount = config.damage.partition(":")
    random = np.random.default_rng(config.split_seed + 13)
    hurt = np.ones(view.num_events, bool) if users is None else users[view.users_of_events()]
    if what == "drop":
        gone = hurt & (random.random(view.num_events) < float(amount))
        gone[view.offsets[:-1][view.history_lengths > 0]] = False
        return view.select_events(~gone)
    if what == "noise":
        item = view.item_index.copy()
        swap = hurt & (random.random(view.num_events) < float(amount))
        item[swap] = random.choice(view.item_index, int(swap.sum()))
        return replace(view, item_index=item)
    key = np.where(hurt, random.random(view.num_events), _places(view) / 1e9)
    order = np.lexsort((key, view.users_of_events()))
    return replace(
        view,
        item_index=view.item_index[order],
        rating=None if view.rating is None else view.rating[order],
    )

"""Who trains, who is tested, and which events a profile may be read from.

Every row (an event with a label) names the *view* that its user's code comes from, and a view holds
no event that the row must not know:

    new-users   one view, each user's first n events. Rows are the later events; new users, drawn by
                key, have no row in CTR training and no part in learning codes.
    cold, warm  each user's history is cut in time: training part, then test rows. Test rows read
                the view of the whole training part. A training row's own label must not reach its
                code, else the recommender learns to trust codes that know the answer: so rows at
                even places of the training part read the view of the odd places, and the reverse.
                A drawn share of the users is cut to their first five events, so that there are cold
                users in every log.

Nothing that is learned or inferred reads a test row. `Task.learn` holds the histories from which
LM, codebooks and cluster centres are learned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from userip_fast.ctr.config import CTRConfig, threshold
from userip_fast.data import Interactions, split_by_time
from userip_fast.errors import DataError
from userip_fast.keys import hash_keys, seeded
from userip_fast.packing import Int64

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """N labelled rows.

    Attributes:
        user, item: [N] int64, rows of the task's users and items.
        view: [N] int64, which view the user's code comes from.
        label: [N] float32, 0 or 1.
    """

    user: Int64
    item: Int64
    view: Int64
    label: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: NDArray[np.integer] | Mask) -> Rows:
        return Rows(self.user[index], self.item[index], self.view[index], self.label[index])


@dataclass(frozen=True)
class Task:
    """One protocol on one log.

    Attributes:
        data: All users that take part; `Rows.user` and `Rows.item` are rows of it.
        learn: Histories to learn from.
        views: Histories to infer profiles from.
        train, valid, test: Rows; `valid` only stops training early.
        label: What 1 means, in words.
        user_ids: Whether the recommender has a column of user ids.
    """

    data: Interactions
    learn: Interactions
    views: tuple[Interactions, ...]
    train: Rows
    valid: Rows
    test: Rows
    label: str
    user_ids: bool


def make_task(data: Interactions, config: CTRConfig) -> Task:
    """Splits a log by the config's protocol.

    Raises:
        DataError: No user has events enough, or a side is left without rows or with one label.
    """
    if config.protocol == "new-users":
        task = _new_users(data, config)
    else:
        task = _cold_or_warm(data, config)
    for name in ("train", "valid", "test"):
        labels = getattr(task, name).label
        if not len(labels) or labels.min() == labels.max():
            raise DataError(
                f"protocol {config.protocol}: the {name} rows ({len(labels):,}) do not have both "
                f"labels ({task.label}); take more users, another label or another protocol"
            )
    return task


def _new_users(data: Interactions, config: CTRConfig) -> Task:
    n = config.first
    learn_from = data
    if config.period == "earlier":
        learn_from, data = split_by_time(data, 0.5)
    # Learning does not depend on n: one model serves all n.
    learn_from = learn_from.select_users(np.flatnonzero(learn_from.history_lengths > 3))
    learn = learn_from.select_users(np.flatnonzero(~_drawn(learn_from, config)))
    learn = learn.head_users(round(config.max_users * (1 - config.new_fraction)) or 1)
    data = data.select_users(np.flatnonzero(data.history_lengths > n))
    if not data.num_users:
        raise DataError(f"protocol new-users: no user has more than first={n} events")
    data = data.head_users(config.max_users)
    new = _drawn(data, config)
    place = _places(data)
    user = data.users_of_events()
    row = (place >= n) & (place < n + config.rows_per_user)
    label, rows = _labelled(data, learn, row & ~new[user], row & new[user], config)
    train, test = rows
    valid = (seeded(hash_keys(data.user_keys), config.split_seed + 7) % np.uint64(10)) == 0
    held = valid[train.user]
    view = _damaged(data.first_events(n), new, config)
    return Task(data, learn, (view,), train.take(~held), train.take(held), test, label, False)


def _cold_or_warm(data: Interactions, config: CTRConfig) -> Task:
    if config.period != "same":
        raise DataError("period=earlier goes with protocol new-users")
    data = data.select_users(np.flatnonzero(data.history_lengths > 1))
    if not data.num_users:
        raise DataError(f"protocol {config.protocol}: no user has more than one event")
    data = data.head_users(config.max_users)
    lengths = data.history_lengths
    last = np.maximum(1, np.ceil(lengths * config.last_fraction)).astype(np.int64)
    trained = np.where(
        _drawn(data, config), np.minimum(config.cold_rows, lengths - last), lengths - last
    )
    place, user = _places(data), data.users_of_events()
    history = place < trained[user]
    recent = place >= trained[user] - config.rows_per_user
    if config.protocol == "cold":
        tested = trained <= config.cold_rows
    else:
        tested = trained >= config.warm_rows
    test = ~history & (place < trained[user] + config.rows_per_user) & tested[user]
    learn = data.select_events(history)
    label, rows = _labelled(data, learn, history & recent, test, config)
    train, test_rows = rows
    odd = place % 2 == 1
    views = (
        data.select_events(history & odd),  # for training rows at even places
        data.select_events(history & ~odd),
        _damaged(data.select_events(history), None, config),
    )
    train = replace(train, view=(train.view % 2).astype(np.int64))
    test_rows = replace(test_rows, view=np.full(len(test_rows), 2, np.int64))
    random = np.random.default_rng(config.split_seed + 7)
    held = random.random(len(train)) < 0.1
    return Task(
        data, learn, views, train.take(~held), train.take(held), test_rows, label,
        config.protocol == "warm",
    )  # fmt: skip


def _drawn(data: Interactions, config: CTRConfig) -> Mask:
    """[U] users that are new (or cut short): by key and seed, so the same in any selection."""
    bits = seeded(hash_keys(data.user_keys), config.split_seed)
    return np.asarray(bits < np.uint64(int(config.new_fraction * 2.0**64)))


def _places(data: Interactions) -> Int64:
    """[E] how many events of the same user come before."""
    return np.asarray(np.arange(data.num_events) - data.offsets[:-1][data.users_of_events()])


def _labelled(
    data: Interactions, learn: Interactions, train: Mask, test: Mask, config: CTRConfig
) -> tuple[str, tuple[Rows, Rows]]:
    """Rows of the masked events [E]; `view` holds the place of the event, for `_cold_or_warm`."""
    user, place = data.users_of_events(), _places(data)
    new_users = config.protocol == "new-users"
    if data.rating is not None:
        if config.label is not None:
            q = threshold(config.label)
        else:
            assert learn.rating is not None
            known = np.unique(learn.rating)
            above = known[known > np.median(learn.rating)]
            q = float(above[0] if len(above) else known[-1])
        hit = (data.rating >= q).astype(np.float32)
        both = []
        for mask in (train, test):
            view = np.zeros(int(mask.sum()), np.int64) if new_users else place[mask]
            both.append(Rows(user[mask], data.item_index[mask].astype(np.int64), view, hit[mask]))
        return f"rating>={q:g}", (both[0], both[1])
    if config.label is not None:
        raise DataError(f"label={config.label!r} needs ratings, and the data has none that vary")
    # Popularity as training knows it; one more, so that an item seen only in tests is not always 1.
    occurs = np.bincount(data.item_index, minlength=data.num_items) > 0
    seen = np.bincount(data.item_index[train], minlength=data.num_items)
    cumulative = np.cumsum(np.where(occurs, seen + 1.0, 0.0) ** 0.75)
    pairs = user * data.num_items + data.item_index
    random = np.random.default_rng(config.split_seed + 11)
    out = []
    for mask in (train, test):
        # A training row's negatives may be items of the test: the future is not known there.
        forbidden = np.unique(pairs if mask is test else pairs[~test])
        count = int(mask.sum())
        item = np.empty((count, 1 + config.negatives), np.int64)
        item[:, 0] = data.item_index[mask]
        owner = np.repeat(user[mask], config.negatives)
        drawn = np.full(count * config.negatives, -1, np.int64)
        left = np.arange(len(drawn))
        for _ in range(16):
            point = random.random(len(left)) * cumulative[-1]
            draw = np.minimum(np.searchsorted(cumulative, point, side="right"), data.num_items - 1)
            taken = np.isin(owner[left] * data.num_items + draw, forbidden)
            drawn[left[~taken]] = draw[~taken]
            left = left[taken]
        item[:, 1:] = drawn.reshape(count, config.negatives)
        hit = np.zeros(item.shape, np.float32)
        hit[:, 0] = 1
        rows = Rows(
            np.repeat(user[mask], 1 + config.negatives),
            item.ravel(),
            np.repeat(np.zeros(count, np.int64) if new_users else place[mask], item.shape[1]),
            hit.ravel(),
        )
        out.append(rows.take(rows.item >= 0))
    return f"bought, against {config.negatives} sampled items", (out[0], out[1])


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

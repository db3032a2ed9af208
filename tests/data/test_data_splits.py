"""Splits: complete, disjoint, and nothing of the future in the past."""

import datetime as dt
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import userip_fast as uf
from userip_fast.core.errors import DataError
from userip_fast.data import split_by_time, split_last, split_users

ITEMS = pa.table({"item_id": range(50), "title": [f"t{i}" for i in range(50)]})


def make(seed=0, users=60, events=900, moments=200, time="timestamp", rows=None):
    rng = np.random.default_rng(seed)
    table = pa.table(
        {
            "user_id": rng.integers(0, users, events),
            "item_id": rng.integers(0, 50, events),
            "timestamp": rng.integers(0, moments, events),
        }
    )
    return uf.read_interactions(table if rows is None else table.take(rows), ITEMS, time=time)


def rows(data):
    """Multiset of (user, item, time)."""
    users = data.user_keys.take(pa.array(data.users_of_events())).to_pylist()
    time = data.time.tolist() if data.time is not None else [0] * data.num_events
    return sorted(zip(users, data.item_index.tolist(), time, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(2, 300))
def test_split_by_time_is_complete_and_never_leaks(at, moments):
    data = make(moments=moments)
    if data.time.min() == np.sort(data.time)[math.ceil(at * data.num_events)]:
        with pytest.raises(DataError, match="leaves 0 events before"):
            split_by_time(data, at)
        return
    past, future = split_by_time(data, at)
    assert past.time.max() < future.time.min()  # so a shared time is wholly on one side
    assert sorted(rows(past) + rows(future)) == rows(data)
    assert past.num_events <= at * data.num_events + 1
    for part in (past, future):
        assert (part.history_lengths > 0).all()
        for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True):
            assert (np.diff(part.time[a:b]) >= 0).all()


def test_split_at_a_moment():
    data = make()
    past, future = split_by_time(data, 100)
    assert past.time.max() < 100_000_000 <= future.time.min()
    moment = dt.datetime(1970, 1, 1, 0, 1, 40, tzinfo=dt.UTC)
    for at in (moment, moment.replace(tzinfo=None), 100.0):
        assert rows(split_by_time(data, at)[0]) == rows(past)


@pytest.mark.parametrize("at", [0, 1e9, -5, dt.datetime(1960, 1, 1)])
def test_split_with_an_empty_side_is_refused(at):
    with pytest.raises(DataError, match=r"leaves .* events before and .* after"):
        split_by_time(make(), at)


def test_split_by_time_needs_time_and_a_moment():
    with pytest.raises(DataError, match="no time column"):
        split_by_time(make(time=None), 0.5)
    with pytest.raises(DataError, match="fraction, seconds or a datetime"):
        split_by_time(make(), float("nan"))


@pytest.mark.parametrize("n", [1, 3, 15])
def test_split_last(n):
    data = make()
    history, last = split_last(data, n)
    assert sorted(rows(history) + rows(last)) == rows(data)
    assert history.num_users == data.num_users  # nobody is left without a history
    assert set(last.history_lengths.tolist()) == {n}
    place = history.user_index(last.user_keys)
    assert (history.time[history.offsets[place + 1] - 1] <= last.time[last.offsets[:-1]]).all()
    whole = set(data.user_keys.to_pylist()) - set(last.user_keys.to_pylist())
    short = data.user_keys.filter(pa.array(data.history_lengths <= n)).to_pylist()
    assert whole == set(short)


def test_split_last_refusals():
    with pytest.raises(DataError, match="no event is a user's last"):
        split_last(make(time=None))
    with pytest.raises(DataError, match="no user has more than n=999"):
        split_last(make(), 999)
    with pytest.raises(DataError, match="n must be at least 1"):
        split_last(make(), 0)


def test_split_users_depends_on_key_and_seed_alone():
    data = make(users=400, events=4000)
    warm, new = split_users(data, 0.25, seed=3)
    assert sorted(rows(warm) + rows(new)) == rows(data)
    assert not set(warm.user_keys.to_pylist()) & set(new.user_keys.to_pylist())
    assert 0.15 < new.num_users / data.num_users < 0.35

    part = make(users=400, events=4000, rows=np.random.default_rng(5).permutation(4000)[:500])
    both = set(part.user_keys.to_pylist())
    assert set(split_users(part, 0.25, seed=3)[1].user_keys.to_pylist()) == both & set(
        new.user_keys.to_pylist()
    )
    assert split_users(data, 0.25, seed=4)[1].user_keys != new.user_keys
    # a larger fraction only adds users
    more = split_users(data, 0.5, seed=3)[1]
    assert set(new.user_keys.to_pylist()) < set(more.user_keys.to_pylist())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_split_users_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(DataError, match=r"fraction must be in \(0, 1\)"):
        split_users(make(), fraction)


def test_split_users_refuses_an_empty_side():
    with pytest.raises(DataError, match="leaves a side empty"):
        split_users(make(users=1, events=5), 0.5)

"""Splits that never leak: by time, by a user's last events, by user."""

from __future__ import annotations

import datetime as dt
import math

import numpy as np

from userip_fast.core.errors import DataError
from userip_fast.core.keys import hash_keys, seeded
from userip_fast.data.interactions import Interactions


def split_by_time(data: Interactions, at: float | dt.datetime) -> tuple[Interactions, Interactions]:
    """Events before a moment, and from it on.

    Args:
        data: In time order.
        at: A fraction in (0, 1): that share of the events is past, or less where events share the
            time of the cut, for these all go to the future. Or the moment itself: seconds since
            1970, or a datetime (UTC if it names no zone).

    Returns:
        (past, future), users without an event on a side left out there.

    Raises:
        DataError: The data has no times, or a side would be empty.
    """
    time = data.time
    if time is None or not data.ordered:
        raise DataError("split_by_time: the data has no time column; read it with time=...")
    if isinstance(at, dt.datetime):
        moment = at if at.tzinfo else at.replace(tzinfo=dt.UTC)
        cut = (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)
    elif 0 < at < 1:
        cut = int(np.sort(time)[min(math.ceil(at * len(time)), len(time) - 1)])
    elif math.isfinite(at):
        cut = round(at * 1_000_000)
    else:
        raise DataError(f"split_by_time: at must be a fraction, seconds or a datetime, got {at}")
    past = time < cut
    if past.all() or not past.any():
        raise DataError(
            f"split_by_time: at={at} leaves {past.sum():,} events before "
            f"and {(~past).sum():,} after"
        )
    return data.select_events(past), data.select_events(~past)


def split_last(data: Interactions, n: int = 1) -> tuple[Interactions, Interactions]:
    """All but each user's last `n` events, and those.

    Users with `n` events or fewer have no history to predict from: they stay in the first part
    whole. Events of one user that share a time are told apart by file order.

    Raises:
        DataError: The data is not in time order, or no user has more than `n` events.
    """
    if not data.ordered:
        raise DataError("split_last: the data has no time column, so no event is a user's last")
    if n < 1:
        raise DataError(f"split_last: n must be at least 1, got {n}")
    user = data.users_of_events()
    left = data.offsets[user + 1] - np.arange(data.num_events)  # 1 for a user's last event
    last = (left <= n) & (data.history_lengths[user] > n)
    if not last.any():
        raise DataError(f"split_last: no user has more than n={n} events")
    return data.select_events(~last), data.select_events(last)


def split_users(
    data: Interactions, fraction: float, seed: int = 0
) -> tuple[Interactions, Interactions]:
    """Warm users, and about `fraction` of all as new ones.

    A user's side depends on the key and the seed alone.

    Raises:
        DataError: `fraction` is not in (0, 1), or a side would be empty.
    """
    if not 0 < fraction < 1:
        raise DataError(f"split_users: fraction must be in (0, 1), got {fraction}")
    new = seeded(hash_keys(data.user_keys), seed) < np.uint64(int(fraction * 2.0**64))
    if new.all() or not new.any():
        raise DataError(
            f"split_users: fraction={fraction} of {data.num_users} users leaves a side empty"
        )
    return data.select_users(np.flatnonzero(~new)), data.select_users(np.flatnonzero(new))

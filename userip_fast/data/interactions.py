"""`Interactions`: the histories of users, checked, in one fixed order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.errors import DataError, MismatchError
from userip_fast.core.keys import canonical_keys
from userip_fast.data.arrow import to_numpy
from userip_fast.data.report import BadRows


@dataclass(frozen=True)
class ReadAs:
    """What a log was read with, for `read_interactions` to read others alike.

    A fit keeps it in its settings (`DataConfig` has the same names), however it was called.
    """

    user: str
    item: str
    rating: str | None
    time: str | None
    text: str
    filter: str | None
    min_history: int


@dataclass(frozen=True)
class Interactions:
    """Histories of U users over I items, E events in all, stored flat (CSR).

    User u's events are `offsets[u]:offsets[u + 1]` of the event arrays. Users are in the order of
    `userip_fast.core.keys.key_order`, so a user's place depends on the keys alone, never on the
    file.

    Attributes:
        user_keys: [U] int64 or large_string.
        item_keys: [I] int64 or large_string.
        item_text: [I] large_string, never empty.
        items: [I] rows, the item columns as read, row by row with `item_keys`.
        offsets: [U + 1] int64.
        item_index: [E] int32, rows of `item_keys`.
        rating: [E] float32, or None without ratings.
        time: [E] int64 microseconds since 1970, ascending within a user, or None without times.
        ordered: Whether the events of a user are in time order. If not, they are in a seeded fixed
            order, and nothing that needs time ("earlier", "later") may be asked.
        constant_rating: The value of a rating column that never varies, and so counts as no rating
            (`rating` is None); a model whose scale was fitted elsewhere can still read it.
        report: What reading dropped.
        read_as: The arguments it was read with; None for data made otherwise.
    """

    user_keys: pa.Array
    item_keys: pa.Array
    item_text: pa.Array
    items: pa.Table
    offsets: NDArray[np.int64]
    item_index: NDArray[np.int32]
    rating: NDArray[np.float32] | None = None
    time: NDArray[np.int64] | None = None
    ordered: bool = False
    constant_rating: float | None = None
    report: BadRows = field(default_factory=BadRows)
    read_as: ReadAs | None = None

    @property
    def num_users(self) -> int:
        return len(self.user_keys)

    @property
    def num_items(self) -> int:
        return len(self.item_keys)

    @property
    def num_events(self) -> int:
        return len(self.item_index)

    @property
    def history_lengths(self) -> NDArray[np.int64]:
        """[U] events per user."""
        return np.diff(self.offsets)

    @property
    def rating_note(self) -> str | None:
        """Why a rating column was not used, or None."""
        if self.constant_rating is None:
            return None
        return f"every rating is {self.constant_rating:g}: a constant rating counts as no rating"

    def __repr__(self) -> str:
        traits = [
            "rated" if self.rating is not None else "unrated",
            "time-ordered" if self.ordered else "in a seeded fixed order",
        ]
        return (
            f"Interactions({self.num_users:,} users, {self.num_items:,} items, "
            f"{self.num_events:,} events, {', '.join(traits)})"
        )

    def users_of_events(self) -> NDArray[np.int64]:
        """[E] the row of the user of each event."""
        return np.repeat(np.arange(self.num_users), self.history_lengths)

    def user_index(self, keys: Any) -> NDArray[np.int64]:
        """Rows of users, -1 for a key that is not there.

        Args:
            keys: [n] keys of the same kind (integers or strings) as `user_keys`.

        Raises:
            MismatchError: The keys are of the other kind.
        """
        wanted = canonical_keys(keys)
        if len(wanted) and wanted.type != self.user_keys.type:
            raise MismatchError(
                f"keys are {wanted.type}, the users of this data are {self.user_keys.type}"
            )
        found = pc.index_in(wanted.cast(self.user_keys.type), value_set=self.user_keys)
        return to_numpy(pc.fill_null(found, -1)).astype(np.int64)

    def select_users(self, index: NDArray[np.integer[Any]]) -> Interactions:
        """Only the users at rows `index` (any order; kept in this data's order), same items.

        Raises:
            DataError: A row is out of range or given twice.
        """
        rows = np.sort(np.asarray(index, np.int64))
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.num_users):
            raise DataError(
                f"select_users: rows must be in [0, {self.num_users}), got {rows[0]} to {rows[-1]}"
            )
        if (rows[1:] == rows[:-1]).any():
            raise DataError("select_users: a row is given twice")
        return self._take(rows, self.offsets[rows], self.offsets[rows + 1])

    def head_users(self, n: int) -> Interactions:
        """The first `n` users in hash order: a sample that does not depend on the file."""
        return self.select_users(np.arange(min(_natural("head_users", n), self.num_users)))

    def users(self, start: int, stop: int) -> Interactions:
        """Users `start:stop`, without a copy."""
        offsets = self.offsets[start : stop + 1]
        here = slice(int(offsets[0]), int(offsets[-1]))
        return replace(
            self,
            user_keys=self.user_keys.slice(start, stop - start),
            offsets=offsets - offsets[0],
            item_index=self.item_index[here],
            rating=None if self.rating is None else self.rating[here],
            time=None if self.time is None else self.time[here],
        )

    @staticmethod
    def concat(parts: list[Interactions]) -> Interactions:
        """Parts of the same data, users one after another as they come."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([p.history_lengths for p in parts])
        ratings = [p.rating for p in parts if p.rating is not None]
        times = [p.time for p in parts if p.time is not None]
        return replace(
            parts[0],
            user_keys=pa.concat_arrays([p.user_keys for p in parts]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            item_index=np.concatenate([p.item_index for p in parts]),
            rating=np.concatenate(ratings) if ratings else None,
            time=np.concatenate(times) if times else None,
        )

    @property
    def rated(self) -> bool:
        """Whether there are ratings that vary."""
        return self.rating is not None

    def rating_counts(self) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
        """Distinct ratings, ascending, and how often each occurs; None without ratings."""
        if self.rating is None:
            return None
        values, counts = np.unique(self.rating.astype(np.float64), return_counts=True)
        return values, counts

    def item_counts(self) -> NDArray[np.int64]:
        """[I] events of each item."""
        return np.bincount(self.item_index, minlength=self.num_items)

    def first_events(self, n: int) -> Interactions:
        """At most the first `n` events of every user."""
        keep = np.minimum(self.history_lengths, _natural("first_events", n))
        return self._take(None, self.offsets[:-1], self.offsets[:-1] + keep)

    def last_events(self, n: int) -> Interactions:
        """At most the last `n` events of every user."""
        keep = np.minimum(self.history_lengths, _natural("last_events", n))
        return self._take(None, self.offsets[1:] - keep, self.offsets[1:])

    def select_events(self, mask: NDArray[np.bool_]) -> Interactions:
        """Only the events where `mask` [E] is True; users left without any are dropped."""
        kept = np.concatenate([[0], np.cumsum(mask)])[self.offsets]
        users = np.flatnonzero(np.diff(kept))
        return self._pick(users, np.append(0, kept[users + 1]), np.flatnonzero(mask))

    def _take(
        self, users: NDArray[np.int64] | None, start: NDArray[np.int64], stop: NDArray[np.int64]
    ) -> Interactions:
        """Events `start:stop` of each of `users` (None: all)."""
        offsets = np.concatenate([[0], np.cumsum(stop - start)])
        events = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], stop - start)
        return self._pick(users, offsets, events)

    def _pick(
        self, users: NDArray[np.int64] | None, offsets: NDArray[np.int64], events: NDArray[np.int64]
    ) -> Interactions:
        return replace(
            self,
            user_keys=self.user_keys if users is None else self.user_keys.take(pa.array(users)),
            offsets=offsets.astype(np.int64),
            item_index=self.item_index[events],
            rating=None if self.rating is None else self.rating[events],
            time=None if self.time is None else self.time[events],
        )


def _natural(name: str, n: int) -> int:
    if n < 1:
        raise DataError(f"{name}: n must be at least 1, got {n}")
    return n

"""Users packed one after another without padding, cut to a token budget.

A user's rows are the S soft rows (field by field), then the behaviour rows. The prefix (BOS and the
field names) is not in the pack: its keys and values are computed once per LM. A long history is cut
into several *sequences*, each behind its own copy of the user's soft rows: they share theta, and
the user's NLL is the sum over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.prompts.layout import Int32, Layout, TokenTable

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Behaviour:
    """Behaviour tokens of U users, as a CSR over `offsets` [U + 1].

    Attributes:
        ids, segment, position: [N] int32; segment and position as `layout.py` defines them.
        weight: [N] float32, loss weight of each token given what is before it.
        offsets: [U + 1] int64.
        events: [U] int64, events that fitted; 0 for a user whose history truncates to nothing.
        cuts: [N'] int64 ascending, tokens inside a user's history that start another sequence of
            it.
    """

    ids: Int32
    segment: Int32
    position: Int32
    weight: npt.NDArray[np.float32]
    offsets: Int64
    events: Int64
    cuts: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64:
        return np.diff(self.offsets)

    @property
    def total_weight(self) -> npt.NDArray[np.float64]:
        """[U] sum of loss weights, to turn a user's NLL into nats per weight."""
        running = np.concatenate([[0.0], np.cumsum(self.weight, dtype=np.float64)])
        return np.asarray(running[self.offsets[1:]] - running[self.offsets[:-1]])

    @cached_property
    def sequences(self) -> tuple[Int64, Int64]:
        """First token of each of C sequences [C + 1], first sequence of each user [U + 1]."""
        first_token = np.sort(np.concatenate([self.offsets, self.cuts]))
        before = np.searchsorted(self.cuts, self.offsets)
        return first_token, np.arange(self.num_users + 1) + before

    def pack_rows(self, num_soft: int) -> Int64:
        """[U] rows that each user takes in a pack: its tokens, and soft rows per sequence."""
        return np.asarray(self.lengths + num_soft * np.diff(self.sequences[1]))

    def select(self, users: Int64) -> Behaviour:
        """The behaviour of some users, in the order given."""
        rows = ragged_arange(self.offsets[users], self.lengths[users])
        offsets = _offsets(self.lengths[users])
        first, of_user = self.sequences
        cuts = ragged_arange(of_user[users] + 1, np.diff(of_user)[users] - 1)
        moved = np.repeat(offsets[:-1] - self.offsets[users], np.diff(of_user)[users] - 1)
        return self._of(rows, offsets, self.events[users], first[cuts] + moved)

    def by_sequence(self) -> tuple[Behaviour, Int64]:
        """Every sequence as a user of its own (`events` are its user's), and [C] whose it is."""
        first, of_user = self.sequences
        user = np.repeat(np.arange(self.num_users), np.diff(of_user))
        return replace(self, offsets=first, events=self.events[user], cuts=self.cuts[:0]), user

    def head(self, tokens: Int64) -> Behaviour:
        """The first `tokens` [U] behaviour tokens of each user (`events` stay those of all)."""
        rows = ragged_arange(self.offsets[:-1], tokens)
        offsets = _offsets(tokens)
        user = np.searchsorted(self.offsets, self.cuts, side="right") - 1
        cuts = self.cuts - self.offsets[user]
        kept = cuts < tokens[user]
        return self._of(rows, offsets, self.events, (cuts + offsets[user])[kept])

    def _of(self, rows: Int64, offsets: Int64, events: Int64, cuts: Int64) -> Behaviour:
        """Some rows, as those of other users."""
        return replace(
            self,
            ids=self.ids[rows],
            segment=self.segment[rows],
            position=self.position[rows],
            weight=self.weight[rows],
            offsets=offsets,
            events=events,
            cuts=cuts,
        )


def ragged_arange(starts: Int64, lengths: Int64) -> Int64:
    """Concatenation of `arange(start, start + length)`."""
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return np.asarray(np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) + shift)


def _offsets(lengths: Int64) -> Int64:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def build_behaviour(
    table: TokenTable,
    kinds: Int64,
    offsets: Int64,
    layout: Layout,
    *,
    max_tokens: int,
    chunk_tokens: int | None = None,
    context: Literal["sequence", "independent"],
    text_weight: float,
    feedback_weight: float,
) -> Behaviour:
    """Behaviour tokens of users from their events.

    The latest whole events whose tokens fit into `max_tokens` are kept. A history of more than
    `chunk_tokens` is cut between events, the oldest sequence filled first; an event that is longer
    than that is too long to be told, and with it what lies before it.

    Args:
        table: Tokens of each event kind.
        kinds: [E] event kinds of all users, oldest first within a user.
        offsets: [U + 1], events of user u are `kinds[offsets[u]:offsets[u + 1]]`.
        layout: Where behaviour starts, and the number of fields.
        max_tokens: Behaviour rows per user, at most.
        chunk_tokens: Behaviour rows per sequence, at most; None for one sequence per user.
        context: "sequence", or "independent" events (positions restart, own segments).
        text_weight, feedback_weight: Loss weight of text tokens and of feedback tokens. An event's
        first
            token (of the separator) never carries loss: nothing of the user precedes it.
    """
    chunk_tokens = min(max_tokens, chunk_tokens or max_tokens)
    size = np.diff(table.offsets)[kinds]
    kept, user = told_events(size, offsets, max_tokens, chunk_tokens, context == "independent")
    kinds, user, size = kinds[kept], user[kept], size[kept]
    events = np.bincount(user, minlength=len(offsets) - 1).astype(np.int64)

    tokens = ragged_arange(table.offsets[kinds], size)
    within_event = ragged_arange(np.zeros(len(size), np.int64), size)
    lengths = np.zeros(len(offsets) - 1, np.int64)
    np.add.at(lengths, user, size)
    out = _offsets(lengths)
    cuts = _cuts(size, events, lengths, chunk_tokens)
    if context == "sequence":
        position = ragged_arange(
            np.zeros(len(out) + len(cuts) - 1, np.int64),
            np.diff(np.sort(np.concatenate([out, cuts]))),
        )
        segment = np.full(len(tokens), layout.num_fields, np.int32)
    else:
        position = within_event
        event = ragged_arange(np.zeros(len(events), np.int64), events)
        segment = (layout.num_fields + np.repeat(event, size)).astype(np.int32)
    weight = np.where(table.is_feedback[tokens], feedback_weight, text_weight)
    weight[within_event == 0] = 0.0
    return Behaviour(
        table.ids[tokens],
        segment,
        (layout.behaviour_start + position).astype(np.int32),
        weight.astype(np.float32),
        out,
        events,
        cuts,
    )


def told_events(
    size: Int64, offsets: Int64, max_tokens: int, chunk_tokens: int, apart: bool = False
) -> tuple[npt.NDArray[np.bool_], Int64]:
    """[E] whether an event is told, and its user, from its number of tokens; see
    `build_behaviour`.

    Args:
        apart: Whether events are independent: one that is too long is then left out, and does not
            hide what came before it.
    """
    # Tokens from an event to the end of its user's history; those within the budget are a suffix.
    fits = size <= chunk_tokens
    total = np.concatenate([[0], np.cumsum(np.where(fits, size, 0 if apart else max_tokens + 1))])
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return fits & (total[offsets[1:]][user] - total[:-1] <= max_tokens), user


def _cuts(size: Int64, events: Int64, lengths: Int64, chunk_tokens: int) -> Int64:
    """Tokens where sequences start inside histories of more than `chunk_tokens`."""
    ends = np.cumsum(size)
    last_event, last_token = np.cumsum(events), np.cumsum(lengths)
    cuts: list[int] = []
    for user in np.flatnonzero(lengths > chunk_tokens):
        start, stop = int(last_token[user] - lengths[user]), int(last_token[user])
        own = ends[last_event[user] - events[user] : last_event[user]]
        while stop - start > chunk_tokens:
            start = int(own[np.searchsorted(own, start + chunk_tokens, side="right") - 1])
            cuts.append(start)
    return np.asarray(cuts, np.int64)


SLACK = -(2**31)
"""Plan entry of a row that belongs to nobody: its input is zero."""


@dataclass(frozen=True)
class Pack:
    """Some users' rows, ready for the LM. T rows, U users, C sequences, R loss rows, S soft rows.

    Attributes:
        users: [U] int64 (numpy), which users of the block these are.
        plan: [T] int32, >= 0 a vocabulary row, < 0 soft row -(plan + 1) of [U * S], `SLACK` for
        padding. segment, position: [T] int32. cu_seqlens: [C + 1] int32 row offsets; rows past the
        last are slack. loss_rows: [R] int64, rows whose output predicts a loss token. target: [R]
        int64; loss_weight: [R] float32. cu_rows: [U + 1] int64 offsets of users into the loss rows.
        sequence_user: [C] int64, ascending; a user with a long history has several sequences.
        distinct: Where several loss tokens are asked of one row: the rows [Q] int64, each once, and
        which of them is each token's [R] int64. `cu_rows` then counts other sums than users'.
    """

    users: Int64
    plan: Tensor
    segment: Tensor
    position: Tensor
    cu_seqlens: Tensor
    loss_rows: Tensor
    target: Tensor
    loss_weight: Tensor
    cu_rows: Tensor
    max_seqlen: int
    sequence_user: Tensor
    distinct: tuple[Tensor, Tensor] | None = None

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_tokens(self) -> int:
        return len(self.plan)


def make_pack(
    behaviour: Behaviour, users: Int64, layout: Layout, device: torch.device, pad_to: int = 1
) -> Pack:
    """Packs `users`; the row count is rounded up to a multiple of `pad_to` with slack rows."""
    soft = layout.num_soft
    first_token, of_user = behaviour.sequences
    count = np.diff(of_user)[users]
    sequence = ragged_arange(of_user[users], count)
    user = np.repeat(np.arange(len(users)), count)
    lengths = np.diff(first_token)[sequence]
    starts = _offsets(lengths + soft)
    rows = -(-int(starts[-1]) // pad_to) * pad_to
    plan = np.full(rows, SLACK, np.int32)
    segment = np.full(rows, -1, np.int32)
    position = np.zeros(rows, np.int32)

    soft_rows = (starts[:-1, None] + np.arange(soft)).ravel()
    plan[soft_rows] = (-1 - user[:, None] * soft - np.arange(soft)).ravel()
    segment[soft_rows] = np.tile(layout.soft_segment, len(sequence))
    position[soft_rows] = np.tile(layout.soft_position, len(sequence))

    source = ragged_arange(first_token[sequence], lengths)
    token_rows = ragged_arange(starts[:-1] + soft, lengths)
    plan[token_rows] = behaviour.ids[source]
    segment[token_rows] = behaviour.segment[source]
    position[token_rows] = behaviour.position[source]

    # A token with loss is predicted by the row before it, which is never a soft row: see
    # build_behaviour.
    has_loss = behaviour.weight[source] > 0
    loss_user = np.repeat(user, lengths)[has_loss]

    def to(x: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

    return Pack(
        users=users,
        plan=to(plan),
        segment=to(segment),
        position=to(position),
        cu_seqlens=to(starts.astype(np.int32)),
        loss_rows=to(token_rows[has_loss] - 1),
        target=to(behaviour.ids[source[has_loss]].astype(np.int64)),
        loss_weight=to(behaviour.weight[source[has_loss]]),
        cu_rows=to(_offsets(np.bincount(loss_user, minlength=len(users)).astype(np.int64))),
        max_seqlen=int(lengths.max(initial=0)) + soft,
        sequence_user=to(user),
    )


class PackStream:
    """Packs of the users in flight: who is done leaves, who waits enters, so packs stay full.

        while (pack := stream.next()) is not None:
            ...one step of every user of the pack...
            stream.leave(done)

    A pack holds at most `budget` rows, but at least one user: all sequences of a user share a pack,
    so a history longer than the budget gets one to itself. On a GPU every pack has exactly `budget`
    rows (slack at its end), so that shapes do not change from step to step; only the last packs,
    when nobody waits any more, and the overlong ones are rounded up to 128 rows instead.

    Args:
        behaviour, layout, device: As in `make_pack`.
        users: [U] users of `behaviour`, in the order in which they enter.
        budget: Rows of a pack; on a GPU rounded down to a multiple of 128.
    """

    def __init__(
        self,
        behaviour: Behaviour,
        users: Int64,
        layout: Layout,
        device: torch.device,
        budget: int,
    ) -> None:
        self.behaviour, self.layout, self.device = behaviour, layout, device
        self.multiple = 128 if device.type == "cuda" else 1
        self.budget = max(self.multiple, budget // self.multiple * self.multiple)
        self.rows = behaviour.pack_rows(layout.num_soft)
        self.users: Int64 = users[:0]
        self.waiting = users
        self._pack: Pack | None = None

    def next(self) -> Pack | None:
        """The pack of those in flight (the same object while nobody leaves); None at the end."""
        if self._pack is None:
            total = int(self.rows[self.users].sum())
            ends = total + np.cumsum(self.rows[self.waiting])
            enter = int(np.searchsorted(ends, self.budget, side="right"))
            if not total and not enter:
                enter = min(1, len(self.waiting))
            self.users = np.concatenate([self.users, self.waiting[:enter]])
            self.waiting = self.waiting[enter:]
            if not len(self.users):
                return None
            fixed = len(self.waiting) and self.rows[self.users].sum() <= self.budget
            multiple = self.budget if fixed and self.multiple > 1 else self.multiple
            self._pack = make_pack(self.behaviour, self.users, self.layout, self.device, multiple)
        return self._pack

    def leave(self, done: npt.NDArray[np.bool_]) -> None:
        """Users of the current pack that are done, [its users]."""
        if done.any():
            self.users, self._pack = self.users[~done], None


def iter_packs(
    behaviour: Behaviour, users: Int64, layout: Layout, device: torch.device, budget: int
) -> Iterator[Pack]:
    """Every user once, in order, in packs as `PackStream` cuts them."""
    stream = PackStream(behaviour, users, layout, device, budget)
    while (pack := stream.next()) is not None:
        yield pack
        stream.leave(np.ones(pack.num_users, np.bool_))

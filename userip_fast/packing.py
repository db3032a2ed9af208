"""Users packed one after another without padding, cut to a token budget.

A user's rows are the S soft rows (field by field), then the behaviour rows. The prefix (BOS and the
field names) is not in the pack: its keys and values are computed once per LM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.prompts import Int32, Layout, TokenTable

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Behaviour:
    """Behaviour tokens of U users, as a CSR over `offsets` [U + 1].

    Attributes:
        ids, segment, position: [N] int32; segment and position as `userip_fast.prompts` defines
        them. weight: [N] float32, loss weight of each token given what is before it. offsets: [U +
        1] int64. events: [U] int64, events that fitted; 0 for a user whose history truncates to
        nothing.
    """

    ids: Int32
    segment: Int32
    position: Int32
    weight: npt.NDArray[np.float32]
    offsets: Int64
    events: Int64

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

    def select(self, users: Int64) -> Behaviour:
        """The behaviour of some users, in the order given."""
        rows = ragged_arange(self.offsets[users], self.lengths[users])
        return Behaviour(
            self.ids[rows],
            self.segment[rows],
            self.position[rows],
            self.weight[rows],
            _offsets(self.lengths[users]),
            self.events[users],
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
    context: Literal["sequence", "independent"],
    text_weight: float,
    feedback_weight: float,
) -> Behaviour:
    """Behaviour tokens of users from their events.

    The latest whole events whose tokens fit into `max_tokens` are kept.

    Args:
        table: Tokens of each event kind.
        kinds: [E] event kinds of all users, oldest first within a user.
        offsets: [U + 1], events of user u are `kinds[offsets[u]:offsets[u + 1]]`.
        layout: Where behaviour starts, and the number of fields.
        max_tokens: Behaviour rows per user, at most.
        context: "sequence", or "independent" events (positions restart, own segments).
        text_weight, feedback_weight: Loss weight of text tokens and of feedback tokens. An event's
        first
            token (of the separator) never carries loss: nothing of the user precedes it.
    """
    size = np.diff(table.offsets)[kinds]
    # Tokens from an event to the end of its user's history; those within the budget are a suffix.
    total = np.concatenate([[0], np.cumsum(size)])
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    kept = total[offsets[1:]][user] - total[:-1] <= max_tokens
    kinds, user, size = kinds[kept], user[kept], size[kept]
    events = np.bincount(user, minlength=len(offsets) - 1).astype(np.int64)

    tokens = ragged_arange(table.offsets[kinds], size)
    within_event = ragged_arange(np.zeros(len(size), np.int64), size)
    lengths = np.zeros(len(offsets) - 1, np.int64)
    np.add.at(lengths, user, size)
    out = _offsets(lengths)
    if context == "sequence":
        position = ragged_arange(np.zeros(len(lengths), np.int64), lengths)
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
    )


SLACK = -(2**31)
"""Plan entry of a row that belongs to nobody: its input is zero."""


@dataclass(frozen=True)
class Pack:
    """Some users' rows, ready for the LM. T rows, U users, R loss rows, S soft rows per user.

    Attributes:
        users: [U] int64 (numpy), which users of the block these are.
        plan: [T] int32, >= 0 a vocabulary row, < 0 soft row -(plan + 1) of [U * S], `SLACK` for
        padding. segment, position: [T] int32. cu_seqlens: [U + 1] int32 row offsets; rows past the
        last are slack. loss_rows: [R] int64, rows whose output predicts a loss token. target: [R]
        int64; loss_weight: [R] float32. cu_rows: [U + 1] int64 offsets of users into the loss rows.
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
    lengths = behaviour.lengths[users]
    starts = _offsets(lengths + soft)
    rows = -(-int(starts[-1]) // pad_to) * pad_to
    plan = np.full(rows, SLACK, np.int32)
    segment = np.full(rows, -1, np.int32)
    position = np.zeros(rows, np.int32)

    soft_rows = (starts[:-1, None] + np.arange(soft)).ravel()
    plan[soft_rows] = -1 - np.arange(len(users) * soft)
    segment[soft_rows] = np.tile(layout.soft_segment, len(users))
    position[soft_rows] = np.tile(layout.soft_position, len(users))

    source = ragged_arange(behaviour.offsets[users], lengths)
    token_rows = ragged_arange(starts[:-1] + soft, lengths)
    plan[token_rows] = behaviour.ids[source]
    segment[token_rows] = behaviour.segment[source]
    position[token_rows] = behaviour.position[source]

    # A token with loss is predicted by the row before it, which is never a soft row: see
    # build_behaviour.
    has_loss = behaviour.weight[source] > 0
    user = np.repeat(np.arange(len(users)), lengths)[has_loss]

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
        cu_rows=to(_offsets(np.bincount(user, minlength=len(users)).astype(np.int64))),
        max_seqlen=int(lengths.max(initial=0)) + soft,
    )


def iter_packs(
    behaviour: Behaviour,
    users: Int64,
    layout: Layout,
    device: torch.device,
    budget: int,
    pad_to: int = 1,
) -> Iterator[Pack]:
    """Cuts `users`, in order, into packs of at most `budget` rows (one user at least)."""
    ends = np.cumsum(behaviour.lengths[users] + layout.num_soft)
    i = 0
    while i < len(users):
        base = ends[i - 1] if i else 0
        j = max(i + 1, int(np.searchsorted(ends, base + budget, side="right")))
        yield make_pack(behaviour, users[i:j], layout, device, pad_to)
        i = j

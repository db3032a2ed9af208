"""What the embedded LM is pre-trained on: prompts whose soft rows tell of a user's other events."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from userip_fast.lm.foldin import fold_in, kind_vectors
from userip_fast.prompts.behaviour import Told, judging
from userip_fast.prompts.layout import Layout
from userip_fast.prompts.packing import Behaviour, Int64

STEP_TOKENS = 2048
_PROMPT_TOKENS = 48  # of independent events asked for in one prompt: many users in each step
_UNTOLD = 0.15  # share of soft rows that tell nothing
_JUDGE = 0.1  # share of users, of whom EM takes its judges


@dataclass(frozen=True)
class Batch:
    """B prompts of up to T rows.

    Attributes:
        ids, position: [B, T] int64.
        mask: [B, 1, T, T] bool, what a row sees.
        told: [B, J, r] fp32, what is told of the user, field by field.
        words: [B, S] int64, tokens in the soft rows in its place; None where there are none.
        target: [B, T] int64, the token after each row, -100 where there is no loss.
        weight: [B, T] fp32, the E-step's weight of the target.
        event: [B, T] int64, the event that a target belongs to.
    """

    ids: Tensor
    position: Tensor
    mask: Tensor
    told: Tensor
    words: Tensor | None
    target: Tensor
    weight: Tensor
    event: Any


@dataclass(frozen=True)
class Data:
    """What there is to learn from.

    Attributes:
        event: [N] int64, the event of each token of `behaviour`.
        kind: [events] int64, its kind.
        kind_names: Text and word of each kind.
        vectors: [kinds, r] fp32.
        words: [U, S] int64, words that are known of each user, or None.
        prompts: [P + 1] int64, first token of each prompt, and where the last one ends.
        user: [P] int64, whose prompt it is.
        judges: [U] bool, users who are not learned from.
    """

    behaviour: Behaviour
    event: Int64
    kind: Int64
    kind_names: list[tuple[str, str]]
    vectors: Any
    words: Int64 | None
    prompts: Int64
    user: Int64
    judges: Any

    @property
    def choices(self) -> bool:
        """Whether text is all that is told of an event, so that who chooses it is the question."""
        return self.words is None and not any(word for _, word in self.kind_names)

    @classmethod
    def of(
        cls, behaviour: Behaviour, layout: Layout, told: Told, words: Int64 | None, seed: int
    ) -> Data:
        # An event begins where the one before it has carried its loss.
        event = np.cumsum(_starts_event(behaviour)) - 1
        prompts = _prompts(behaviour, layout, event)
        user = np.searchsorted(behaviour.offsets, prompts[:-1], side="right") - 1
        users = behaviour.num_users
        judges = judging(users, 0.0 if words is not None else _JUDGE)
        owner = np.repeat(np.arange(users), np.diff(told.offsets))
        learned = ~judges[owner]
        vectors = kind_vectors(owner[learned], told.kinds[learned], len(told.texts), seed)
        names = list(zip(told.texts, told.words or [""] * len(told.texts)))
        return cls(behaviour, event, told.kinds, names, vectors, words, prompts, user, judges)


class Batches:
    """Padded batches of prompts with the field mask, those of like length together.

    A prompt holds one sequence of a user; of independent events, which need no company, a few.
    Its soft rows tell of events that the prompt is not asked for: of the user's others, or where
    there are none of a part of its own, which then carries no loss. So the LM learns what a telling
    soft row predicts of other behaviour, not to copy.
    """

    def __init__(
        self, data: Data, layout: Layout, generator: Any, judging: bool = False, told: int = 0
    ) -> None:
        self.data, self.layout, self.generator = data, layout, generator
        self.head = layout.behaviour_start
        self.queue: list[Int64] = []
        self.judging, self.told = judging, told

    def next(self) -> Batch:
        """The next batch."""
        if not self.queue:
            self._shuffle()
        return self.batch(self.queue.pop())

    def batch(self, prompts: Int64) -> Batch:
        """A batch of these prompts."""
        data, layout, head = self.data, self.layout, self.head
        behaviour = data.behaviour
        lengths = np.diff(data.prompts)[prompts]
        shape = (len(prompts), head + int(lengths.max()))
        ids = np.zeros(shape, np.int64)
        segment = np.full(shape, -2, np.int32)
        position = np.zeros(shape, np.int64)
        target = np.full(shape, -100, np.int64)
        weight = np.zeros(shape, np.float32)
        event = np.zeros(shape, np.int64)
        told = np.zeros((len(prompts), layout.num_fields, data.vectors.shape[1]), np.float32)
        ids[:, layout.prefix_position] = layout.prefix_ids
        segment[:, layout.prefix_position] = layout.prefix_segment
        segment[:, layout.soft_position] = layout.soft_segment
        position[:, :head] = np.arange(head)
        for row, (prompt, n) in enumerate(zip(prompts.tolist(), lengths.tolist())):
            source = slice(data.prompts[prompt], data.prompts[prompt] + n)
            here = slice(head, head + n)
            ids[row, here] = behaviour.ids[source]
            segment[row, here] = behaviour.segment[source]
            position[row, here] = behaviour.position[source]
            asked = self._tell(prompt, told[row])
            asked = asked[1:] & (behaviour.segment[source][1:] == behaviour.segment[source][:-1])
            before = slice(head, head + n - 1)
            target[row, before][asked] = behaviour.ids[source][1:][asked]
            weight[row, before][asked] = behaviour.weight[source][1:][asked]
            event[row, before] = data.event[source][1:]
        column, line = segment[:, None, :], segment[:, :, None]
        fields = layout.num_fields
        sees = (line == column) | (column == -1)
        sees |= (line >= fields) & (column < fields) & (column >= 0)
        sees &= np.tri(shape[1], dtype=bool)
        sees |= np.eye(shape[1], dtype=bool)
        words = None if data.words is None else torch.from_numpy(data.words[data.user[prompts]])
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(position),
            torch.from_numpy(sees)[:, None],
            torch.from_numpy(told),
            words,
            torch.from_numpy(target),
            torch.from_numpy(weight),
            event,
        )

    def _tell(self, prompt: int, told: Any) -> Any:
        """Fills what is told [J, r] in a prompt; its tokens [n] that may carry loss."""
        data, random = self.data, self.generator
        start, stop = data.prompts[prompt], data.prompts[prompt + 1]
        asked = np.ones(stop - start, np.bool_)
        if data.words is not None:
            return asked
        user = data.user[prompt]
        first = int(data.event[data.behaviour.offsets[user]])
        last = int(data.event[data.behaviour.offsets[user + 1] - 1]) + 1
        own = data.event[start:stop]
        a, b = int(own[0]), int(own[-1]) + 1
        known = np.concatenate([np.arange(first, a), np.arange(b, last)])
        if not len(known):
            half = random.random(b - a) < 0.5
            known = np.arange(a, b)[half]
            asked = ~half[own - a]
        for j in range(len(told)):
            if not len(known) or (not self.told and random.random() < _UNTOLD):
                continue
            n = min(
                self.told or int(math.exp(random.random() * math.log(len(known) + 1))), len(known)
            )
            some = random.choice(known, n, replace=False) if n < len(known) else known
            told[j] = fold_in(data.vectors[data.kind[some]].sum(0)[None], np.asarray([n]))[0]
        return asked

    def _shuffle(self) -> None:
        """One pass over the prompts: shuffled, then by length within windows of ten batches."""
        data = self.data
        size = np.diff(data.prompts) + self.head
        there = (size > self.head + 1) & (data.judges[data.user] == self.judging)
        order = self.generator.permutation(np.flatnonzero(there))
        if len(order) == 0:
            if self.judging:
                return
            raise ValueError("the training users have no behaviour to pre-train the LM on")
        window = max(1, int(10 * STEP_TOKENS / size[order].mean()))
        for i in range(0, len(order), window):
            part = order[i : i + window]
            part = part[np.argsort(size[part], kind="stable")]
            batch: list[int] = []
            for prompt in part.tolist():
                if batch and (len(batch) + 1) * size[prompt] > STEP_TOKENS:
                    self.queue.append(np.asarray(batch))
                    batch = []
                batch.append(prompt)
            self.queue.append(np.asarray(batch))
        self.generator.shuffle(self.queue)


def _starts_event(behaviour: Behaviour) -> Any:
    """[N] bool: an event's first token never carries loss, and its last always does."""
    carries = behaviour.weight > 0
    starts = ~carries & np.concatenate([[True], carries[:-1]])
    starts[behaviour.offsets[:-1][behaviour.lengths > 0]] = True
    return starts


def _prompts(behaviour: Behaviour, layout: Layout, event: Int64) -> Int64:
    """First token of each prompt, and where the last one ends."""
    if behaviour.segment.max(initial=0) <= layout.num_fields:
        return behaviour.sequences[0]
    starts = np.flatnonzero(np.diff(event, prepend=-1))
    user = np.searchsorted(behaviour.offsets, starts, side="right") - 1
    part = (starts - behaviour.offsets[user]) // _PROMPT_TOKENS
    new = (np.diff(part, prepend=-1) != 0) | (np.diff(user, prepend=-1) != 0)
    return np.append(starts[new], len(behaviour.ids))

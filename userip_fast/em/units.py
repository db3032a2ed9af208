"""Behaviour in parts that do not see each other, each read once for all users who have it.

Given the soft rows, independent events are independent: a user's likelihood is the product over its
events, and the factor of an event is the same for everyone under the same codes. A log of millions
of users has few kinds of event (an item and how it was liked), so the LM reads kinds, not users;
what remains per user is a sum. A history told as one sequence is one part, and is not shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from userip_fast.prompts.layout import Layout
from userip_fast.prompts.packing import Behaviour, Int64, ragged_arange

_EXPANDED = 1 << 20  # (user, codes, unit) triples looked at together


@dataclass(frozen=True)
class Units:
    """The distinct parts of some users' behaviour.

    Attributes:
        behaviour: Of E units, each in the place of a user.
        offsets, unit: User u has units `unit[offsets[u]:offsets[u + 1]]`; [U + 1] and [N] int64.
        shared: Whether users are anything else than one unit each.
    """

    behaviour: Behaviour
    offsets: Int64
    unit: Int64
    shared: bool

    @classmethod
    def of(cls, behaviour: Behaviour, layout: Layout) -> Units:
        """Events as units where that leaves the LM fewer rows to read, else users."""
        users = np.arange(behaviour.num_users + 1)
        whole = cls(behaviour, users, users[:-1], False)
        if behaviour.segment.max(initial=0) <= layout.num_fields:
            return whole
        starts = np.flatnonzero(np.diff(behaviour.segment, prepend=-1))
        starts = np.union1d(starts, behaviour.offsets[:-1][behaviour.lengths > 0])
        parts = replace(
            behaviour,
            segment=np.full_like(behaviour.segment, layout.num_fields),
            offsets=np.append(starts, len(behaviour.ids)),
            events=np.ones(len(starts), np.int64),
            cuts=behaviour.cuts[:0],
        )
        number: dict[tuple[bytes, bytes], int] = {}
        unit = np.empty(len(starts), np.int64)
        first: list[int] = []
        for i, (a, b) in enumerate(zip(parts.offsets[:-1].tolist(), parts.offsets[1:].tolist())):
            told = parts.ids[a:b].tobytes(), parts.weight[a:b].tobytes()
            unit[i] = number.setdefault(told, len(number))
            if len(first) < len(number):
                first.append(i)
        distinct = parts.select(np.asarray(first, np.int64))
        soft = layout.num_soft
        if distinct.pack_rows(soft).sum() >= behaviour.pack_rows(soft).sum():
            return whole
        return cls(distinct, np.searchsorted(starts, behaviour.offsets), unit, True)

    def pairs(self, users: Tensor, codes: Tensor) -> Pairs:
        """What the LM has to read for `users` [N] under `codes` [N, J]."""
        return Pairs(self, users, codes)


class Pairs:
    """The M distinct pairs of a unit and codes within N pairs of a user and codes.

    Attributes:
        unit: [M] int64 (numpy), rows of `units.behaviour`.
        codes: [M, J] int64.
    """

    def __init__(self, units: Units, users: Tensor, codes: Tensor) -> None:
        self.units, self.users = units, users.numpy()
        if not units.shared:
            self.unit, self.codes = self.users, codes
            return
        combinations, self._combination = torch.unique(codes, dim=0, return_inverse=True)
        self._stride = len(combinations)
        found = [np.unique(keys) for _, keys, _ in self._expanded()]
        self._keys = np.unique(np.concatenate([*found, np.zeros(0, np.int64)]))
        self.unit, combination = np.divmod(self._keys, max(1, self._stride))
        self.codes = combinations[torch.from_numpy(combination)]

    def sums(self, values: Tensor) -> Tensor:
        """[N] fp64, for each user and codes the sum of `values` [M] over its units."""
        if not self.units.shared:
            return values.double()
        v = values.double().numpy()
        out = np.zeros(len(self.users))
        for here, keys, owner in self._expanded():
            out[here] = np.bincount(
                owner, v[np.searchsorted(self._keys, keys)], minlength=len(out[here])
            )
        return torch.from_numpy(out)

    def spread(self, weight: Tensor) -> Tensor:
        """[M] fp64, for each unit and codes the sum of `weight` [N] over those who have it."""
        if not self.units.shared:
            return weight.double()
        out = np.zeros(len(self._keys))
        for here, keys, owner in self._expanded():
            w = weight[here].double().numpy()[owner]
            out += np.bincount(np.searchsorted(self._keys, keys), w, minlength=len(out))
        return torch.from_numpy(out)

    def _expanded(self) -> Iterator[tuple[slice, Int64, Int64]]:
        """Some of the N at a time: which, the keys of their units, and whose each key is."""
        units, users = self.units, self.users
        count = np.diff(units.offsets)[users]
        ends = np.cumsum(count)
        start = 0
        while start < len(users):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + _EXPANDED, side="right")))
            n = count[start:stop]
            owner = np.repeat(np.arange(stop - start), n)
            unit = units.unit[ragged_arange(units.offsets[users[start:stop]], n)]
            yield (
                slice(start, stop),
                unit * self._stride + self._combination[start:stop].numpy()[owner],
                owner,
            )
            start = stop

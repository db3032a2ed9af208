"""Packs of fixed sizes: other users, the same shapes.

The sizes are those of the largest pack so far, with a little room; what a pack leaves over of them
is nobody's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from userip_fast.prompts.packing import SLACK, Pack


class PackSizes(NamedTuple):
    """How long the tensors of a pack are: all that a step's shapes depend on."""

    rows: int
    users: int
    sequences: int
    loss_rows: int
    sums: int
    distinct: int  # 0 where loss rows are distinct by themselves

    @classmethod
    def of(cls, pack: Pack) -> PackSizes:
        """Those of a pack as it is."""
        distinct = 0 if pack.distinct is None else len(pack.distinct[0])
        sums, sequences = len(pack.cu_rows) - 1, len(pack.cu_seqlens) - 1
        loss_rows = len(pack.loss_rows)
        return cls(pack.num_tokens, pack.num_users, sequences, loss_rows, sums, distinct)

    def with_room(self) -> PackSizes:
        """Sizes that fit packs like this one: each up to an eighth more, and a user, a sum and a
        row that are nobody's."""
        users = _eighths(self.users + 1)
        rows = -(-self.rows // 128) * 128 if self.rows > 128 else _eighths(self.rows)
        counts = _eighths(self.sequences), _eighths(self.loss_rows)
        if not self.distinct:
            return PackSizes(rows, users, *counts, users, 0)
        return PackSizes(rows, users, *counts, _eighths(self.sums + 1), _eighths(self.distinct + 1))

    def fits(self, larger: PackSizes) -> bool:
        """Whether `fill` can put a pack of these sizes into one of sizes `larger`."""
        ends = self.users < larger.users and self.sums < larger.sums
        ends = ends and bool(self.distinct) == bool(larger.distinct)
        return ends and all(a <= b for a, b in zip(self, larger)) and (
            not self.distinct or self.distinct < larger.distinct
        )  # fmt: skip

    def empty(self, device: torch.device) -> Pack:
        """A pack of these sizes, to be filled."""

        def of(length: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(length, dtype=dtype, device=device)

        int32, int64 = torch.int32, torch.int64
        return Pack(
            users=np.arange(self.users),
            plan=of(self.rows, int32),
            segment=of(self.rows, int32),
            position=of(self.rows, int32),
            cu_seqlens=of(self.sequences + 1, int32),
            loss_rows=of(self.loss_rows, int64),
            target=of(self.loss_rows, int64),
            loss_weight=of(self.loss_rows, torch.float32),
            cu_rows=of(self.sums + 1, int64),
            max_seqlen=self.rows,
            sequence_user=of(self.sequences, int64),
            distinct=(of(self.distinct, int64), of(self.loss_rows, int64))
            if self.distinct
            else None,
        )


def _eighths(n: int) -> int:
    """The least m 2^k that is at least n, with m from 8 to 16: at most an eighth more."""
    step = 1 << max(0, n.bit_length() - 4)
    return max(8, -(-n // step) * step)


def fill(static: Pack, pack: Pack) -> None:
    """Copies `pack` into the tensors of a larger pack; what is left over is nobody's. No sync.

    Rows left over are slack, sequences empty, users without rows. Loss tokens left over weigh
    nothing and belong to the last sum; they ask the first row, a soft row, which no other does. So
    their gradient is zero and nobody reads their NLL.
    """
    for name, rest in (("plan", SLACK), ("segment", -1), ("position", 0), ("loss_rows", 0),
                       ("target", 0), ("loss_weight", 0)):  # fmt: skip
        _put(getattr(static, name), getattr(pack, name), rest)
    _put(static.cu_seqlens, pack.cu_seqlens, pack.cu_seqlens[-1])
    _put(static.sequence_user, pack.sequence_user, static.num_users - 1)
    _put(static.cu_rows, pack.cu_rows, len(pack.loss_rows))
    static.cu_rows[-1] = len(static.loss_rows)
    if static.distinct is not None:
        assert pack.distinct is not None
        (rows, which), (own_rows, own_which) = static.distinct, pack.distinct
        _put(rows, own_rows, 0)
        _put(which, own_which, len(rows) - 1)


def _put(into: Tensor, x: Tensor, rest: Any) -> None:
    into[: len(x)] = x
    into[len(x) :] = rest

"""soft_prompt_attention on a CPU: users of similar length as one padded batch of matrix products.

Users are sorted by length and cut into blocks whose padded scores stay in cache and waste little.
The query heads of a key head are stacked as rows, so that each step of the formula is one batched
product per block. The backward pass recomputes the probabilities; nothing is kept between the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from userip_fast.ops.soft_prompt_attention.context import Context
from userip_fast.ops.soft_prompt_attention.reference import user_bounds, visible

_BLOCK_BYTES = 2 << 20  # scores of one block over all heads
_MAX_PADDING = 1.25  # longest over shortest user of a block


def _factor(context: Context) -> float:
    """What multiplies q, so that q.k is the score, or the argument of the soft cap's tanh."""
    return context.scale / context.softcap if context.softcap > 0.0 else context.scale


def _blocks(context: Context, heads: int, element_size: int) -> Iterator[list[tuple[int, int]]]:
    """Users of similar length, as (length, first row), shortest first."""
    bounds = user_bounds(context.cu_seqlens, context.segment.shape[0])
    block: list[tuple[int, int]] = []
    for length, start in sorted((b - a, a) for a, b in pairwise(bounds) if b > a):
        scores = length * (length + context.prefix_segment.shape[0]) * heads * element_size
        if block and (
            length > _MAX_PADDING * block[0][0] + 4 or (len(block) + 1) * scores > _BLOCK_BYTES
        ):
            yield block
            block = []
        block.append((length, start))
    if block:
        yield block


class _Block:
    """B users padded to n rows: their rows in the pack, their mask, and their scores."""

    def __init__(self, users: list[tuple[int, int]], context: Context, k: Tensor, acc: torch.dtype):
        self.context, self.acc = context, acc
        self.size, self.n = len(users), users[-1][0]
        self.kv_heads = k.shape[1]
        length, start = torch.tensor(users).T.unsqueeze(-1)  # [B, 1] each
        at = torch.arange(self.n)
        # Padding reads the user's last row, and is written to a trash row past the pack's end.
        self.padding = (at >= length).flatten()
        source = start + torch.minimum(at, length - 1)  # [B, n]
        self.source = source.flatten()
        self.target = self.source.masked_fill(self.padding, k.shape[0])

        prefix = context.prefix_segment.shape[0]
        segment, position = (
            torch.cat([shared.expand(self.size, prefix), own[source]], 1)
            for shared, own in (
                (context.prefix_segment, context.segment),
                (context.prefix_position, context.position),
            )
        )
        ok = visible(
            segment[:, prefix:, None],
            segment[:, None],
            position[:, prefix:, None],
            position[:, None],
            context.num_fields,
            context.window,
            context.chunk,
        )
        ok &= ok.new_ones(self.n, prefix + self.n).tril(prefix)
        bias = torch.zeros(ok.shape, dtype=acc).masked_fill_(~ok, -math.inf)
        self.bias = bias.unsqueeze(1)  # [B, 1, n, P + n]

    def rows(self, x: Tensor, zero_padding: bool = False) -> Tensor:
        """[T, h, d] -> [Hkv * B, G * n, d]: query heads (or, G = 1, key heads) of this block."""
        x = x.index_select(0, self.source).to(self.acc)
        if zero_padding:
            x[self.padding] = 0.0
        width = x.shape[2]
        x = x.view(self.size, self.n, self.kv_heads, -1, width).permute(2, 0, 3, 1, 4)
        return x.reshape(self.kv_heads * self.size, -1, width)

    def columns(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Prefix and own rows of K or V, [Hkv * B, P + n, d]."""
        shared = prefix.to(self.acc).transpose(0, 1).repeat_interleave(self.size, 0)
        return torch.cat([shared, self.rows(x)], 1)

    def write(self, out: Tensor, x: Tensor) -> None:
        """The inverse of `rows`, into out [T + 1, h, d]."""
        x = x.view(self.kv_heads, self.size, -1, self.n, x.shape[2]).permute(1, 3, 0, 2, 4)
        out.index_copy_(0, self.target, x.reshape(-1, *out.shape[1:]).to(out.dtype))

    def probabilities(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """P [Hkv * B, G * n, P + n], and d score / d (q.k) where a soft cap makes it vary."""
        s = torch.bmm(q, k.mT)
        slope = None
        if self.context.softcap > 0.0:
            s.tanh_()
            slope = self.context.softcap * (1 - s.square())
            s.mul_(self.context.softcap)
        s.view(self.kv_heads, self.size, -1, *self.bias.shape[2:]).add_(self.bias)
        if self.context.sinks is None:
            return s.softmax(-1), slope
        sink = self.context.sinks.to(self.acc).view(self.kv_heads, 1, -1, 1)
        sink = sink.expand(-1, self.size, -1, self.n).reshape(self.kv_heads * self.size, -1, 1)
        top = torch.maximum(s.amax(-1, keepdim=True), sink)
        s.sub_(top).exp_()
        return s.div_(s.sum(-1, keepdim=True) + (sink - top).exp_()), slope


def forward(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """out [T, H, dv]."""
    acc, factor = torch.promote_types(q.dtype, torch.float32), _factor(context)
    out = q.new_zeros(q.shape[0] + 1, q.shape[1], v.shape[2])
    for users in _blocks(context, q.shape[1], acc.itemsize):
        block = _Block(users, context, k, acc)
        p, _ = block.probabilities(block.rows(q).mul_(factor), block.columns(context.prefix_k, k))
        block.write(out, torch.bmm(p, block.columns(context.prefix_v, v)))
    return out[:-1]


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, H, d], dk [T, Hkv, d] and dv [T, Hkv, dv]."""
    acc, factor = torch.promote_types(q.dtype, torch.float32), _factor(context)
    dq, dk, dv = (x.new_zeros(x.shape[0] + 1, *x.shape[1:]) for x in (q, k, v))
    prefix = context.prefix_k.shape[0]
    for users in _blocks(context, q.shape[1], acc.itemsize):
        block = _Block(users, context, k, acc)
        rows, columns = block.rows(q).mul_(factor), block.columns(context.prefix_k, k)
        grad = block.rows(d_out, zero_padding=True)  # so that padding adds nothing to dk and dv
        p, slope = block.probabilities(rows, columns)
        delta = (grad * block.rows(out)).sum(-1, keepdim=True)
        ds = torch.bmm(grad, block.columns(context.prefix_v, v).mT).sub_(delta).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        block.write(dv, torch.bmm(p[..., prefix:].mT, grad))
        block.write(dk, torch.bmm(ds[..., prefix:].mT, rows))
        block.write(dq, torch.bmm(ds, columns).mul_(factor))
    return dq[:-1], dk[:-1], dv[:-1]


def scratch_bytes(q: Tensor, k: Tensor, v: Tensor, context: Context, *, backward: bool) -> int:
    """Memory of the largest block beside the results, for `userip_fast.lm.memory`.

    Args:
        q, k, v: As for the op; only shapes and dtype count.
        context: Likewise; all users are taken to be as long as `max_seqlen`.
        backward: Of the backward pass.
    """
    prefix, users = context.prefix_k.shape[0], context.cu_seqlens.shape[0] - 1
    longest = context.max_seqlen
    size = torch.promote_types(q.dtype, torch.float32).itemsize
    one = longest * (longest + prefix) * size  # scores of a user and head
    block = max(1, min(users, _BLOCK_BYTES // max(1, one * q.shape[1])))
    scores, bias = block * one * q.shape[1], block * one
    row, column = (
        block * longest * q.shape[1] * size,
        block * (longest + prefix) * k.shape[1] * size,
    )
    widths = q.shape[2] + v.shape[2]  # q, dq and k beside d_out, out and v; backward dk or dv too
    held = (row + column) * widths
    if backward:
        held += row * widths + column * max(q.shape[2], v.shape[2])
    return bias + (3 if context.softcap > 0.0 else 2) * scores + held

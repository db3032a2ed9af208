"""Soft-prompt attention in plain PyTorch, a user at a time: the oracle. Equations and arguments are
those of `userip_fast.ops.soft_prompt_attention`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from userip_fast.ops.soft_prompt_attention.context import Context


def visible(
    row_segment: Tensor,
    column_segment: Tensor,
    row_position: Tensor,
    column_position: Tensor,
    num_fields: int,
    window: int,
    chunk: int,
) -> Tensor:
    """Who may see whom, causality apart; broadcasts [..., R, 1] rows over [..., 1, C] columns."""
    limit = torch.where(row_segment >= num_fields, num_fields, 0)
    ok = (column_segment == row_segment) | (column_segment < limit)
    if window > 0:
        ok = ok & (column_position > row_position - window)
    if chunk > 0:
        ok = ok & (column_position // chunk == row_position // chunk)
    return ok


def user_bounds(cu_seqlens: Tensor, rows: int) -> list[int]:
    """`cu_seqlens` as checked Python ints; for implementations that run on the CPU.

    Raises:
        ValueError: It does not start at 0, decreases, or ends past the last row.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > rows or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(
            "soft_prompt_attention: cu_seqlens must start at 0, never decrease and end at or "
            f"before row {rows}, "
            f"got {bounds if len(bounds) < 12 else [*bounds[:6], '...', *bounds[-5:]]}"
        )
    return bounds


def _user_scores(q: Tensor, columns: Tensor, own: slice, context: Context) -> Tensor:
    """Scaled, capped and masked scores [Hkv, H / Hkv, n, P + n] of the n rows `own` of one user.

    Args:
        q: [n, H, d].
        columns: [P + n, Hkv, d], prefix rows, then own rows.
        own: Of the pack.
        context: Of the pack.
    """
    n, prefix = q.shape[0], columns.shape[0] - q.shape[0]
    grouped = q.reshape(n, columns.shape[1], -1, q.shape[2])
    scores = torch.einsum("rhgd,chd->hgrc", grouped, columns) * context.scale
    if context.softcap > 0.0:
        scores = context.softcap * torch.tanh(scores / context.softcap)
    segment = torch.cat([context.prefix_segment, context.segment[own]])
    position = torch.cat([context.prefix_position, context.position[own]])
    rows = segment[prefix:, None], segment, position[prefix:, None], position
    ok = visible(*rows, context.num_fields, context.window, context.chunk)
    ok = ok & ok.new_ones(n, prefix + n).tril(prefix)
    return scores.masked_fill(~ok, -math.inf)


def _users(
    q: Tensor, k: Tensor, v: Tensor, context: Context, acc: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of each user with rows: these, keys and values [P + n, Hkv, d or dv], and scores."""
    for start, end in pairwise(user_bounds(context.cu_seqlens, q.shape[0])):
        if start < end:
            own = slice(start, end)
            keys = torch.cat([context.prefix_k, k[own]]).to(acc)
            values = torch.cat([context.prefix_v, v[own]]).to(acc)
            yield own, keys, values, _user_scores(q[own].to(acc), keys, own, context)


def forward(q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """The oracle, user by user: out [T, H, dv] and natural-log lse [H, T] fp32 (fp64 of fp64)."""
    acc = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_zeros(q.shape[1], q.shape[0], dtype=acc)
    for own, _, values, scores in _users(q, k, v, context, acc):
        top = scores.logsumexp(-1, keepdim=True)
        if context.sinks is not None:
            top = torch.logaddexp(top, context.sinks.to(acc).view(values.shape[1], -1, 1, 1))
        out[own] = torch.einsum("hgrc,chd->rhgd", (scores - top).exp(), values).flatten(1, 2)
        lse[:, own] = top.squeeze(-1).flatten(0, 1)
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle's dq [T, H, d], dk [T, Hkv, d] and dv [T, Hkv, dv]; zero in slack rows."""
    acc = lse.dtype
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    prefix, kv_heads = context.prefix_k.shape[0], k.shape[1]
    for own, keys, values, scores in _users(q, k, v, context, acc):
        n = own.stop - own.start
        grad, rows, result = (
            x[own].to(acc).reshape(n, kv_heads, -1, x.shape[2]) for x in (d_out, q, out)
        )  # [n, Hkv, G, d or dv]
        p = torch.exp(scores - lse[:, own].reshape(kv_heads, -1, n, 1))
        dp = torch.einsum("rhgd,chd->hgrc", grad, values)
        delta = (grad * result).sum(-1).permute(1, 2, 0).unsqueeze(-1)
        ds = p * (dp - delta) * context.scale
        if context.softcap > 0.0:
            ds = ds * (1 - (scores.masked_fill(p == 0, 0.0) / context.softcap).square())
        dq[own] = torch.einsum("hgrc,chd->rhgd", ds, keys).flatten(1, 2)
        dk[own] = torch.einsum("hgrc,rhgd->chd", ds[..., prefix:], rows)
        dv[own] = torch.einsum("hgrc,rhgd->chd", p[..., prefix:], grad)
    return dq, dk, dv

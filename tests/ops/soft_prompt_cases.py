"""Packs for the attention tests, and a dense oracle that shares no code with the op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from userip_fast.ops import soft_prompt_attention


@dataclass(frozen=True)
class Case:
    """Inputs of one call: the tensors, and the keyword arguments besides `impl`."""

    tensors: tuple[Tensor, ...]  # q, k, v, prefix_k, prefix_v
    pack: tuple[Tensor, ...]  # segment, prefix_segment, cu_seqlens, position, prefix_position
    options: dict

    def cast(self, dtype: torch.dtype) -> Case:
        return Case(tuple(x.to(dtype) for x in self.tensors), self.pack, self.options)


def make_case(
    behaviour: list[int],  # behaviour rows of each user
    *,
    names: tuple[int, ...] = (3, 4),  # name tokens of each field
    virtual: int = 1,
    bos: bool = True,
    slack: int = 0,
    items: int = 0,  # > 0: independent items of this many rows
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    spread: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random packed users; q, k, v are column slices of one wider buffer, hence strided."""
    fields = len(names)
    prefix_segment = [-1] * bos + [j for j, n in enumerate(names) for _ in range(n)]
    # positions of a prompt: BOS, then per field its name and its soft rows, then behaviour
    prefix_position, soft_position, at = [0] * bos, [], int(bos)
    for n in names:
        prefix_position += range(at, at + n)
        soft_position += range(at + n, at + n + virtual)
        at += n + virtual
    soft_segment = [j for j in range(fields) for _ in range(virtual)]
    segment, position, cu = [], [], [0]
    for b in behaviour:
        segment += soft_segment + [fields + (i // items if items else 0) for i in range(b)]
        position += soft_position + [at + (i % items if items else i) for i in range(b)]
        cu.append(len(segment))
    rows = cu[-1] + slack
    segment += [7] * slack
    position += [1] * slack
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, (heads + 2 * kv_heads) * dim + 5, generator=g) * spread
    wide = wide.to(dtype)
    cuts = [heads * dim, (heads + kv_heads) * dim, (heads + 2 * kv_heads) * dim]
    q, k, v = (x.unflatten(1, (-1, dim)) for x in wide.tensor_split(cuts, 1)[:3])
    prefix = torch.randn(2, len(prefix_segment), kv_heads, dim, generator=g).to(dtype) * spread
    ints = (segment, prefix_segment, cu, position, prefix_position)
    options = {
        "num_fields": fields,
        "scale": dim**-0.5 if scale is None else scale,
        "window": window,
        "softcap": softcap,
    }
    pack = tuple(torch.tensor(x, dtype=torch.int32) for x in ints)
    return Case((q, k, v, prefix[0], prefix[1]), pack, options)


def dense_attention(case: Case) -> Tensor:
    """The whole pack as one dense masked softmax, in the dtype of its inputs."""
    q, k, v, prefix_k, prefix_v = case.tensors
    segment, prefix_segment, cu, position, prefix_position = case.pack
    fields, window, softcap = (case.options[x] for x in ("num_fields", "window", "softcap"))
    rows, heads, _ = q.shape
    prefix, group = prefix_k.shape[0], heads // k.shape[1]
    keys, values = (
        torch.cat(x).repeat_interleave(group, 1).transpose(0, 1)
        for x in ((prefix_k, k), (prefix_v, v))
    )
    user = torch.full((rows,), -1)
    for u, (a, b) in enumerate(pairwise(cu.tolist())):
        user[a:b] = u
    ok = torch.zeros(rows, prefix + rows, dtype=torch.bool)
    columns = torch.cat([prefix_segment, segment]).tolist()
    places = torch.cat([prefix_position, position]).tolist()
    for r in range(rows):
        if user[r] < 0:
            continue
        for c in range(prefix + r + 1):
            if c >= prefix and user[c - prefix] != user[r]:
                continue
            s, t = int(segment[r]), columns[c]
            seen = s == t or t < 0 or (s >= fields and t < fields)
            ok[r, c] = seen and (window == 0 or places[c] > int(position[r]) - window)
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) * case.options["scale"]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    slack = user < 0
    scores = scores.masked_fill(~(ok | slack[:, None]), -math.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1) * ~slack[:, None, None]


def gradients(fn, case: Case, d_out: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of `fn(case)`."""
    leaves = tuple(x.detach().requires_grad_() for x in case.tensors[:3])
    out = fn(Case((*leaves, *case.tensors[3:]), case.pack, case.options))
    grads = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    return (out.detach(), *grads)


def run_op(impl: str):
    return lambda case: soft_prompt_attention(*case.tensors, *case.pack, **case.options, impl=impl)

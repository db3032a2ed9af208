"""Packs for the attention tests, and a dense oracle that shares no code with the op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from userip_fast.ops import soft_prompt_attention
from userip_fast.ops.soft_prompt_attention.context import Context
from userip_fast.testing import assert_close_to_oracle, poisoned_memory


@dataclass(frozen=True)
class Case:
    """Inputs of one call: the tensors, and the keyword arguments besides `impl`."""

    tensors: tuple[Tensor, ...]  # q, k, v, prefix_k, prefix_v
    pack: tuple[Tensor, ...]  # segment, prefix_segment, cu_seqlens, position, prefix_position
    options: dict

    @property
    def context(self) -> Context:
        """All but q, k and v, as implementations take it."""
        names = Context._fields[:7]
        constant = dict(zip(names, (*self.tensors[3:], *self.pack), strict=True))
        return Context(**constant, **self.options)

    def cast(self, dtype: torch.dtype) -> Case:
        return Case(tuple(x.to(dtype) for x in self.tensors), self.pack, self.options)

    def to(self, device: str) -> Case:
        tensors, pack = (tuple(x.to(device) for x in xs) for xs in (self.tensors, self.pack))
        moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in self.options.items()}
        return Case(tensors, pack, moved)


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
    v_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: bool = False,
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
    v_dim = v_dim or dim
    qk = (heads + kv_heads) * dim
    wide = torch.randn(rows, qk + kv_heads * v_dim + 5, generator=g) * spread
    wide = wide.to(dtype)
    cuts = [heads * dim, qk, qk + kv_heads * v_dim]
    q, k, v = (
        x.unflatten(1, (-1, width))
        for x, width in zip(wide.tensor_split(cuts, 1), (dim, dim, v_dim))
    )
    prefix = [
        torch.randn(len(prefix_segment), kv_heads, n, generator=g).to(dtype) * spread
        for n in (dim, v_dim)
    ]
    ints = (segment, prefix_segment, cu, position, prefix_position)
    options = {
        "num_fields": fields,
        "scale": dim**-0.5 if scale is None else scale,
        "window": window,
        "softcap": softcap,
        "chunk": chunk,
        "sinks": 2 * torch.randn(heads, generator=g) if sinks else None,
    }
    pack = tuple(torch.tensor(x, dtype=torch.int32) for x in ints)
    return Case((q, k, v, prefix[0], prefix[1]), pack, options)


def dense_attention(case: Case) -> Tensor:
    """The whole pack as one dense masked softmax, in the dtype of its inputs."""
    q, k, v, prefix_k, prefix_v = case.tensors
    segment, prefix_segment, cu, position, prefix_position = case.pack
    fields, window, softcap = (case.options[x] for x in ("num_fields", "window", "softcap"))
    chunk, sinks = case.options["chunk"], case.options["sinks"]
    rows, heads, _ = q.shape
    prefix, group = prefix_k.shape[0], heads // k.shape[1]
    keys, values = (
        torch.cat(x).repeat_interleave(group, 1).transpose(0, 1)
        for x in ((prefix_k, k), (prefix_v, v))
    )
    user = [-1] * rows
    for u, (a, b) in enumerate(pairwise(cu.tolist())):
        user[a:b] = [u] * (b - a)
    ok = [[False] * (prefix + rows) for _ in range(rows)]
    columns = torch.cat([prefix_segment, segment]).tolist()
    places = torch.cat([prefix_position, position]).tolist()
    for r in range(rows):
        if user[r] < 0:
            continue
        for c in range(prefix + r + 1):
            if c >= prefix and user[c - prefix] != user[r]:
                continue
            s, t = columns[prefix + r], columns[c]
            seen = s == t or t < 0 or (s >= fields and t < fields)
            near = window == 0 or places[c] > places[prefix + r] - window
            if chunk and places[c] // chunk != places[prefix + r] // chunk:
                near = False
            ok[r][c] = seen and near
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) * case.options["scale"]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    slack = torch.tensor(user) < 0
    hidden = ~torch.tensor(ok).view(rows, prefix + rows) & ~slack[:, None]
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:  # as the models write it: a column more, dropped again
        column = sinks.to(scores.dtype).view(heads, 1, 1).expand(-1, rows, 1)
        scores = torch.cat([scores, column], 2)
    p = scores.softmax(-1)[..., : prefix + rows]
    return (p @ values).transpose(0, 1) * ~slack[:, None, None]


def gradients(fn, case: Case, d_out: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of `fn(case)`."""
    leaves = tuple(x.detach().requires_grad_() for x in case.tensors[:3])
    out = fn(Case((*leaves, *case.tensors[3:]), case.pack, case.options))
    grads = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    return (out.detach(), *grads)


def run_op(impl: str):
    return lambda case: soft_prompt_attention(*case.tensors, *case.pack, **case.options, impl=impl)


CASES = {
    "one field": {"behaviour": [5, 1, 9], "names": (3,)},
    "two fields, GQA, slack": {"behaviour": [4, 11, 2], "heads": 4, "kv_heads": 2, "slack": 5},
    "no prefix": {"behaviour": [3, 6], "names": (0, 0), "bos": False},
    "empty prompts, m = 3": {"behaviour": [7, 2], "names": (0, 2, 0), "virtual": 3, "dim": 16},
    "independent items": {"behaviour": [9, 4, 6], "items": 3, "virtual": 2, "slack": 1},
    "window": {"behaviour": [12, 3, 20], "window": 6, "virtual": 2, "slack": 3},
    "window of two": {"behaviour": [5, 4], "window": 2},
    "softcap": {"behaviour": [8, 13], "softcap": 2.0, "heads": 3, "kv_heads": 3, "spread": 2.0},
    "window, items, softcap": {"behaviour": [8, 13], "window": 3, "items": 5, "softcap": 5.0},
    "chunks": {"behaviour": [12, 3, 20], "chunk": 7, "virtual": 2, "slack": 3},
    "sinks": {"behaviour": [8, 13], "heads": 4, "kv_heads": 2, "sinks": True, "slack": 2},
    "narrow v": {"behaviour": [9, 2], "heads": 4, "kv_heads": 2, "dim": 24, "v_dim": 16},
    "wide v, sinks, chunks, items": {
        "behaviour": [14, 5],
        "v_dim": 20,
        "sinks": True,
        "chunk": 6,
        "items": 4,
        "slack": 1,
    },
    "sinks, window, softcap": {
        "behaviour": [11, 4],
        "sinks": True,
        "window": 5,
        "softcap": 3.0,
        "spread": 2.0,
    },
    "one user of many rows": {"behaviour": [77], "heads": 4, "kv_heads": 2},
}

NAMES = ("out", "dq", "dk", "dv")


def compare(case: Case, impl: str, device: str = "cpu") -> None:
    """out and all gradients against fp64 autograd of the dense oracle, in poisoned memory."""
    shape = (*case.tensors[0].shape[:2], case.tensors[2].shape[2])
    d_out = torch.randn(shape, dtype=torch.float64)
    oracle = gradients(dense_attention, case.cast(torch.float64), d_out)
    low = gradients(dense_attention, case, d_out)
    with poisoned_memory():
        got = gradients(run_op(impl), case.to(device), d_out.to(device))
    end = int(case.pack[2][-1])
    for name, g, o, x in zip(NAMES, got, oracle, low, strict=True):
        assert_close_to_oracle(g.cpu(), o, x, name=name)
        assert not g[end:].any(), f"{name}: slack rows must be exactly zero"

"""Triton kernels of `userip_fast.ops.soft_prompt_attention`; the op's module has the formulas.

Tensors: q [T, H, d], k [T, Hkv, d], v [T, Hkv, dv] and out [T, H, dv], packed rows; prefix_k and
prefix_v likewise with P rows; any strides but a contiguous last dimension. lse (log2 of the sum of
2^score) and delta are [H, T] fp32. Dots accumulate in fp32; probabilities and score gradients are
rounded to the input dtype before they are multiplied, as FlashAttention does. fp32 inputs are
multiplied in fp32, not TF32.

Work: one program per (tile of one user's rows, head). The forward and dQ programs walk the prefix,
then the user's columns up to their own rows. A dK/dV program owns a tile of columns and one key
head and walks the rows at or after it, for every query head of the group. Every output row has one
owner and one order of summation: no atomics, bitwise repeatable, independent of the other users of
the pack. The tiles come from a work list built on the device, longest first, over a grid that
depends on T and U alone, so that a launch needs no host sync and can be captured in a CUDA graph.
Rows that belong to nobody are one more "user", whose outputs are zeros.

Tiles are read through tensor descriptors (TMA, so that the dots become wgmma) on sm_90, and
through pointers elsewhere, where descriptors would lose cp.async; the source is the same. Through
a descriptor, rows past a user's end hold the next user's values: the causal mask hides them as
columns and an infinite lse hides them as rows; in a user's last tile they are set to zero before
they are multiplied by zeros, since they may be NaN. Two kernels have no registers for that, dQ at
head size 256 and dK/dV at 128 with groups: there rows past a user's end must be finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor
from userip_fast.kernels.soft_prompt_attention_shared import (
    LOG2E,
    NOBODY,
    WorkLists,
    across,
    down,
    load_tile,
    marks,
    own_rows,
    scores,
    store_tile,
    visible,
    work_list,
)

from userip_fast.ops.soft_prompt_attention.context import Context


class Tiling(NamedTuple):
    """How a kernel is cut: a program's own rows (columns), the tile it walks, launch options."""

    own: int
    step: int
    num_warps: int
    num_stages: int


@triton.jit
def _fwd_step(
    acc, m, total, q_tile, row, columns, j, end, kv_head, rules,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, OWN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DESC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One column tile of the online softmax; a tile that a row cannot see leaves it unchanged.

    `columns`: what `load_tile` reads keys and values from, and pointers to segments and positions.
    `rules`: num_fields, scale, window and softcap.
    """
    keys, values, segment_ptr, position_ptr = columns
    num_fields, scale, window, softcap = rules
    BLOCK_D: tl.constexpr = q_tile.shape[1]
    BLOCK_V: tl.constexpr = acc.shape[1]
    col = marks(segment_ptr, position_ptr, j, end, NOBODY, BLOCK_N, WINDOW)
    k_tile = load_tile(keys, j, end, kv_head, BLOCK_N, DIM, BLOCK_D, DESC)
    s, _ = scores(q_tile, k_tile, scale, softcap, SOFTCAP)
    ok = visible(down(row), across(col), num_fields, window, OWN, WINDOW)
    s = tl.where(ok, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    v_tile = load_tile(values, j, end, kv_head, BLOCK_N, DIM_V, BLOCK_V, DESC)
    if TAIL:
        v_tile = own_rows(v_tile, j, end)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, total * shrink + tl.sum(p, 1)


@triton.jit
def _fwd_kernel(
    q, k, v, prefix_k, prefix_v, out_ptr, lse_ptr, sinks_ptr,
    work_ptr, segment_ptr, prefix_segment_ptr, position_ptr, prefix_position_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    T, P, num_fields, scale, window, softcap,
    H: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0) // H, tl.program_id(0) % H
    kv_head = head // (H // HKV)
    start = tl.load(work_ptr + 3 * item)
    end = tl.load(work_ptr + 3 * item + 1)
    first = tl.load(work_ptr + 3 * item + 2)
    if first < 0:
        return
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    m = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, so that exp2(m - m_new) is never NaN
    total = tl.zeros((BLOCK_M,), tl.float32)
    row = marks(segment_ptr, position_ptr, first, end, 0, BLOCK_M, WINDOW)
    lse_at = lse_ptr + tl.cast(head, tl.int64) * T + row[0]
    if start < 0:
        store_tile(out_ptr, acc, first, end, head, H, DIM_V)
        tl.store(lse_at, total, mask=row[0] < end)
        return
    if SINKS:  # as if a column of this score and no value had been walked
        m = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + head) * LOG2E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    q_tile = load_tile((q, stride_qt, stride_qh), first, end, head, BLOCK_M, DIM, BLOCK_D, DESC)
    prefix_keys, keys = (prefix_k, stride_pkt, stride_pkh), (k, stride_kt, stride_kh)
    prefix_values, values = (prefix_v, stride_pvt, stride_pvh), (v, stride_vt, stride_vh)
    prefix = (prefix_keys, prefix_values, prefix_segment_ptr, prefix_position_ptr)
    own, rules = (keys, values, segment_ptr, position_ptr), (num_fields, scale, window, softcap)
    for j in range(0, P, BLOCK_N):
        acc, m, total = _fwd_step(
            acc, m, total, q_tile, row, prefix, j, P, kv_head, rules,
            BLOCK_N, DIM, DIM_V, False, WINDOW, SOFTCAP, DESC, False,
        )  # fmt: skip
    stop = tl.minimum(first + BLOCK_M, end)
    full = start + (stop - start) // BLOCK_N * BLOCK_N if DESC else stop
    for j in range(start, full, BLOCK_N):
        acc, m, total = _fwd_step(
            acc, m, total, q_tile, row, own, j, end, kv_head, rules,
            BLOCK_N, DIM, DIM_V, True, WINDOW, SOFTCAP, DESC, False,
        )  # fmt: skip
    if DESC:  # noqa: SIM102 - known when compiled
        if full < stop:
            acc, m, total = _fwd_step(
                acc, m, total, q_tile, row, own, full, end, kv_head, rules,
                BLOCK_N, DIM, DIM_V, True, WINDOW, SOFTCAP, DESC, True,
            )  # fmt: skip
    store_tile(out_ptr, acc / total[:, None], first, end, head, H, DIM_V)
    tl.store(lse_at, m + tl.log2(total), mask=row[0] < end)


@triton.jit
def _dq_step(
    dq, q_tile, grad, lse, delta, row, columns, j, end, kv_head, rules,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, OWN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DESC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """As `_fwd_step`."""
    keys, values, segment_ptr, position_ptr = columns
    num_fields, scale, window, softcap = rules
    BLOCK_D: tl.constexpr = q_tile.shape[1]
    BLOCK_V: tl.constexpr = grad.shape[1]
    col = marks(segment_ptr, position_ptr, j, end, NOBODY, BLOCK_N, WINDOW)
    k_tile = load_tile(keys, j, end, kv_head, BLOCK_N, DIM, BLOCK_D, DESC)
    v_tile = load_tile(values, j, end, kv_head, BLOCK_N, DIM_V, BLOCK_V, DESC)
    if TAIL:
        k_tile, v_tile = own_rows(k_tile, j, end), own_rows(v_tile, j, end)
    s, slope = scores(q_tile, k_tile, scale, softcap, SOFTCAP)
    ok = visible(down(row), across(col), num_fields, window, OWN, WINDOW)
    p = tl.where(ok, tl.exp2(s - lse[:, None]), 0.0)
    dp = tl.dot(grad, tl.trans(v_tile), input_precision="ieee")
    ds = p * (dp - delta[:, None]) * slope
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@triton.jit
def _dq_kernel(
    q, k, v, prefix_k, prefix_v, d_out, out, lse_ptr, delta_ptr, dq_ptr,
    work_ptr, segment_ptr, prefix_segment_ptr, position_ptr, prefix_position_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    T, P, num_fields, scale, window, softcap,
    H: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROW_HEADS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """dq, and delta [H, T] for `_dkdv_kernel`; d_out and out are contiguous."""
    item, head = tl.program_id(0) // H, tl.program_id(0) % H
    kv_head = head // (H // HKV)
    start = tl.load(work_ptr + 3 * item)
    end = tl.load(work_ptr + 3 * item + 1)
    first = tl.load(work_ptr + 3 * item + 2)
    if first < 0:
        return
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if start < 0:
        store_tile(dq_ptr, dq, first, end, head, ROW_HEADS, DIM)
        return
    row = marks(segment_ptr, position_ptr, first, end, 0, BLOCK_M, WINDOW)
    inside = row[0] < end
    at = tl.cast(head, tl.int64) * T + row[0]
    grad = load_tile((d_out, H * DIM_V, DIM_V), first, end, head, BLOCK_M, DIM_V, BLOCK_V, DESC)
    result = load_tile((out, H * DIM_V, DIM_V), first, end, head, BLOCK_M, DIM_V, BLOCK_V, DESC)
    delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=inside)
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf"))
    q_tile = load_tile((q, stride_qt, stride_qh), first, end, head, BLOCK_M, DIM, BLOCK_D, DESC)
    prefix_keys, keys = (prefix_k, stride_pkt, stride_pkh), (k, stride_kt, stride_kh)
    prefix_values, values = (prefix_v, stride_pvt, stride_pvh), (v, stride_vt, stride_vh)
    prefix = (prefix_keys, prefix_values, prefix_segment_ptr, prefix_position_ptr)
    own, rules = (keys, values, segment_ptr, position_ptr), (num_fields, scale, window, softcap)
    for j in range(0, P, BLOCK_N):
        dq = _dq_step(
            dq, q_tile, grad, lse, delta, row, prefix, j, P, kv_head, rules,
            BLOCK_N, DIM, DIM_V, False, WINDOW, SOFTCAP, DESC, False,
        )  # fmt: skip
    stop = tl.minimum(first + BLOCK_M, end)
    CLEAN: tl.constexpr = DESC and BLOCK_D <= 128 and BLOCK_V <= 128  # it spills at 256
    full = start + (stop - start) // BLOCK_N * BLOCK_N if CLEAN else stop
    for j in range(start, full, BLOCK_N):
        dq = _dq_step(
            dq, q_tile, grad, lse, delta, row, own, j, end, kv_head, rules,
            BLOCK_N, DIM, DIM_V, True, WINDOW, SOFTCAP, DESC, False,
        )  # fmt: skip
    if CLEAN:  # noqa: SIM102
        if full < stop:
            dq = _dq_step(
                dq, q_tile, grad, lse, delta, row, own, full, end, kv_head, rules,
                BLOCK_N, DIM, DIM_V, True, WINDOW, SOFTCAP, DESC, True,
            )  # fmt: skip
    store_tile(dq_ptr, dq * scale, first, end, head, ROW_HEADS, DIM)


@triton.jit
def _dkdv_step(
    dk, dv, k_tile, v_tile, col, rows, i, end, head, T, rules,
    BLOCK_M: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, DESC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one query head.

    `rows`: what `load_tile` reads q and d_out from; pointers to lse, delta, segments, positions.
    """
    queries, gradients, lse_ptr, delta_ptr, segment_ptr, position_ptr = rows
    num_fields, scale, window, softcap = rules
    BLOCK_D: tl.constexpr = k_tile.shape[1]
    BLOCK_V: tl.constexpr = v_tile.shape[1]
    row = marks(segment_ptr, position_ptr, i, end, 0, BLOCK_M, WINDOW)
    inside = row[0] < end
    at = tl.cast(head, tl.int64) * T + row[0]
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    q_tile = load_tile(queries, i, end, head, BLOCK_M, DIM, BLOCK_D, DESC)
    grad = load_tile(gradients, i, end, head, BLOCK_M, DIM_V, BLOCK_V, DESC)
    if TAIL:
        q_tile, grad = own_rows(q_tile, i, end), own_rows(grad, i, end)
    s, slope = scores(k_tile, q_tile, scale, softcap, SOFTCAP)
    ok = visible(across(row), down(col), num_fields, window, True, WINDOW)
    p = tl.where(ok, tl.exp2(s - lse[None, :]), 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    dp = tl.dot(v_tile, tl.trans(grad), input_precision="ieee")
    ds = p * (dp - delta[None, :]) * slope
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q, k, v, d_out, lse_ptr, delta_ptr, dk_ptr, dv_ptr, work_ptr, segment_ptr, position_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    T, num_fields, scale, window, softcap,
    H: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROW_HEADS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N columns, BLOCK_M rows at a time; scores are transposed, [N, M]."""
    item, kv_head = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    start = tl.load(work_ptr + 3 * item)
    end = tl.load(work_ptr + 3 * item + 1)
    first = tl.load(work_ptr + 3 * item + 2)
    if first < 0:
        return
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if start < 0:
        store_tile(dk_ptr, dk, first, end, kv_head, ROW_HEADS, DIM)
        store_tile(dv_ptr, dv, first, end, kv_head, ROW_HEADS, DIM_V)
        return
    k_tile = load_tile((k, stride_kt, stride_kh), first, end, kv_head, BLOCK_N, DIM, BLOCK_D, DESC)
    v_tile = load_tile(
        (v, stride_vt, stride_vh), first, end, kv_head, BLOCK_N, DIM_V, BLOCK_V, DESC
    )
    col = marks(segment_ptr, position_ptr, first, end, NOBODY, BLOCK_N, WINDOW)
    queries, gradients = (q, stride_qt, stride_qh), (d_out, H * DIM_V, DIM_V)
    rows = (queries, gradients, lse_ptr, delta_ptr, segment_ptr, position_ptr)
    rules = (num_fields, scale, window, softcap)
    SMALL: tl.constexpr = BLOCK_D <= 64 and BLOCK_V <= 64
    CLEAN: tl.constexpr = DESC and (SMALL or H == HKV)  # groups spill at 128
    full = first + (end - first) // BLOCK_M * BLOCK_M if CLEAN else end
    for g in range(H // HKV):
        head = kv_head * (H // HKV) + g
        for i in range(first, full, BLOCK_M):
            dk, dv = _dkdv_step(
                dk, dv, k_tile, v_tile, col, rows, i, end, head, T, rules,
                BLOCK_M, DIM, DIM_V, WINDOW, SOFTCAP, DESC, False,
            )  # fmt: skip
    if CLEAN:  # noqa: SIM102
        if full < end:
            for g in range(H // HKV):
                head = kv_head * (H // HKV) + g
                dk, dv = _dkdv_step(
                    dk, dv, k_tile, v_tile, col, rows, full, end, head, T, rules,
                    BLOCK_M, DIM, DIM_V, WINDOW, SOFTCAP, DESC, True,
                )  # fmt: skip
    store_tile(dk_ptr, dk * scale, first, end, kv_head, ROW_HEADS, DIM)
    store_tile(dv_ptr, dv, first, end, kv_head, ROW_HEADS, DIM_V)


def tiling(kernel: str, dim: int, dtype: torch.dtype, desc: bool) -> Tiling:
    """The cut of "fwd", "dq" or "dkdv" for the wider of q and v: in 16 bits none spills where it is
    meant for.

    Found by compiling (docs/attention.md has registers and shared memory); timings on a GPU are
    still to come. A wgmma needs 64 own rows, hence 64 with descriptors.
    """
    if dtype == torch.float32:
        return Tiling(32, 32, 4, 1) if dim <= 64 else Tiling(16, 16, 4, 1)
    size = 0 if dim <= 64 else 1 if dim <= 128 else 2
    return (_DESCRIPTOR_TILINGS if desc else _POINTER_TILINGS)[kernel][size]


# For head sizes up to 64, 128 and 256.
_POINTER_TILINGS = {
    "fwd": (Tiling(64, 64, 4, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 1)),
    "dq": (Tiling(64, 32, 4, 2), Tiling(64, 64, 8, 2), Tiling(32, 32, 8, 1)),
    "dkdv": (Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 1)),
}
_DESCRIPTOR_TILINGS = {
    "fwd": (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2)),
    "dq": (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 1)),
    "dkdv": (Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2)),
}


def _descriptors_fit(tensors: tuple[Tensor, ...]) -> bool:
    """Whether to read through tensor descriptors: sm_90, 16-bit, and strides that TMA can take."""
    q = tensors[0]
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype.itemsize == 2
        and all(
            x.numel() > 0
            and x.data_ptr() % 16 == 0
            and (x.stride(0) * x.dtype.itemsize) % 16 == 0
            and (x.stride(1) * x.dtype.itemsize) % 16 == 0
            for x in tensors
        )
    )


def _source(x: Tensor, rows: int, desc: bool) -> Tensor | TensorDescriptor:
    """What `load_tile` reads `rows` rows from: x [T, h, d], or its descriptor [h, T, d]."""
    if not desc:
        return x
    shape, strides = (x.shape[i] for i in (1, 0, 2)), (x.stride(i) for i in (1, 0, 2))
    return TensorDescriptor(x, list(shape), list(strides), [1, rows, _padded(x.shape[2])])


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _constants(q: Tensor, v: Tensor, context: Context) -> dict[str, int]:
    """What all three kernels are compiled for."""
    return {
        "H": q.shape[1],
        "HKV": v.shape[1],
        "DIM": q.shape[2],
        "BLOCK_D": _padded(q.shape[2]),
        "DIM_V": v.shape[2],
        "BLOCK_V": _padded(v.shape[2]),
        "WINDOW": 1 if context.window > 0 else 2 if context.chunk > 0 else 0,
        "SOFTCAP": context.softcap > 0.0,
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in x.stride()[:2]]


def _mask(context: Context) -> tuple[float, ...]:
    """num_fields, scale, window and softcap as the kernels take them."""
    return (
        context.num_fields, context.scale, context.window or context.chunk, context.softcap
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, context: Context, lists: WorkLists | None = None
) -> tuple[Tensor, Tensor]:
    """out [T, H, dv] and lse [H, T] fp32."""
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    prefix_k, prefix_v, sinks = context.prefix_k, context.prefix_v, context.sinks
    desc = _descriptors_fit((q, k, v, prefix_k, prefix_v))
    cut = tiling("fwd", max(q.shape[2], v.shape[2]), q.dtype, desc)
    work, capacity = work_list(context.cu_seqlens, q.shape[0], cut.own, True, lists=lists)
    _fwd_kernel[(capacity * q.shape[1],)](
        _source(q, cut.own, desc),
        *(_source(x, cut.step, desc) for x in (k, v, prefix_k, prefix_v)),
        out, lse, lse if sinks is None else sinks.float().contiguous(), work,
        context.segment, context.prefix_segment, context.position, context.prefix_position,
        *_strides(q, k, v, prefix_k, prefix_v), q.shape[0], prefix_k.shape[0], *_mask(context),
        BLOCK_M=cut.own, BLOCK_N=cut.step, SINKS=sinks is not None,
        DESC=desc, **_constants(q, v, context), num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Context,
    lists: WorkLists | None = None, into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [T, H, d], dk [T, Hkv, d], dv [T, Hkv, dv].

    Sinks are in lse already. `into`: where to write them; heads lie side by side, and rows may be
    any number of heads apart, the same for dk and dv.
    """
    if into is None:
        into = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dq, dk, dv = into
    if q.numel() == 0:
        return dq, dk, dv
    d_out, delta, rows = d_out.contiguous(), torch.empty_like(lse), q.shape[0]
    prefix_k, prefix_v = context.prefix_k, context.prefix_v
    desc = _descriptors_fit((q, k, v, prefix_k, prefix_v, d_out, out))
    widest, constants = max(q.shape[2], v.shape[2]), _constants(q, v, context)

    cut = tiling("dq", widest, q.dtype, desc)
    work, capacity = work_list(context.cu_seqlens, rows, cut.own, True, lists=lists)
    _dq_kernel[(capacity * q.shape[1],)](
        _source(q, cut.own, desc),
        *(_source(x, cut.step, desc) for x in (k, v, prefix_k, prefix_v)),
        *(_source(x, cut.own, desc) for x in (d_out, out)),
        lse, delta, dq, work,
        context.segment, context.prefix_segment, context.position, context.prefix_position,
        *_strides(q, k, v, prefix_k, prefix_v), rows, prefix_k.shape[0], *_mask(context),
        BLOCK_M=cut.own, BLOCK_N=cut.step, ROW_HEADS=dq.stride(0) // q.shape[2],
        DESC=desc, **constants, num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip

    # At 256 wgmma's layouts of dk and dv spill, mma.sync's do not.
    desc = desc and _padded(widest) <= 128
    cut = tiling("dkdv", widest, q.dtype, desc)
    work, capacity = work_list(context.cu_seqlens, rows, cut.own, False, lists=lists)
    _dkdv_kernel[(capacity * k.shape[1],)](
        _source(q, cut.step, desc), _source(k, cut.own, desc), _source(v, cut.own, desc),
        _source(d_out, cut.step, desc), lse, delta, dk, dv, work,
        context.segment, context.position, *_strides(q, k, v), rows, *_mask(context),
        BLOCK_M=cut.step, BLOCK_N=cut.own, ROW_HEADS=dk.stride(0) // k.shape[2],
        DESC=desc, **constants, num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    return dq, dk, dv

"""soft_prompt_attention from public flash kernels: two calls merged by their log-sum-exp.

Behaviour rows attend to two segments, each of which a public kernel can do: all rows to the prefix,
and the pack to itself, causal per user. With lse = logaddexp(lse_a, lse_b),

    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

and each segment's backward kernel, given the merged out and lse, yields that segment's share of
the exact gradient: its P and delta are then those of the whole row. Soft rows see only their own
field, which no public kernel masks; they are few, so they run as a pack of their own, and are
taken out of the large backward calls by d_out = 0 and lse = inf.

Costs host syncs (how many rows are used, and which are soft), so it is never chosen by "auto".
The kernels are torch's, or those of flash-attn (extra `flash`) where it is installed and was faster
on this device, which is measured once for each form of heads (`userip_fast.core.measured`).
"""

from __future__ import annotations

import functools
import logging
from importlib import metadata
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from userip_fast.core import measured
from userip_fast.core.errors import UnsupportedError
from userip_fast.ops.soft_prompt_attention.context import Context

logger = logging.getLogger("userip_fast.ops")

_GAIN = 0.95  # flash-attn must take at most so much of torch's time
_SEQUENCES, _ROWS = 16, 512  # of the sample that is timed


class Segment(NamedTuple):
    """Whose rows see whose columns, and how."""

    cu_q: Tensor  # [n + 1] int32
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    scale: float


class SegmentAttention(Protocol):
    """Plain varlen attention of q [Tq, H, d] over k, v [Tk, Hkv, d] and its backward pass."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Segment) -> tuple[Tensor, Tensor]:
        """out [Tq, H, d] and natural-log lse [H, Tq] fp32."""

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Segment
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv for the given out and lse, whether or not they are this segment's own."""


class TorchFlash:
    """The flash kernels that torch carries, as torch.nn.attention.varlen calls them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Segment) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *at[:4], 0.0, at.causal, False, scale=at.scale
        )
        return out, lse

    def backward(self, d_out: Tensor, q: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, at = saved
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        return torch.ops.aten._flash_attention_backward(
            d_out, q, *tensors, *at[:4], 0.0, at.causal, *no_dropout, scale=at.scale
        )


class FlashAttn:
    """The kernels of the package flash-attn, 2.7 or later; gradients are the same each time."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Segment) -> tuple[Tensor, Tensor]:
        from flash_attn import flash_attn_interface as flash

        out, lse, *_ = flash._flash_attn_varlen_forward(
            q, k, v, *at[:4], dropout_p=0.0, softmax_scale=at.scale, causal=at.causal
        )
        return out, lse

    def backward(self, d_out: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn import flash_attn_interface as flash

        *tensors, at = saved
        dq, dk, dv = (x.new_empty(x.shape) for x in tensors[:3])
        flash._flash_attn_varlen_backward(
            d_out, *tensors, dq, dk, dv, *at[:4], dropout_p=0.0, softmax_scale=at.scale,
            causal=at.causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
            alibi_slopes=None, deterministic=True,
        )  # fmt: skip
        return dq, dk, dv


_LIBRARIES: dict[str, Any] = {"torch": TorchFlash, "flash-attn": FlashAttn}


def flash_for(q: Tensor, k: Tensor) -> SegmentAttention:
    """The faster of the libraries that are there, for heads of this form."""
    name = _fastest(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])
    flash: SegmentAttention = _LIBRARIES[name]()
    return flash


@functools.cache
def _fastest(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> str:  # fmt: skip
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return "torch"
    key = (
        f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}, flash-attn {version}; "
        f"{dtype}, {heads} and {kv_heads} heads of {dim}"
    )
    name = measured.kept("attention_libraries", key)
    if name not in _LIBRARIES:
        taken = {n: _time(make(), device, dtype, heads, kv_heads, dim)
                 for n, make in _LIBRARIES.items()}  # fmt: skip
        name = "flash-attn" if taken["flash-attn"] <= _GAIN * taken["torch"] else "torch"
        measured.keep("attention_libraries", key, name)
        logger.info("varlen attention by %s: %s ms for %s", name, taken, key)
    return str(name)


def _time(
    flash: SegmentAttention, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int,
    dim: int,
) -> float:  # fmt: skip
    """Milliseconds of forward and backward of some sequences, the best of five; infinite where it
    cannot run."""
    rows = _SEQUENCES * _ROWS
    q, k, v = (torch.randn(rows, h, dim, dtype=dtype, device=device)
               for h in (heads, kv_heads, kv_heads))  # fmt: skip
    cu = torch.arange(0, rows + 1, _ROWS, dtype=torch.int32, device=device)
    at = Segment(cu, cu, _ROWS, _ROWS, True, dim**-0.5)
    best = float("inf")
    try:
        for _ in range(6):  # the first loads kernels
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            out, lse = flash.forward(q, k, v, at)
            flash.backward(out, q, k, v, out, lse, at)
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end))
    except Exception as e:  # a build for another device or another torch
        logger.info("%s cannot run here: %s", type(flash).__name__, e)
        return float("inf")
    return best


class _Layout(NamedTuple):
    used: int  # rows that belong to a user
    soft: Tensor  # [n] int64, their soft rows
    of_soft: Context  # the soft rows as a pack of their own
    shared: Segment
    own: Segment


def _layout(context: Context) -> _Layout:
    num_fields, cu_seqlens = context.num_fields, context.cu_seqlens
    if context.window > 0 or context.softcap > 0.0:
        raise UnsupportedError(
            "soft_prompt_attention: impl='varlen' has neither window nor softcap, got "
            f"window={context.window}, softcap={context.softcap}; use impl='triton'"
        )
    used = int(cu_seqlens[-1])
    segment = context.segment[:used]
    if bool((segment > num_fields).any()):
        raise UnsupportedError(
            "soft_prompt_attention: impl='varlen' reads behaviour as one sequence, but a segment "
            f"is over num_fields={num_fields} (independent items); use impl='triton'"
        )
    is_soft = segment < num_fields
    soft = is_soft.nonzero().squeeze(1)
    before = torch.nn.functional.pad(is_soft.cumsum(0, dtype=torch.int32), (1, 0))
    of_soft = context._replace(
        segment=segment[soft], cu_seqlens=before[cu_seqlens.long()], position=context.position[soft]
    )
    prefix = len(context.prefix_segment)
    ends = cu_seqlens.new_tensor([0, used]), cu_seqlens.new_tensor([0, prefix])
    longest = context.max_seqlen or int(cu_seqlens.diff().amax())
    return _Layout(
        used,
        soft,
        of_soft,
        Segment(*ends, used, prefix, False, context.scale),
        Segment(cu_seqlens, cu_seqlens, longest, longest, True, context.scale),
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, context: Context, kernels: Any, flash: SegmentAttention
) -> tuple[Tensor, Tensor]:
    """out [T, H, d] and natural-log lse [H, T]; `kernels.forward` does the pack of soft rows."""
    at = _layout(context)
    full_out = q.new_zeros(q.shape)
    full_lse = q.new_zeros(
        q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32)
    )
    if at.used == 0:
        return full_out, full_lse
    rows, keys, values = (x[: at.used] for x in (q, k, v))
    out, lse = flash.forward(rows, keys, values, at.own)
    if context.prefix_k.shape[0] > 0:
        out_a, lse_a = flash.forward(rows, context.prefix_k, context.prefix_v, at.shared)
        merged = torch.logaddexp(lse_a, lse)
        share_a, share_b = ((x - merged).exp().T.unsqueeze(2) for x in (lse_a, lse))
        out, lse = (share_a * out_a + share_b * out).to(q.dtype), merged
    soft_out, _ = kernels.forward(q[at.soft], k[at.soft], v[at.soft], at.of_soft)
    full_out[: at.used] = out
    full_out[at.soft] = soft_out
    full_lse[:, : at.used] = lse
    return full_out, full_lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Context,
    kernels: Any, flash: SegmentAttention,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [T, H, d], dk and dv [T, Hkv, d]."""
    at = _layout(context)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    if at.used == 0:
        return dq, dk, dv
    rows, keys, values, result = (x[: at.used] for x in (q, k, v, out))
    grad, row_lse = d_out[: at.used].clone(), lse[:, : at.used].clone()
    grad[at.soft] = 0.0
    row_lse[:, at.soft] = torch.inf
    parts = flash.backward(grad, rows, keys, values, result, row_lse, at.own)
    for full, part in zip((dq, dk, dv), parts, strict=True):
        full[: at.used] = part
    if context.prefix_k.shape[0] > 0:
        prefix = context.prefix_k, context.prefix_v
        dq[: at.used] += flash.backward(grad, rows, *prefix, result, row_lse, at.shared)[0]
    soft = tuple(x[at.soft] for x in (q, k, v))
    soft_out, soft_lse = kernels.forward(*soft, at.of_soft)
    grads = kernels.backward(d_out[at.soft], *soft, soft_out, soft_lse, at.of_soft)
    for full, part in zip((dq, dk, dv), grads, strict=True):
        full[at.soft] += part
    return dq, dk, dv

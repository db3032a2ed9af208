"""The packed LM input: vocabulary rows and soft-prompt rows, laid out by a plan.

    x[t] = scale * token_embedding[plan[t]]   plan[t] >= 0
    x[t] = soft_rows[-(plan[t] + 1)]          plan[t] <  0
    x[t] = 0                                  plan[t] == SLACK_ROW

The vocabulary is frozen. A soft row's gradient is the sum over its occurrences in plan order: no
atomics, so it is bitwise repeatable, also when chunks of a long history or users with the same
codeword share a row. An id out of range is refused on the CPU; on a GPU, where a check would cost a
host sync, nothing is read out of bounds and the row is filled with NaN, which no loss survives
unnoticed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from userip_fast.ops._dispatch import by_device, resolve
from userip_fast.ops._operator import differentiable, operator
from userip_fast.ops._triton import why_not as why_not_triton

_OP = "prepend_soft_prompts"
SLACK_ROW = -(2**31)
"""Plan entry of a row that belongs to no user."""


def _soft_occurrences(plan: Tensor, num_soft_rows: int) -> tuple[Tensor, Tensor]:
    """Soft row r fills rows `order[bounds[r]:bounds[r + 1]]` of x, in plan order; no sync."""
    row = -(plan.long() + 1)
    row = row.masked_fill((plan >= 0) | (row >= num_soft_rows), num_soft_rows)
    ordered, order = row.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_soft_rows + 1, device=plan.device))


def _check_ids(plan: Tensor, vocabulary: int, num_soft_rows: int) -> None:
    bad = (plan >= vocabulary) | ((plan < -num_soft_rows) & (plan != SLACK_ROW))
    if bool(bad.any()):
        t = int(bad.nonzero()[0])
        raise ValueError(
            f"{_OP}: plan entries must be a vocabulary id in [0, {vocabulary}), a soft row in "
            f"[-{num_soft_rows}, -1] or SLACK_ROW; plan[{t}] is {int(plan[t])}"
        )


def prepend_soft_prompts_reference(
    token_embedding: Tensor, soft_rows: Tensor, plan: Tensor, scale: float = 1.0
) -> Tensor:
    """The oracle: x [T, D] in the dtype of `token_embedding`."""
    _check_ids(plan, token_embedding.shape[0], soft_rows.shape[0])
    x = token_embedding.new_zeros(plan.shape[0], token_embedding.shape[1])
    token, soft = plan >= 0, (plan < 0) & (plan != SLACK_ROW)
    # Hugging Face's scaled embeddings round the scale to the weight's dtype before they multiply.
    x[token] = token_embedding[plan[token].long()] * token_embedding.new_tensor(scale)
    x[soft] = soft_rows[-(plan[soft].long() + 1)].to(x.dtype)
    return x


def prepend_soft_prompts_backward_reference(
    d_x: Tensor, plan: Tensor, num_soft_rows: int, dtype: torch.dtype
) -> Tensor:
    """The oracle's d_soft_rows [R, D]: a row's occurrences summed in plan order, in fp32."""
    acc = torch.promote_types(d_x.dtype, torch.float32)
    order, bounds = _soft_occurrences(plan, num_soft_rows)
    used = order[: int(bounds[-1])]
    if used.numel() == 0:
        return d_x.new_zeros(num_soft_rows, d_x.shape[1], dtype=dtype)
    return torch.segment_reduce(d_x[used].to(acc), "sum", offsets=bounds, axis=0).to(dtype)


@operator(
    _OP,
    prepend_soft_prompts_reference,
    fake=lambda table, soft_rows, plan, *_: table.new_empty(plan.shape[0], table.shape[1]),
)
def _forward(*args: Any) -> Tensor:
    from userip_fast.kernels import prepend_soft_prompts as kernels

    *inputs, _ = args
    return kernels.forward(*inputs)


@operator(
    "prepend_soft_prompts_backward",
    prepend_soft_prompts_backward_reference,
    fake=lambda d_x, plan, rows, dtype, _: d_x.new_empty(rows, d_x.shape[1], dtype=dtype),
)
def _gradient(
    d_x: Tensor, plan: Tensor, num_soft_rows: int, dtype: torch.dtype, impl: str
) -> Tensor:
    from userip_fast.kernels import prepend_soft_prompts as kernels

    return kernels.backward(d_x, *_soft_occurrences(plan, num_soft_rows), num_soft_rows, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, soft_rows, plan, _, ctx.impl = inputs
    ctx.save_for_backward(plan)
    ctx.num_soft_rows, ctx.dtype = soft_rows.shape[0], soft_rows.dtype


def _backward(ctx: Any, d_x: Tensor) -> tuple[None, Tensor]:
    (plan,) = ctx.saved_tensors
    return None, _gradient(d_x, plan, ctx.num_soft_rows, ctx.dtype, ctx.impl)


_prepend = differentiable(_forward, _setup_context, _backward)


def _why_not_triton(token_embedding: Tensor, soft_rows: Tensor) -> str | None:
    dtypes = (token_embedding.dtype, soft_rows.dtype)
    if torch.float64 in dtypes:
        return "it computes in float32, a tensor is float64"
    if torch.bfloat16 in dtypes and token_embedding.device.type == "cpu":
        return "Triton's interpreter truncates to bfloat16 instead of rounding"
    return why_not_triton(token_embedding)


def prepend_soft_prompts(
    token_embedding: Tensor,
    soft_rows: Tensor,
    plan: Tensor,
    *,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Packed input embeddings from token ids and soft-prompt rows.

    Args:
        token_embedding: [V, D] fp32/bf16/fp16, frozen.
        soft_rows: [R, D], any floating dtype (cast to that of `token_embedding`). Differentiable.
        plan: [T] int32: a vocabulary id, `-(r + 1)` for soft row r, or `SLACK_ROW` for zeros.
        scale: Multiplies vocabulary rows only, rounded to their dtype first, as Gemma's embedding
            module does.
        impl: "auto", "triton" or "reference".

    Returns:
        x: [T, D] in the dtype of `token_embedding`.

    Raises:
        ValueError: A shape, dtype or (on the CPU) an id breaks the rules above.
    """
    if (
        token_embedding.dim() != 2
        or soft_rows.dim() != 2
        or token_embedding.shape[1] != soft_rows.shape[1]
    ):
        raise ValueError(
            f"{_OP}: token_embedding [V, D] and soft_rows [R, D] must share D, got "
            f"{tuple(token_embedding.shape)} and {tuple(soft_rows.shape)}"
        )
    if not token_embedding.is_floating_point() or not soft_rows.is_floating_point():
        raise ValueError(
            f"{_OP}: token_embedding and soft_rows must be floating point, got "
            f"{token_embedding.dtype} and {soft_rows.dtype}"
        )
    if token_embedding.requires_grad:
        raise ValueError(f"{_OP}: token_embedding is frozen, it requires grad; detach it")
    if plan.dim() != 1 or plan.dtype != torch.int32:
        raise ValueError(f"{_OP}: plan must be int32 [T], got {plan.dtype} {tuple(plan.shape)}")
    if not token_embedding.device == soft_rows.device == plan.device:
        raise ValueError(
            f"{_OP}: all tensors must be on one device, got {token_embedding.device}, "
            f"{soft_rows.device} and {plan.device}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"{_OP}: scale must be finite, got {scale}")
    if token_embedding.stride(1) != 1 or soft_rows.stride(1) != 1:
        raise ValueError(
            f"{_OP}: the last dimension of token_embedding and soft_rows must be contiguous, their "
            f"strides are {token_embedding.stride()} and {soft_rows.stride()}; call .contiguous()"
        )
    found = by_device(token_embedding, triton=lambda: _why_not_triton(token_embedding, soft_rows))
    x: Tensor = _prepend(token_embedding, soft_rows, plan, scale, resolve(_OP, impl, found))
    return x

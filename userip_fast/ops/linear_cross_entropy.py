"""Frozen LM head and token negative log-likelihood on loss rows only, without full logits.

    nll[u] = - sum_{r in rows of u} w_r * log softmax(softcap(scale (hidden_r W^T + b)))[target_r]

The head is frozen, so there is no weight gradient. Logits exist for one chunk of rows at a time and
are overwritten by their own gradient, which is multiplied into `d_hidden` at once: the backward
pass is a per-user scale. Source: chunk-and-overwrite as in Liger Kernel's fused linear cross
entropy, without dW.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from userip_fast.ops import _triton
from userip_fast.ops._dispatch import WhyNot, by_device, extension, resolve, why_not_cpu
from userip_fast.ops._operator import differentiable, operator
from userip_fast.ops._products import product

_CHUNK_BYTES = 64 << 20  # logits of one chunk: the scratch, whatever vocabulary and rows


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, loss_weight: Tensor, cu_rows: Tensor,
    bias: Tensor | None = None, softcap: float = 0.0, scale: float = 1.0, need_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: `linear_cross_entropy`'s nll [U] fp32, and d_hidden [R, D] (or [0, D])."""
    rows, dim = hidden.shape
    token_nll = hidden.new_empty(rows, dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if need_grad else hidden.new_empty(0, dim)
    step = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    for i in range(0, rows, step):
        part = slice(i, i + step)
        logits = (hidden[part] @ weight.T).float()
        if bias is not None:
            logits += bias.float()
        logits.mul_(scale)
        if softcap > 0.0:
            logits.div_(softcap).tanh_()
            slope = 1 - logits.square()
            logits.mul_(softcap)
        lse = logits.logsumexp(1)
        picked = target[part].unsqueeze(1)
        token_nll[part] = (lse - logits.gather(1, picked).squeeze(1)) * loss_weight[part]
        if need_grad:
            logits.sub_(lse.unsqueeze(1)).exp_()  # probabilities, then the gradient of the NLL
            logits.scatter_add_(1, picked, logits.new_full(picked.shape, -1.0))
            logits.mul_(loss_weight[part].unsqueeze(1))
            if softcap > 0.0:
                logits.mul_(slope)
            d_hidden[part] = logits.mul_(scale).to(weight.dtype) @ weight
    return _sums(token_nll, cu_rows), d_hidden


def _sums(token_nll: Tensor, cu_rows: Tensor) -> Tensor:
    # `unsafe`: a look at the offsets would wait for the device, and end a graph's capture.
    return torch.segment_reduce(token_nll, "sum", offsets=cu_rows, unsafe=True)


def _fake(hidden: Tensor, weight: Tensor, target: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _, cu_rows, *_, need_grad, _ = others
    nll = hidden.new_empty(cu_rows.shape[0] - 1, dtype=torch.float32)
    return nll, hidden.new_empty(hidden.shape[0] if need_grad else 0, hidden.shape[1])


@operator("linear_cross_entropy", linear_cross_entropy_reference, fake=_fake)
def _linear_cross_entropy(*args: Any) -> tuple[Tensor, Tensor]:
    """As the reference, with the element-wise half of a chunk in one pass over it, and `scale` in
    the products, before they are rounded.

    On CPU products are in fp32 whatever the dtype (16 bits take a scalar path there), the head
    being widened a block of the vocabulary at a time.
    """
    hidden, weight, target, loss_weight, cu_rows, bias, softcap, scale, need_grad, impl = args
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    wide = impl == "cpu"
    dtype = torch.float32 if wide else hidden.dtype
    step = max(1, min(rows, _CHUNK_BYTES // (dtype.itemsize * vocab)))
    columns = vocab if weight.dtype == dtype else max(1, _CHUNK_BYTES // (4 * dtype.itemsize * dim))
    target, loss_weight = target.contiguous(), loss_weight.contiguous()
    bias = None if bias is None else (bias * scale).to(dtype).contiguous()
    token_nll = hidden.new_empty(rows, dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if need_grad else hidden.new_empty(0, dim)
    whole = wide and weight.dtype == dtype
    scratch = hidden.new_empty(0 if whole else step, vocab, dtype=dtype)
    for i in range(0, rows, step):
        part = slice(i, min(rows, i + step))
        h = hidden[part].to(dtype)
        logits = scratch[: h.shape[0]]  # of none where products make their own: the last is freed
        if whole:
            logits = product(h if scale == 1 else h * scale, weight)
        for v in range(0, 0 if whole else vocab, columns):
            block = slice(v, v + columns)
            logits[:, block].addmm_(h, weight[block].to(dtype).T, beta=0, alpha=scale)
        of_rows = (target[part], loss_weight[part], token_nll[part])
        if impl == "triton":
            from userip_fast.kernels.linear_cross_entropy import cross_entropy_rows

            cross_entropy_rows(logits, bias, *of_rows, softcap, need_grad)
        else:
            sizes = (len(h), vocab)
            extension("cross_entropy_rows", logits, *sizes, bias, softcap, *of_rows, need_grad)
        if need_grad:
            gradient = product(logits[:, :columns], weight[:columns].to(dtype).t())
            if scale != 1:
                gradient *= scale
            for v in range(columns, vocab, columns):
                block = slice(v, v + columns)
                gradient.addmm_(logits[:, block], weight[block].to(dtype), alpha=scale)
            d_hidden[part] = gradient
    return _sums(token_nll, cu_rows), d_hidden


def scratch_bytes(device_type: str, hidden: Tensor, weight: Tensor, *, need_grad: bool) -> int:
    """Memory that a call uses at most beside its results, for `userip_fast.lm.memory`."""
    (rows, dim), vocab = hidden.shape, weight.shape[0]
    size = 4 if device_type == "cpu" else hidden.dtype.itemsize
    step = max(1, min(rows, _CHUNK_BYTES // (size * vocab)))
    widened = 0 if weight.dtype.itemsize == size else min(_CHUNK_BYTES // 4, 4 * vocab * dim)
    return step * (vocab + dim * need_grad) * size + widened


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[4])
    ctx.set_materialize_grads(False)  # d_hidden has none, which would be zeros else


def _backward(ctx: Any, grad_nll: Tensor, _: None) -> tuple[Tensor]:
    d_hidden, cu_rows = ctx.saved_tensors
    per_row = torch.repeat_interleave(
        grad_nll, cu_rows.diff(), output_size=d_hidden.shape[0]
    ).unsqueeze(1)
    return ((d_hidden * per_row).to(d_hidden.dtype),)


_with_gradient = differentiable(_linear_cross_entropy, _setup_context, _backward)


def _candidates(hidden: Tensor) -> dict[str, WhyNot]:
    return by_device(
        hidden,
        cpu=lambda: why_not_cpu(hidden, "cross_entropy_rows"),
        triton=lambda: _triton.why_not(hidden),
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_weight: Tensor,
    cu_rows: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Per-user weighted token NLL through a frozen LM head.

    Args:
        hidden: [R, D] fp32/bf16/fp16, final hidden states of the rows that predict a loss token.
            Differentiable.
        weight: [V, D], same dtype as `hidden`, the frozen head (must not require grad).
        target: [R] int64, token ids in [0, V). Checked on CPU; on CUDA one out of range gives NaN.
        loss_weight: [R] fp32, weight of each token's NLL.
        cu_rows: [U + 1] int64, rows of user u are `cu_rows[u]:cu_rows[u + 1]`; 0 first, R last.
        bias: [V] or None.
        softcap: Final logit soft cap `s * tanh(logits / s)` as in Gemma 2; 0 for none.
        scale: Multiplies the logits, bias included, before the soft cap: Cohere's logit_scale,
            1 / Granite's logits_scaling.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        nll: [U] fp32, in nats; 0 for a user without rows.

    Raises:
        ValueError: A shape, dtype or argument breaks the rules above.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden [R, D] and weight [V, D] must share D, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden and weight must share a dtype, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("linear_cross_entropy: weight and bias are frozen; they require grad")
    rows = hidden.shape[0]
    if target.shape != (rows,) or target.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: target must be int64 [{rows}], got {target.dtype} "
            f"{tuple(target.shape)}"
        )
    if loss_weight.shape != (rows,) or loss_weight.dtype != torch.float32:
        raise ValueError(
            f"linear_cross_entropy: loss_weight must be float32 [{rows}], got "
            f"{loss_weight.dtype} {tuple(loss_weight.shape)}"
        )
    if cu_rows.dim() != 1 or cu_rows.shape[0] < 1 or cu_rows.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: cu_rows must be int64 [U + 1], got "
            f"{cu_rows.dtype} {tuple(cu_rows.shape)}"
        )
    if hidden.device.type == "cpu":  # on CUDA a check would wait for the device
        if rows and not (int(target.min()) >= 0 and int(target.max()) < weight.shape[0]):
            raise ValueError(
                f"linear_cross_entropy: target must be in [0, {weight.shape[0]}), got "
                f"{int(target.min())} .. {int(target.max())}"
            )
        if int(cu_rows[0]) != 0 or int(cu_rows[-1]) != rows or bool((cu_rows.diff() < 0).any()):
            raise ValueError(
                f"linear_cross_entropy: cu_rows must rise from 0 to {rows}, got {cu_rows.tolist()}"
            )
    if not math.isfinite(scale) or scale == 0.0:
        raise ValueError(f"linear_cross_entropy: scale must be finite and not 0, got {scale}")
    chosen = resolve("linear_cross_entropy", impl, _candidates(hidden))
    need_grad = hidden.requires_grad and torch.is_grad_enabled()
    nll: Tensor = _with_gradient(
        hidden, weight, target, loss_weight, cu_rows, bias, softcap, scale, need_grad, chosen
    )[0]
    return nll

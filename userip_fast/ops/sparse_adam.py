"""Fused Adam on the soft-prompt rows of one pack, each row with its own step count.

    t = step[r] + 1
    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
    theta = theta - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Rows that are not named keep their bits. A global step would over-step rows that join late; here a
row's first update has the size of a first step whenever it comes. Source: Adam (arXiv 1412.6980),
algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from userip_fast.core import _extension
from userip_fast.ops import _triton
from userip_fast.ops._dispatch import WhyNot, by_device, extension, resolve
from userip_fast.ops._operator import operator


def sparse_adam_reference(
    theta: Tensor, m: Tensor, v: Tensor, step: Tensor, rows: Tensor, grad: Tensor,
    lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """The oracle: updates theta, m, v and step in place."""
    g = grad.float()
    t = step[rows] + 1
    m_rows = m[rows].mul_(beta1).add_(g, alpha=1 - beta1)
    v_rows = v[rows].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    # Bias corrections in double: 1 - 0.999 would lose three digits in fp32.
    step_size = (lr / (1 - beta1 ** t.double())).float().unsqueeze(1)
    root = (1 - beta2 ** t.double()).sqrt().float().unsqueeze(1)
    update = step_size * m_rows / (v_rows.sqrt() / root + eps)
    theta[rows] = theta[rows] - update
    m[rows] = m_rows
    v[rows] = v_rows
    step[rows] = t


@operator(
    "sparse_adam",
    sparse_adam_reference,
    fake=lambda *_: None,
    mutates=("theta", "m", "v", "step"),
)
def _sparse_adam(*args: Any) -> None:
    *state, rows, grad, lr, beta1, beta2, eps, impl = args
    if impl == "triton":
        from userip_fast.kernels import sparse_adam as kernel

        kernel.sparse_adam(*args[:-1])
    else:
        dense = (rows.contiguous(), grad.float().contiguous())
        sizes = (len(rows), *state[0].shape)
        extension("sparse_adam", *state, *dense, *sizes, lr, beta1, beta2, eps)


def _candidates(theta: Tensor) -> dict[str, WhyNot]:
    def cpu() -> str | None:
        return "theta is not on the CPU" if theta.device.type != "cpu" else _extension.why_not()

    return by_device(theta, cpu, triton=lambda: _triton.why_not(theta))


def sparse_adam(
    theta: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    rows: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    impl: str = "auto",
) -> None:
    """One Adam step on the named rows, in place.

    Args:
        theta: [N, D] fp32, contiguous; updated.
        m: [N, D] fp32, first moments; updated.
        v: [N, D] fp32, second moments; updated.
        step: [N] int32, number of updates each row has had; updated.
        rows: [R] int64, distinct, in [0, N). Checked on CPU; on CUDA it is the caller's promise,
            since a check would wait for the device.
        grad: [R, D] fp32, bf16 or fp16, gradient of row `rows[i]`.
        lr: Learning rate.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the denominator.
        impl: "auto", "triton", "cpu" or "reference".

    Raises:
        ValueError: A shape, dtype, layout or value breaks the rules above.
    """
    if theta.dim() != 2:
        raise ValueError(f"sparse_adam: theta must be [N, D], got {tuple(theta.shape)}")
    n, dim = theta.shape
    for name, t in (("theta", theta), ("m", m), ("v", v)):
        if t.shape != (n, dim) or t.dtype != torch.float32 or not t.is_contiguous():
            raise ValueError(
                f"sparse_adam: {name} must be contiguous float32 [{n}, {dim}], got {t.dtype} "
                f"{tuple(t.shape)} with strides {t.stride()}"
            )
    if step.shape != (n,) or step.dtype != torch.int32 or not step.is_contiguous():
        raise ValueError(
            f"sparse_adam: step must be contiguous int32 [{n}], got {step.dtype} "
            f"{tuple(step.shape)}"
        )
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(
            f"sparse_adam: rows must be int64 [R], got {rows.dtype} {tuple(rows.shape)}"
        )
    if grad.shape != (rows.shape[0], dim) or not grad.is_floating_point():
        raise ValueError(
            f"sparse_adam: grad must be floating [{rows.shape[0]}, {dim}], got {grad.dtype} "
            f"{tuple(grad.shape)}"
        )
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0):
        raise ValueError(
            f"sparse_adam: betas must be in [0, 1) and eps >= 0, got {beta1}, {beta2}, {eps}"
        )
    if rows.device.type == "cpu" and rows.numel():
        ordered = rows.sort().values
        low, high = int(ordered[0]), int(ordered[-1])
        if low < 0 or high >= n:
            raise ValueError(f"sparse_adam: rows must be in [0, {n}), got {low} .. {high}")
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise ValueError("sparse_adam: rows must be distinct; sum the gradients of repeats")
    chosen = resolve("sparse_adam", impl, _candidates(theta))
    with torch.no_grad():
        _sparse_adam(theta, m, v, step, rows, grad, lr, beta1, beta2, eps, chosen)

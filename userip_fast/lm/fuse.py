"""Puts the fused element-wise ops into an unmodified Hugging Face model, where they do the same.

Four kinds of module are looked for, and each class is tried on random input before it is touched:
RMSNorms (`weight` and an epsilon), gated MLPs (`gate_proj`, `up_proj`, `down_proj`, `act_fn`),
attention that calls `apply_rotary_pos_emb`, and frozen fp32 linears (`ops/_products.py`). Of a
module that passes, `forward` is overridden on the instance; its class, other models and the library
stay as they are. Attention runs its own code with another RoPE in the place of that name. What does
not pass is left alone and named in the log.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from userip_fast.lm.bf16 import ATTRIBUTE
from userip_fast.ops._products import frozen_linear
from userip_fast.ops.frozen_block import candidates, gated, rms_norm, rotate

logger = logging.getLogger("userip_fast.lm")

_ROPE = "apply_rotary_pos_emb"
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh",
                "PytorchGELUTanh": "gelu_tanh"}  # fmt: skip


@dataclass(frozen=True)
class _Candidate:
    """An override of `forward`, and a comparison with what it replaces."""

    forward: Callable[..., Any]
    compare: Callable[[], tuple[Any, Any]]  # (as it is, fused), on random input


def fuse(model: nn.Module, impl: str = "auto", *, try_out: bool = True) -> Counter[str]:
    """Overrides `forward` of the modules that can be fused, in place.

    Args:
        model: A frozen model, after its linears have settled.
        impl: Implementation of the ops.
        try_out: Whether each class is first compared with the op on random input; without, on the
            `meta` device, the look of a module is enough.

    Returns:
        How many modules of each class were fused.
    """
    fused: Counter[str] = Counter()
    same: dict[type, bool] = {}
    like = next(p for p in model.parameters() if p.dtype.itemsize > 1)
    for name, module in model.named_modules():
        kind = type(module)
        if not same.get(kind, True):
            continue
        candidate = None
        try:
            candidate = _candidate(module, like, impl)
            if candidate is not None and kind not in same:
                same[kind] = not try_out or _close(*candidate.compare())
                if not same[kind]:
                    logger.info(
                        "%s (%s) is not what is fused: it runs as it is", kind.__name__, name
                    )
        except Exception as e:  # a library's class of another build than those it was made for
            same[kind] = False
            logger.warning(
                "%s (%s) cannot be fused (%s: %s): it runs as it is",
                kind.__name__,
                name,
                type(e).__name__,
                e,
            )
        if candidate is not None and same[kind]:
            candidate.forward.userip_fused = True  # type: ignore[attr-defined]
            module.forward = MethodType(candidate.forward, module)
            fused[kind.__name__] += 1
    return fused


def pays(like: Tensor) -> bool:
    """Whether there are kernels for tensors like this one; the references would gain nothing."""
    first = next(iter(candidates(like).values()))
    return first() is None


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` has overridden its `forward`."""
    forward = getattr(module.__dict__.get("forward"), "__func__", None)
    return bool(getattr(forward, "userip_fused", False))


def unfuse(model: nn.Module) -> None:
    """Takes the overrides out again; the model computes with its own code."""
    for module in model.modules():
        if is_fused(module):
            del module.__dict__["forward"]


def _candidate(module: Any, like: Tensor, impl: str) -> _Candidate | None:
    if "RMSNorm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
        return _norm(module, impl)
    if type(module) is nn.Linear:
        return _linear(module, like)
    if all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return _mlp(module, like, impl)
    forward: Any = inspect.unwrap(type(module).forward)
    if hasattr(module, "head_dim") and _ROPE in forward.__code__.co_names:
        return _attention(module, forward, like, impl)
    return None


def _linear(module: Any, like: Tensor) -> _Candidate | None:
    """Its weight is frozen: the product may be any library's, and wants a gradient of x alone."""
    if module.weight.dtype != torch.float32 or module.weight.requires_grad:
        return None

    def forward(self: Any, input: Tensor) -> Tensor:
        half = getattr(self, ATTRIBUTE, None)
        if half is not None and not torch.is_grad_enabled():
            y = nn.functional.linear(input.to(half.dtype), half).float()
            return y if self.bias is None else y.add_(self.bias)
        return frozen_linear(input, self.weight, self.bias)

    def compare() -> tuple[Any, Any]:
        x = _random(like, 5, module.in_features)
        x[:, 16:] = 0.0  # libraries may sum in another order, which over few numbers hardly shows
        return type(module).forward(module, x), forward(module, x)

    return _Candidate(forward, compare)


def _norm(module: Any, impl: str) -> _Candidate:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6))
    # Gemma's weight is relative to 1; which it is shows at a weight of zero.
    with torch.no_grad():
        ones = torch.ones(2, module.weight.shape[0], dtype=module.weight.dtype)
        kept, module.weight.data = module.weight.data, torch.zeros_like(module.weight.data)
        try:
            offset = not kept.is_meta and bool(module(ones.to(kept.device)).abs().max() > 0.5)
        finally:
            module.weight.data = kept

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return rms_norm(hidden_states, weight, eps=eps, offset=float(offset), impl=impl)[0]

    forward.userip_norm = (float(eps), float(offset))  # type: ignore[attr-defined]

    def compare() -> tuple[Any, Any]:
        x = _random(module.weight, 6, module.weight.shape[0])
        x[:3] *= eps**0.5  # where the epsilon shows
        return module(x), forward(module, x)

    return _Candidate(forward, compare)


def _mlp(module: Any, like: Tensor, impl: str) -> _Candidate | None:
    act = _ACTIVATIONS.get(type(module.act_fn).__name__)
    if act is None:
        return None

    def forward(self: Any, x: Tensor) -> Any:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), act, impl=impl))

    forward.userip_act = act  # type: ignore[attr-defined]

    def compare() -> tuple[Any, Any]:
        x = _random(like, 1, 5, module.gate_proj.in_features)
        return module(x), forward(module, x)

    return _Candidate(forward, compare)


def _attention(module: Any, forward: Any, like: Tensor, impl: str) -> _Candidate | None:
    plain = forward.__globals__[_ROPE]
    if [*inspect.signature(plain).parameters][:4] != ["q", "k", "cos", "sin"]:
        return None  # of another family: turns one of them, or takes the angles otherwise

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """q, k [B, H, T, d], cos and sin [B or 1, T, d], as the library hands them over."""
        if args or kwargs or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            return plain(q, k, cos, sin, *args, **kwargs)
        batch, _, rows, dim = q.shape
        angles = [x.expand(batch, -1, -1).reshape(batch * rows, dim) for x in (cos, sin)]
        turned = (
            rotate(x.transpose(1, 2).reshape(batch * rows, -1, dim), *angles, impl=impl)
            for x in (q, k)
        )
        return tuple(x.view(batch, rows, -1, dim).transpose(1, 2) for x in turned)

    override = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROPE: rope},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    override.__kwdefaults__ = forward.__kwdefaults__

    def compare() -> tuple[Any, Any]:
        q, k = (_random(like, 2, heads, 5, module.head_dim) for heads in (4, 2))
        cos, sin = (_random(like, 2, 5, module.head_dim) for _ in range(2))
        try:
            turned = plain(q, k, cos, sin)
        except RuntimeError:  # it takes angles of another shape: half of them, or of a part of q
            return q.new_zeros(0), q
        return turned, rope(q, k, cos, sin)

    return _Candidate(override, compare)


def _random(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)


@torch.no_grad()
def _close(plain: Any, fused: Any) -> bool:
    """Within the roundings of the plain code, which in 16 bits rounds after every step."""
    pairs = zip(plain, fused, strict=True) if isinstance(plain, tuple) else ((plain, fused),)
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and float((a - b).abs().max()) <= 8 * torch.finfo(a.dtype).eps * float(a.abs().max())
        for a, b in pairs
    )

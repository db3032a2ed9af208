"""The attention function that unmodified Hugging Face models call on packed rows.

It is registered in `AttentionInterface` only, so no mask is ever built; what a row may see follows
from the segment ids in the `PackContext` in force: a context variable, as not every model hands
keyword arguments on to its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from userip_fast.core.errors import UnsupportedError
from userip_fast.lm.masks import Near, running
from userip_fast.ops import soft_prompt_attention

__all__ = ["KINDS", "NAME", "PackContext", "packed_attention", "reading", "register", "running"]

NAME = "userip_packed"
KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers, as configs call them, that this is all there is to."""


class Call(NamedTuple):
    """What a module asked of attention: [T, Hkv, d or dv] after RoPE, and near what."""

    module: int  # its id
    key: Tensor
    value: Tensor
    near: Near


@dataclass
class PackContext:
    """What attention needs to know of a pack. T rows, U users, P prefix rows.

    Attributes:
        segment, position: [T] int32.
        cu_seqlens: [U + 1] int32.
        prefix_segment, prefix_position: [P] int32.
        prefix: Of each attention module, by its id, one (keys, values) [P, Hkv, d or dv] after RoPE
            for each time it asks.
        near: What the masks of each module narrow by, by its id; nothing where it is not in it.
        calls: When a list, each call is appended to it.
        asked: How often each module has asked so far.
        stop: The function raises `Attended` instead of returning.
        attended: [R, H, dv], what the function returns instead of looking at its arguments.
        work_lists: Of the pack, made by the first layer that needs them.
    """

    segment: Tensor
    position: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_fields: int
    prefix_segment: Tensor
    prefix_position: Tensor
    prefix: Mapping[int, list[tuple[Tensor, Tensor]]] | None = None
    near: Mapping[int, Near] = field(default_factory=dict)
    calls: list[Call] | None = field(default=None, repr=False)
    asked: dict[int, int] = field(default_factory=dict)
    stop: bool = False
    attended: Tensor | None = None
    impl: str = "auto"
    work_lists: dict[tuple[int, bool], Tensor] = field(default_factory=dict, repr=False)


_CURRENT: ContextVar[PackContext | None] = ContextVar("pack", default=None)


@contextmanager
def reading(context: PackContext) -> Iterator[None]:
    """Within it, attention is of this pack."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def again(model: Any) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a layer's first run and of its recomputation, which may be in another thread and
    in another order, as torch's checkpoint wants them: of the same pack, or, where the model ran
    with other attention (`running`), with that."""
    now = _CURRENT.get()
    if now is None:
        return nullcontext(), running(model, model.config.get_text_config()._attn_implementation)
    return nullcontext(), reading(replace(now, asked=dict(now.asked)))


class Attended(Exception):  # noqa: N818 - a way out, not an error
    """Carries the attention output [T, H, dv] out of a layer that goes no further."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out


def current() -> PackContext:
    """The context in force."""
    context = _CURRENT.get()
    if context is None:
        raise UnsupportedError(
            f"attention {NAME!r} is for the packed engine alone; "
            "model.set_attn_implementation('eager') lets the model run by itself"
        )
    return context


# What models pass on beside what the function reads, and what changes nothing here.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions"}


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, d], key [1, Hkv, T, d], value [1, Hkv, T, dv], RoPE applied, and `s_aux` [H],
    the heads' sinks; returns [1, T, H, dv]."""
    context, name = current(), type(module).__name__
    if attention_mask is not None or dropout:
        raise UnsupportedError(
            f"{name} brings its own attention mask or dropout ({dropout}), which "
            "the packed engine does not support; use em.engine=reference"
        )
    unknown = [name for name, x in others.items() if x is not None and name not in _HARMLESS]
    if unknown or is_causal is False:
        raise UnsupportedError(
            f"{name} asks attention for {unknown[0] if unknown else 'no mask'!r}, "
            "which the packed engine does not support; use em.engine=reference"
        )
    if context.attended is not None:
        return context.attended.unsqueeze(0), None
    near = context.near.get(id(module), Near())
    if sliding_window and near.window != sliding_window and context.near:
        raise UnsupportedError(
            f"{name} tells attention of a sliding window of {sliding_window}, and its masks are "
            f"of {near.window}; use em.engine=reference"
        )
    # [T, H, d], strided; `x[0]` would fill zeros and copy in backward.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if context.calls is not None:
        kept_k, kept_v = (x.detach().contiguous() for x in (k, v))
        context.calls.append(Call(id(module), kept_k, kept_v, near))
    if context.prefix is None:
        prefix_k, prefix_v = k[:0].detach(), v[:0].detach()
    else:
        time = context.asked.get(id(module), 0)
        context.asked[id(module)] = time + 1
        prefix_k, prefix_v = context.prefix[id(module)][time]
    out = soft_prompt_attention(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        context.segment,
        context.prefix_segment,
        context.cu_seqlens,
        context.position,
        context.prefix_position,
        num_fields=context.num_fields,
        scale=float(q.shape[-1] ** -0.5 if scaling is None else scaling),
        window=near.window,
        softcap=float(softcap or 0.0),
        chunk=near.chunk,
        sinks=None if s_aux is None else s_aux.detach(),
        max_seqlen=context.max_seqlen,
        impl=context.impl,
    )
    if context.stop:
        raise Attended(out)
    return out.unsqueeze(0), None


def register() -> None:
    """Makes `attn_implementation="userip_packed"` known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)

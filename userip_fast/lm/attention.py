"""The attention function that unmodified Hugging Face models call on packed rows.

It is registered in `AttentionInterface` only, so no mask is ever built; what a row may see follows
from the segment ids in the `PackContext` that travels as a keyword argument of `model.forward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from userip_fast.errors import UnsupportedError
from userip_fast.ops import soft_prompt_attention

NAME = "userip_packed"


@dataclass
class PackContext:
    """What attention needs to know of a pack. T rows, U users, P prefix rows.

    Attributes:
        segment, position: [T] int32.
        cu_seqlens: [U + 1] int32.
        prefix_segment, prefix_position: [P] int32.
        prefix: Per layer (keys, values) [P, Hkv, d] after RoPE.
        capture: When a list, each layer appends its (keys, values) [T, Hkv, d] to it.
        windows: When a list, each layer appends its sliding window to it (0 for none).
        stop: The function raises `Attended` instead of returning.
        attended: [R, H, d], what the function returns instead of looking at its arguments.
        work_lists: Of the pack, made by the first layer that needs them.
    """

    segment: Tensor
    position: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_fields: int
    prefix_segment: Tensor
    prefix_position: Tensor
    prefix: list[tuple[Tensor, Tensor]] | None = None
    capture: list[tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    windows: list[int] | None = None
    stop: bool = False
    attended: Tensor | None = None
    impl: str = "auto"
    work_lists: dict[tuple[int, bool], Tensor] = field(default_factory=dict, repr=False)


class Attended(Exception):  # noqa: N818 - a way out, not an error
    """Carries the attention output [T, H, d] out of a layer that goes no further."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out


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
    userip: PackContext | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, d], key and value [1, Hkv, T, d], RoPE applied; returns [1, T, H, d]."""
    if userip is None:
        raise UnsupportedError(
            f"{type(module).__name__} does not pass keyword arguments on to attention, so the "
            "packed engine cannot run this model; use em.engine=reference"
        )
    if attention_mask is not None or dropout:
        raise UnsupportedError(
            f"{type(module).__name__} brings its own attention mask or dropout ({dropout}), which "
            "the packed engine does not support; use em.engine=reference"
        )
    unknown = [name for name, x in others.items() if x is not None and name not in _HARMLESS]
    if unknown or is_causal is False:
        raise UnsupportedError(
            f"{type(module).__name__} asks attention for {unknown[0] if unknown else 'no mask'!r}, "
            "which the packed engine does not support; use em.engine=reference"
        )
    if userip.attended is not None:
        return userip.attended.unsqueeze(0), None
    # [T, H, d], strided; `x[0]` would fill zeros and copy in backward.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if userip.capture is not None:
        userip.capture.append((k.detach().contiguous(), v.detach().contiguous()))
    if userip.windows is not None:
        userip.windows.append(int(sliding_window or 0))
    if userip.prefix is None:
        prefix_k = prefix_v = k.new_empty(0, k.shape[1], k.shape[2])
    else:
        prefix_k, prefix_v = userip.prefix[module.layer_idx]
    out = soft_prompt_attention(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        userip.segment,
        userip.prefix_segment,
        userip.cu_seqlens,
        userip.position,
        userip.prefix_position,
        num_fields=userip.num_fields,
        scale=float(q.shape[-1] ** -0.5 if scaling is None else scaling),
        window=int(sliding_window or 0),
        softcap=float(softcap or 0.0),
        max_seqlen=userip.max_seqlen,
        impl=userip.impl,
    )
    if userip.stop:
        raise Attended(out)
    return out.unsqueeze(0), None


def register() -> None:
    """Makes `attn_implementation="userip_packed"` known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


@contextmanager
def running(model: Any, implementation: str) -> Iterator[None]:
    """The model runs with another attention implementation inside it."""
    before = model.config.get_text_config()._attn_implementation
    if before != implementation:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if before != implementation:
            model.set_attn_implementation(before)

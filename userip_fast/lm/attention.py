"""The attention function that unmodified Hugging Face models call on packed rows.

It is registered in `AttentionInterface` only, so no mask is ever built; what a row may see follows
from the segment ids in the `PackContext` that travels as a keyword argument of `model.forward`.
"""

from __future__ import annotations

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
    impl: str = "auto"


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
    **_: Any,
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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d], strided
    if userip.capture is not None:
        userip.capture.append((k.detach().contiguous(), v.detach().contiguous()))
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
    return out.unsqueeze(0), None


def register() -> None:
    """Makes `attn_implementation="userip_packed"` known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)

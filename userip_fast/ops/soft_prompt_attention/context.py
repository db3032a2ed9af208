"""What the rows of a pack are read in: everything of a call but their own q, k and v."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Context(NamedTuple):
    """The arguments of `soft_prompt_attention` that are constant, under its names."""

    prefix_k: Tensor  # [P, Hkv, d]
    prefix_v: Tensor  # [P, Hkv, dv]
    segment: Tensor  # [T] int32, like all that follow but sinks
    prefix_segment: Tensor  # [P]
    cu_seqlens: Tensor  # [U + 1]
    position: Tensor  # [T]
    prefix_position: Tensor  # [P]
    sinks: Tensor | None  # [H]
    num_fields: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    chunk: int = 0
    max_seqlen: int = 0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that autograd is to keep; `Context(*tensors, *settings)` is the whole."""
        return self[:8]

    @property
    def settings(self) -> tuple[int | float, ...]:
        """The numbers."""
        return self[8:]

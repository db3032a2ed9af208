"""What the masks of a model narrow by: sliding windows, chunks, or nothing, layer by layer.

A config may name a window that no layer keeps, or keep from attention one that its masks have. So
the model is asked: it reads a few tokens with small numbers in the place of the config's, and what
masks it then hands to its attention says which rule each layer goes by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from userip_fast.core.errors import UnsupportedError

_NAME = "userip_masks"
_SIZES = {"sliding_window": 3, "attention_chunk_size": 4}
_ROWS = 9


class Near(NamedTuple):
    """Columns nearer than `window` rows, or of the same chunk; 0 for no such rule."""

    window: int = 0
    chunk: int = 0


def near_of_modules(model: Any) -> dict[int, Near]:
    """What each attention module's masks narrow by, by the module's id.

    Raises:
        UnsupportedError: A layer masks by another rule, or calls no attention function.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    seen: dict[int, tuple[str, Tensor | None]] = {}

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, None]:
        seen.setdefault(id(module), (type(module).__name__, attention_mask))
        heads = query.shape[1] // value.shape[1]
        return value.repeat_interleave(heads, 1).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["eager"])
    config = model.config.get_text_config()
    sizes = {name: int(getattr(config, name, None) or 0) for name in _SIZES}
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(_ROWS, device=embedding.device)[None] % embedding.shape[0]
    with torch.no_grad(), _small(config, sizes), running(model, _NAME):
        body(model)(input_ids=ids, use_cache=False)
    rows, columns = torch.arange(_ROWS)[:, None], torch.arange(_ROWS)
    causal = columns <= rows
    window, chunk = _SIZES.values()
    rules = [
        (Near(), causal),
        (Near(window=sizes["sliding_window"]), causal & (columns > rows - window)),
        (Near(chunk=sizes["attention_chunk_size"]), causal & (columns // chunk == rows // chunk)),
    ]
    if not seen:
        raise UnsupportedError(
            f"{type(model).__name__} does not call attention through transformers' attention "
            "interface"
        )
    found = {}
    for module, (name, mask) in seen.items():
        sees = _sees(mask, causal)
        of = [near for near, rule in rules if sees.shape == rule.shape and torch.equal(sees, rule)]
        if not of:
            raise UnsupportedError(f"{name} masks by another rule than windows or chunks")
        found[module] = of[0]
    return found


def body(model: Any) -> Any:
    """The part of a causal LM whose output is the hidden states after the last norm."""
    parts = (model.base_model, model.get_decoder(), getattr(model, "model", None))
    return next((part for part in parts if part is not None and part is not model), model)


def _sees(mask: Any, causal: Tensor) -> Tensor:
    if mask is None:
        return causal
    mask = mask.cpu()[..., : len(causal)].reshape(-1, *causal.shape)[0]
    return mask if mask.dtype == torch.bool else mask == 0


@contextmanager
def _small(config: Any, sizes: dict[str, int]) -> Iterator[None]:
    try:
        for name, size in sizes.items():
            if size:
                setattr(config, name, _SIZES[name])
        yield
    finally:
        for name, size in sizes.items():
            if size:
                setattr(config, name, size)


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

"""A user as the mean of the LM's hidden states: the cheap profile that any better one must beat."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from userip_fast.lm.engine import PackedEngine
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.packing import iter_packs


@torch.no_grad()
def mean_states(
    engine: PackedEngine, source: BehaviourSource, start: Tensor, pack_tokens: int = 8192
) -> Tensor:
    """[U, D] fp32, mean of the final hidden states over a user's behaviour rows.

    Args:
        start: [S, D], what stands in everyone's soft rows meanwhile.
    """
    lm, layout = engine.lm, engine.layout
    behaviour = source.block(lm.tokenizer, layout, 0, source.num_users)
    out = torch.zeros(source.num_users, lm.hidden_size)
    users = np.arange(source.num_users)
    for pack in iter_packs(behaviour, users, layout, lm.device, pack_tokens):
        hidden = engine.hidden_states(pack, start.expand(pack.num_users, -1, -1).to(lm.device))
        ends = pack.cu_seqlens.tolist()
        for u, a, b in zip(pack.users.tolist(), ends[:-1], ends[1:]):
            out[u] = hidden[a + layout.num_soft : b].float().mean(0).cpu()
    return out

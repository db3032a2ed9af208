"""What the gates of lossy products have in common: users that are read, and the clock.

Products that round more (`bf16.py`, `fp8.py`) are taken unasked only where they are faster here and
the LM reads a sample of users as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from userip_fast.lm.engine import PackedEngine
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.trace import Workload, sample_pack
from userip_fast.prompts.layout import Int32, Layout, ProfileField, PromptTemplate
from userip_fast.prompts.packing import Behaviour

_SECONDS = 3.0


def sample_layout(lm: FrozenLM, codes: int) -> Layout:
    """Prompts of one field of so many codes."""
    field = ProfileField("sample", "The user likes", 1, codes)
    return PromptTemplate((field,)).layout(lm.tokenizer)


def sample_users(ids: Int32, layout: Layout) -> Behaviour:
    """Users whose behaviour is token ids [U, n], all but the first with loss."""
    users, tokens = ids.shape
    weight = np.ones(ids.shape, np.float32)
    weight[:, 0] = 0.0
    return Behaviour(
        ids.ravel(),
        np.full(ids.size, layout.num_fields, np.int32),
        np.tile(layout.behaviour_start + np.arange(tokens, dtype=np.int32), users),
        weight.ravel(),
        np.arange(0, ids.size + 1, tokens),
        np.ones(users, np.int64),
    )


def step_seconds(lm: FrozenLM, work: Workload, *, gradient: bool = True) -> float:
    """Of one step on a pack of `work`, the fastest of as many as fit into a few seconds."""
    layout, pack = sample_pack(work, lm.device)
    engine = PackedEngine(lm, layout, probe=False)
    shape = pack.num_users, layout.num_soft, lm.hidden_size
    theta = torch.zeros(shape, device=lm.device, requires_grad=gradient)

    def step() -> None:
        with torch.set_grad_enabled(gradient):
            nll = engine.nll(pack, theta).sum()
            if gradient:
                torch.autograd.grad(nll, theta)

    return seconds(step, lm.device)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one call, the fastest of at least two and at most ten."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) < 10 and time.perf_counter() - began < _SECONDS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)

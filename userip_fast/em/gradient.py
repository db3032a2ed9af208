"""The gradient E-step (arXiv 2408.06577): a few Adam steps on each user's soft prompts, then codes.

All users of a field start at one shared point, inside the region of the embedding space that the LM
understands. Independent random starts would leave user-specific noise in every direction that the
gradient does not reach, and the nearest codeword would then read that noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.em.cache import BlockCache, MemoryCache, found_like
from userip_fast.em.steps import Block, EMState, Profiles
from userip_fast.lm.engine import Engine
from userip_fast.ops import sparse_adam
from userip_fast.prompts.packing import PackStream

_CACHE_BYTES = 1 << 30


class GradientEStep:
    """See the module.

    Args:
        engine: Scores packs.
        start: [S, D] fp32, the shared start of each soft row.
        config: Steps, learning rate, stopping, pack size.
        on_step: Called after each pack with (users, mean NLL per weight), for progress.
        cache: Keeps descents, which do not depend on the codebooks: later sweeps, and a run that
            goes on after a kill, reuse them. None keeps 1 GiB in memory.
    """

    def __init__(
        self,
        engine: Engine,
        start: Tensor,
        config: EMConfig,
        on_step: Callable[[int, float], None] | None = None,
        cache: BlockCache | None = None,
    ) -> None:
        self.engine, self.start, self.config = engine, start, config
        self.on_step = on_step
        self.cache: BlockCache = MemoryCache(_CACHE_BYTES) if cache is None else cache

    def run(self, block: Block, codebooks: list[Codebook] | None, state: EMState) -> Profiles:
        """See `EStep.run`."""
        theta, nll, cost = self._descent(block)
        codes = None
        if codebooks is not None:
            codes = assign(codebooks, theta, self.engine.layout.field_slices)
        return Profiles(block.hashes, codes, nll, block.weight, cost, theta)

    def _descent(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        key = block.digest()  # the same users may come again with another history
        start = self.start.cpu().expand(block.behaviour.num_users, -1, -1)
        users = start.shape[:1]
        like = {"theta": tuple(start.shape), "nll": tuple(users), "cost": tuple(users)}
        found = found_like(self.cache, "descents", key, like)
        if found is None:
            found = dict(zip(like, self._descend(block, start)))
            self.cache.put("descents", key, found)
        return found["theta"], found["nll"], found["cost"]

    def _descend(self, block: Block, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At most `steps` Adam steps per user; (theta [U, S, D], nll [U], forward equivalents [U]).

        A user leaves once its NLL per weight has not fallen by `tolerance` for `patience` steps,
        and the next one of the block enters the pack. NLL is what the last step saw: that of
        theta before it moved for the last time, as theta's own would take another pass.
        """
        config, lm, steps = self.config, self.engine.lm, self.config.steps
        users, soft, dim = start.shape
        theta = start.to(lm.device, torch.float32).clone(memory_format=torch.contiguous_format)
        rows = theta.view(users * soft, dim)
        m, v = torch.zeros_like(rows), torch.zeros_like(rows)
        step = torch.zeros(users * soft, dtype=torch.int32, device=lm.device)
        weight = block.weight.clamp_min(1e-9).float()

        best = torch.full((users,), float("inf"))
        last = torch.zeros(users)
        waited = torch.zeros(users, dtype=torch.int32)
        taken = torch.zeros(users)
        everyone = np.arange(users)
        stream = PackStream(
            block.behaviour, everyone, self.engine.layout, lm.device, config.pack_tokens
        )
        now: list[Tensor] = []  # NLL of the steps of this pack not looked at yet
        pack = None
        while (following := stream.next()) is not None:
            if following is not pack:
                pack = following
                index = torch.from_numpy(pack.users)
                here, own = index.to(lm.device), weight[index].to(lm.device)
                at = (here[:, None] * soft + torch.arange(soft, device=lm.device)).flatten()
            x = theta[here].requires_grad_()
            nll = self.engine.nll(pack, x)
            (grad,) = torch.autograd.grad((nll / own.to(nll)).sum(), x)
            sparse_adam(
                rows, m, v, step, at, grad.reshape(-1, dim), lr=config.lr * lm.embedding_rms
            )
            now.append(nll.detach())
            # Until somebody can leave nobody has to know, and the device is not waited for.
            if len(now) < self._sure_to_stay(taken[index], waited[index]):
                continue
            for nlls in torch.stack(now).cpu().float():
                last[index] = nlls
                of_step = nlls / weight[index]
                better = of_step < best[index] - config.tolerance
                waited[index] = torch.where(better, 0, waited[index] + 1)
                best[index] = torch.minimum(best[index], of_step)
                taken[index] += 1
                if self.on_step is not None:
                    self.on_step(pack.num_users, float(of_step.mean()))
            now.clear()
            stream.leave(((waited[index] >= config.patience) | (taken[index] >= steps)).numpy())

        return theta.cpu(), last, 2 * taken

    def _sure_to_stay(self, taken: Tensor, waited: Tensor) -> int:
        """Steps that nobody of the pack can leave before, the next included: at least 1."""
        still = (self.config.steps - taken).to(waited.dtype)
        left = torch.minimum(self.config.patience - waited, still)
        return max(1, int(left.min()))


def assign(codebooks: list[Codebook], theta: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """Code ids [U, J] of soft prompts [U, S, D]: the nearest codeword of each field."""
    return torch.stack(
        [book.assign(theta[:, s].flatten(1))[0] for book, s in zip(codebooks, slices)], dim=1
    )

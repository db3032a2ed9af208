"""Passes over the users of a source, block by block, and what processes add up of them.

Given the codebooks users are independent, so a block is read ahead in a thread, inferred, kept on
disk and dropped; memory depends on the block, and per user on nothing but the codes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config
from userip_fast.core.distributed import Processes
from userip_fast.core.interrupts import deferred_interrupts
from userip_fast.core.prefetch import Prefetch
from userip_fast.core.progress import Progress, progress
from userip_fast.em.blocks import Ticker, run
from userip_fast.em.cache import BlockCache
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.mstep import Stats
from userip_fast.em.steps import Block, EMState, EStep, Profiles
from userip_fast.lm.engine import Engine
from userip_fast.prompts.behaviour import Source

_PROGRESS_USERS = 256

T = TypeVar("T")


class Sweeps:
    """The users of one process, and of all.

    Args:
        engine: Scores packs.
        config: Everything.
        show: Whether to show progress.
        processes: This process among those that share the users.

    Attributes:
        swept_s, waited_s: Seconds spent in sweeps so far, and of these waiting for input.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        show: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.engine, self.config, self.show = engine, config, show
        self.processes = processes or Processes()
        self.swept_s = self.waited_s = 0.0

    def sweep(
        self,
        what: str,
        estep: EStep,
        source: Source,
        codebooks: list[Codebook] | None,
        state: EMState,
        users: tuple[int, int] | None = None,
        cache: BlockCache | None = None,
    ) -> Iterator[Profiles]:
        """Profiles of `users` (None: this process's) in hash order, block by block."""
        size = self.config.em.block_users
        # It tells its progress by blocks; but the more users, the more events they share.
        shares = self.config.told.behaviour_context == "independent"
        if not isinstance(estep, GradientEStep) and not shares:
            size = min(size, _PROGRESS_USERS)
        users, done = users or self.own_users(source), 0
        for bar, block in self.blocks(what, users, size, lambda a, b: self.block(source, a, b)):
            if isinstance(estep, GradientEStep) and not done:
                estep.on_step = Ticker(bar, self.config.em.steps)
            profiles = run(estep, block, codebooks, state, cache)
            done += len(profiles.nll)
            bar.done = done
            bar.advance(0, nll=float((profiles.nll / profiles.weight).mean()))
            yield profiles

    def blocks(
        self, what: str, users: tuple[int, int], size: int, load: Callable[[int, int], T]
    ) -> Iterator[tuple[Progress, T]]:
        """What `load` gives of `size` users at a time, read ahead; an interrupt waits for the block
        at hand."""
        first, last = users
        began = time.perf_counter()
        with (
            progress(what, last - first, "users", self.show) as bar,
            Prefetch(range(first, last, size), lambda a: load(a, min(a + size, last))) as found,
            deferred_interrupts() as let_through,
        ):
            for block in found:
                yield bar, block
                let_through()
            self.waited_s += found.waited_s
        self.swept_s += time.perf_counter() - began

    def block(self, source: Source, start: int, stop: int) -> Block:
        behaviour = source.block(self.engine.lm.tokenizer, self.engine.layout, start, stop)
        return Block(behaviour, source.hashes_of(start, stop))

    def own_users(self, source: Source) -> tuple[int, int]:
        """The range of users, in hash order, that is this process's."""
        first, last = self.processes.owned_shards()
        return source.users_between(first << 56, last << 56)

    def run_key(self, source: Source, start: Tensor) -> str:
        """Digest of what decides the profiles of users: data, LM, prompts and settings."""
        digest = hashlib.sha256(source.content_key().encode())
        digest.update(self.settings_key(start))
        return digest.hexdigest()

    def settings_key(self, start: Tensor) -> bytes:
        """The same without the data."""
        fields = [asdict(f) for f in self.config.fields]
        about = [self.engine.lm.fingerprint, str(self.engine.lm.dtype), fields]
        # May change: what is found is the same, up to rounding where packs are cut differently.
        free = dict.fromkeys(("rounds", "block_users", "pack_tokens"))
        em = {**asdict(self.config.em), **free}
        digest = hashlib.sha256(json.dumps([*about, em]).encode())
        digest.update(start.contiguous().numpy().tobytes())
        return digest.digest()

    def gather_codes(self, codes: list[Tensor]) -> Tensor:
        """[U, J] codes of all users in hash order, from each process's own."""
        mine = torch.cat(codes) if codes else torch.zeros(0, len(self.config.fields)).byte()
        return self.gather_users(self.small(mine))

    def gather_users(self, mine: Tensor) -> Tensor:
        """[U, ...] of all users in hash order, from each process's own."""
        return torch.cat([p["mine"] for p in self.processes.gather({"mine": mine})])

    def small(self, codes: Tensor) -> Tensor:
        """`codes` in a small type: this is what is held per user."""
        largest = max(f.codebook_size for f in self.config.fields)
        return codes.to(torch.uint8 if largest <= 256 else torch.int32)

    def reduce(self, stats: Stats) -> Stats:
        if self.processes.world == 1:
            return stats
        parts = self.processes.gather(stats.to_tensors())
        out = Stats(stats.sample_size)
        for part in parts:
            out = out + Stats.from_tensors(part, stats.sample_size)
        return out

    def add_up(self, totals: Any) -> Any:
        """Sum over processes of an array of each."""
        parts = self.processes.gather({"totals": torch.from_numpy(totals)})
        return sum(p["totals"].numpy() for p in parts)

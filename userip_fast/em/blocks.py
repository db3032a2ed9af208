"""A block of users: found as kept, or read by an E-step in the memory that there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from userip_fast.codebook.books import Codebook
from userip_fast.core.errors import FormatError
from userip_fast.core.progress import Progress
from userip_fast.em.cache import BlockCache, passed_over
from userip_fast.em.steps import Block, EMState, EStep, Profiles, books_digest
from userip_fast.lm.limits import is_out_of_memory
from userip_fast.lm.memory import smaller_pack

T = TypeVar("T")


def run(
    estep: EStep,
    block: Block,
    codebooks: list[Codebook] | None,
    state: EMState,
    cache: BlockCache | None,
) -> Profiles:
    """What the E-step finds, or found and kept before."""
    if cache is None:
        return run_anew(estep, block, codebooks, state)
    key = block.digest() + books_digest(codebooks)
    if (found := cache.get("profiles", key)) is not None:
        try:
            return Profiles.from_tensors(found, block.hashes, [len(b) for b in codebooks or ()])
        except FormatError as e:
            passed_over(e)
    profiles = run_anew(estep, block, codebooks, state)
    kept = {k: v for k, v in profiles.to_tensors().items() if k != "theta"}
    cache.put("profiles", key, kept)
    return profiles


def run_anew(
    estep: Any, block: Block, codebooks: list[Codebook] | None, state: EMState
) -> Profiles:
    longest = int(block.behaviour.pack_rows(estep.engine.layout.num_soft).max())
    profiles: Profiles = in_memory(lambda: estep.run(block, codebooks, state), estep, longest)
    return profiles


def in_memory(run: Callable[[], T], reader: Any, longest: int) -> T:
    """`run()`; where memory runs out, again with smaller packs.

    Args:
        reader: An E-step or table that `run` asks; its `config` says how large packs are.
        longest: Rows of the smallest pack possible, a user's or event's with the soft rows.
    """
    while True:
        try:
            return run()
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
        # Out of the handler: the failed step's tensors are gone with its traceback.
        tokens = smaller_pack(reader.engine.lm, reader.config.pack_tokens, longest)
        reader.config = replace(reader.config, pack_tokens=tokens)


class Ticker:
    """Turns E-step packs into fractions of a block on a progress bar."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self.bar, self.steps, self.pending = bar, steps, 0

    def __call__(self, users: int, nll: float) -> None:
        self.pending += users
        whole, self.pending = divmod(self.pending, self.steps)
        self.bar.advance(whole, nll=nll)

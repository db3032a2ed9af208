"""How much of what users did reaches the LM: histories are cut, and words may be unknown to it."""

from __future__ import annotations

import logging
from dataclasses import astuple, dataclass

import numpy as np

from userip_fast.core.config import UNLIMITED
from userip_fast.prompts.layout import TokenTable
from userip_fast.prompts.packing import Int64, told_events

logger = logging.getLogger("userip_fast")

_UNKNOWN = 0.01  # share of unknown tokens from which a tokenizer does not fit the text


@dataclass(frozen=True)
class Reach:
    """Counts over users.

    Attributes:
        events: What they did, sampled negatives included.
        told: Those events that fit into `data.max_tokens`, the latest of each user.
        users_cut: Users of whom not all is told.
        tokens: Of the events told.
        unknown: Those among them that stand for text the tokenizer does not know (`<unk>`).
    """

    events: int = 0
    told: int = 0
    users_cut: int = 0
    tokens: int = 0
    unknown: int = 0

    def __add__(self, other: Reach) -> Reach:
        return Reach(*(a + b for a, b in zip(astuple(self), astuple(other))))

    @classmethod
    def count(
        cls,
        table: TokenTable,
        kinds: Int64,
        offsets: Int64,
        limits: tuple[int, int, bool],
        unknown: int,
    ) -> Reach:
        """Of users whose events `build_behaviour` is given likewise.

        Args:
            limits: As `BehaviourFormat.limits`.
            unknown: Id of the token for what the vocabulary lacks, -1 if there is none.
        """
        size = np.diff(table.offsets)
        told, _ = told_events(size[kinds], offsets, *limits)
        missed = np.concatenate([[0], np.cumsum(~told)])[offsets]
        strange = np.concatenate(
            [[0], np.cumsum(table.ids == (-1 if unknown is None else unknown))]
        )
        kept = kinds[told]
        return cls(
            len(kinds),
            int(told.sum()),
            int((np.diff(missed) > 0).sum()),
            int(size[kept].sum()),
            int(np.diff(strange[table.offsets])[kept].sum()),
        )

    def warn(self, max_tokens: int, chunk_tokens: int, who: str = "users") -> None:
        """Says in the log what is lost, if anything is."""
        if self.users_cut:
            # Without a limit on histories, only events that are too long are missed.
            longest = max_tokens if max_tokens < UNLIMITED else chunk_tokens
            logger.warning(
                "data.%s=%d cuts the histories of %s %s: %s of %s events are told%s",
                "max_tokens" if max_tokens < UNLIMITED else "chunk_tokens",
                longest,
                f"{self.users_cut:,}",
                who,
                f"{self.told:,}",
                f"{self.events:,}",
                ", the latest of each" if max_tokens < UNLIMITED else "; the others are longer",
            )
        if self.unknown > _UNKNOWN * self.tokens:
            logger.warning(
                "the LM's tokenizer does not know %.1f %% of the text (<unk>): take an LM of the "
                "text's language and script, or one that reads bytes",
                100 * self.unknown / self.tokens,
            )

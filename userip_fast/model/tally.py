"""What inferring told, added up over blocks of users."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from userip_fast.em.steps import Profiles, profiles_total
from userip_fast.em.trainer import Trainer
from userip_fast.prompts.behaviour import Source
from userip_fast.prompts.reach import Reach


@dataclass
class Tally:
    """Sums over the users of a source, block by block in hash order.

    Attributes:
        at: The user after the last; begun at the first.
        totals: [4], as `profiles_total` gives them.
        told: What of their behaviour the LM was told.
    """

    at: int = 0
    totals: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    told: Reach = field(default_factory=Reach)

    def add(self, profiles: Profiles, source: Source, tokenizer: Any) -> tuple[int, int]:
        """Adds the next block; returns its first user, and the one after its last."""
        first, self.at = self.at, self.at + len(profiles.nll)
        self.totals += profiles_total(profiles)
        self.told += source.reach(tokenizer, first, self.at)
        return first, self.at

    def over_processes(self, trainer: Trainer) -> Tally:
        """The sum of those of all processes."""
        told = Reach(*trainer.add_up(np.array(astuple(self.told))).tolist())
        return Tally(self.at, trainer.add_up(self.totals), told)

    @property
    def users(self) -> int:
        return int(self.totals[0])

    @property
    def nll_per_weight(self) -> float:
        """Nats."""
        return float(self.totals[1] / max(self.totals[2], 1e-12))

    @property
    def forward_equivalents(self) -> float:
        """Passes through the LM, per user."""
        return float(self.totals[3] / max(self.totals[0], 1))

"""What a choice says of who made it: how much likelier its text is for some codes than for anybody.

    lift[i, z] = log p(text i | codes z) - log p(text i | nothing told) - log_norm[z]
    log_norm[z] = log of the mean of exp(the difference) over all choices

So p(i | z) = share[i] exp(lift[i, z]), with the share of all choices that fell on i, adds up to one
over the catalogue. How often an item is chosen at all is known by counting; the LM says by whom.
What it finds hard to spell, or spells better under any code, cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from userip_fast.em.readings import Readings, log_likelihoods
from userip_fast.errors import FormatError
from userip_fast.lm.engine import Engine
from userip_fast.packing import Int64


@dataclass(frozen=True, eq=False)
class Calibration:
    """How the values of an event table are read; learned with the codebooks.

    Attributes:
        neutral: [S, D] soft rows that tell nothing, where values are lifts; else None.
        log_norm: [Z] fp64, of lifts.
        half_events: Events of a history at which each counts half: one taste explains many events,
            so that they say less of it than as many independent ones would. inf counts all whole.
    """

    neutral: Tensor | None = None
    log_norm: Tensor | None = None
    half_events: float = math.inf

    @property
    def plain(self) -> bool:
        """Whether values are likelihoods, and count whole."""
        return self.log_norm is None and math.isinf(self.half_events)

    def weights(self, offsets: Int64) -> Tensor | None:
        """[N] fp32 of the events of users, who have `offsets[u]:offsets[u + 1]`; None for ones."""
        if math.isinf(self.half_events):
            return None
        n = np.diff(offsets)
        each = self.half_events / (self.half_events + n)
        return torch.from_numpy(np.repeat(each, n).astype(np.float32))

    def reordered(self, orders: Sequence[Tensor]) -> Calibration:
        """For codes under other numbers: code k of field j is the old code `orders[j][k]`."""
        if self.log_norm is None:
            return self
        grid = self.log_norm.view([len(order) for order in orders])
        for j, order in enumerate(orders):
            grid = grid.index_select(j, order)
        return replace(self, log_norm=grid.flatten().clone())

    def state(self) -> dict[str, Tensor]:
        """Tensors that `from_state` reads, beside `neutral`."""
        out = {"half_events": torch.tensor([self.half_events], dtype=torch.float64)}
        return out if self.log_norm is None else {**out, "log_norm": self.log_norm}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], neutral: Tensor, combinations: int
    ) -> Calibration:
        """The inverse of `state`, for a table of so many columns.

        Raises:
            FormatError: A shape, type or value is none that was saved.
        """
        half = state.get("half_events", torch.tensor([math.inf], dtype=torch.float64))
        norm = state.get("log_norm")
        if half.shape != (1,) or not float(half[0]) > 0:
            raise FormatError("half_events must be one positive number")
        if norm is None:
            return cls(half_events=float(half[0]))
        if (
            norm.shape != (combinations,)
            or norm.dtype != torch.float64
            or not norm.isfinite().all()
        ):
            raise FormatError(f"log_norm must be fp64 [{combinations}] and finite")
        return cls(neutral, norm, float(half[0]))


PLAIN = Calibration()


def log_lifts(
    engine: Engine,
    readings: Readings,
    soft: Tensor,
    neutral: Tensor,
    tokens: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """[E, Z] fp32, log p(kind | codes) - log p(kind | nothing told).

    Args:
        soft: [Z, S, D] soft rows of each combination of codes, on the LM's device.
        neutral: [S, D] soft rows that tell nothing.
        tokens, on_rows: As in `log_likelihoods`.
    """
    rows = torch.cat([soft, neutral.to(soft)[None]])
    values = log_likelihoods(engine, readings, rows, tokens, on_rows)
    return values[:, :-1] - values[:, -1:]


def log_norm(lifts: Tensor, counts: Tensor) -> Tensor:
    """[Z] fp64, log of the mean of exp(lifts [E, Z]) over choices, of which `counts` [E] fell on
    each kind."""
    share = (counts.double() / counts.double().sum().clamp_min(1)).log()
    return (lifts.double() + share[:, None]).logsumexp(0)

"""What an event says of who it is: how it differs from the same event with nothing told.

    lift[i, z] = log p(text i | codes z) - log p(text i | nothing told)

What is usual of an item is known by counting, the LM says for whom it is otherwise. So what the LM
finds hard to spell, or spells better under any code, cancels, and posteriors, likelihoods and
affinities are those of

    choices, told by their text     p(i | z)    = share[i] exp(lift[i, z]) / norm[z]
    reactions w to items            p(w | i, z) = share[i, w] exp(lift[i, w, z]) / norm[i, z]

with the share of all choices that fell on item i, or of the reactions to it that were w, such that
either adds up to one. A table keeps the logarithm, of choices less log share[i], which is the same
for all codes. What counting tells beyond the LM (`userip_fast.em.counted`) is a part of the lift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from userip_fast.core.errors import FormatError
from userip_fast.em.by_text import ByText, texts_and_values
from userip_fast.em.counted import Counted
from userip_fast.em.readings import Readings, log_likelihoods
from userip_fast.lm.engine import Engine
from userip_fast.prompts.packing import Int64

_PRIOR = 10.0  # events that the shares of an item's reactions start with


@dataclass(frozen=True, eq=False)
class Usual(ByText):
    """How often each reaction went to each item.

    Attributes:
        counts: [T, W] int64, of the items that had some.
    """

    counts: Int64

    @classmethod
    def of(cls, counts: Mapping[tuple[str, str], int], words: Sequence[str]) -> Usual:
        """From how often kinds of event occurred."""
        texts = sorted({text for text, _ in counts})
        found = [[counts.get((text, word), 0) for word in words] for text in texts]
        return cls(texts, np.asarray(found, np.int64).reshape(len(texts), len(words)))

    @cached_property
    def digest(self) -> bytes:
        """Of everything."""
        return self.digest_with(self.counts)

    def log_shares(self, texts: Sequence[str]) -> Tensor:
        """[n, W] fp64, smoothed towards the shares of all reactions: those of a new item."""
        total = self.counts.sum(0) + 1.0
        usual = total / total.sum()
        none = np.zeros((1, self.counts.shape[1]), np.int64)  # the last row, which -1 is
        own = np.concatenate([self.counts, none])[self.rows_of(texts)]
        shares = (own + _PRIOR * usual) / (own.sum(1, keepdims=True) + _PRIOR)
        return torch.from_numpy(np.log(shares))

    def values(self, lifts: Tensor, texts: Sequence[str], weight: float) -> Tensor:
        """[T W, Z] fp32, log p(word | item, codes), of weighted lifts [T W, Z]."""
        told = lifts.double().view(len(texts), self.counts.shape[1], -1) / weight
        told = (told + self.log_shares(texts)[:, :, None]).log_softmax(1)
        return (weight * told).flatten(0, 1).float()

    def to_arrow(self) -> pa.Table:
        """Ready for Parquet."""
        return self.table_with("counts", self.counts)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Usual:
        """The inverse of `to_arrow`.

        Raises:
            FormatError: It is none.
        """
        texts, counts = texts_and_values(table, "counts")
        if counts.dtype != np.int64 or (counts < 0).any():
            raise FormatError("every text must have counts of 0 or more, as many as words")
        return cls(texts, counts)


@dataclass(frozen=True, eq=False)
class Calibration:
    """How the values of an event table are read; learned with the codebooks.

    Attributes:
        neutral: [S, D] soft rows that tell nothing, where values are made of lifts; else None.
        log_norm: [Z] fp64, of choices.
        half_events: Events of a history at which each counts half: one taste explains many events,
            so that they say less of it than as many independent ones would. inf counts all whole.
        usual: Reactions to items, where events tell of them.
        counted: What counting tells beyond the LM; None for nothing.
        columns: [Z, J] int64 codes of the table's columns; None for all combinations of codes.
        code_prior: How much of the codes' log prior counts when a user is given one of them, in
            [0, 1]. With all of it that is the likeliest code. After few events that is for most
            users one of few, which says little of them; with less it is the one that their events
            speak for. Probabilities are as they are.
        log_prior: [Z] fp64 of all combinations of codes, where users show that some of one field go
            with some of another; None for the product of the fields' own.
        raw: Whether the table is to be calibrated yet; it then keeps what it reads.
    """

    neutral: Tensor | None = None
    log_norm: Tensor | None = None
    half_events: float = math.inf
    usual: Usual | None = None
    counted: Counted | None = None
    columns: Tensor | None = None
    code_prior: float = 1.0
    log_prior: Tensor | None = None
    raw: bool = False

    @property
    def plain(self) -> bool:
        """Whether values are likelihoods, count whole, and codes are the likeliest by a product."""
        told = self.neutral is None and math.isinf(self.half_events)
        return told and self.code_prior == 1 and self.log_prior is None

    @property
    def finite_half(self) -> float | None:
        """`half_events`, None for inf."""
        return None if math.isinf(self.half_events) else self.half_events

    def values(self, told: Tensor, texts: Sequence[str], weight: float) -> Tensor:
        """[T W, Z] fp32 values of a table, from lifts of T texts under their W words, or from
        likelihoods where the table is plain.

        Args:
            weight: Loss weight of a word.
        """
        if self.neutral is None or self.raw:
            return told
        if self.usual is not None:
            if self.counted is not None:
                told = told + weight * self.counted.log_of(texts)
            return self.usual.values(told, texts, weight)
        if self.counted is not None:
            told = told + self.counted.log_of(texts)
        assert self.log_norm is not None
        return (told - self.log_norm).float()

    def weights(self, offsets: Int64) -> Tensor | None:
        """[N] fp32 of the events of users, who have `offsets[u]:offsets[u + 1]`; None for ones."""
        if math.isinf(self.half_events):
            return None
        n = np.diff(offsets)
        each = self.half_events / (self.half_events + n)
        return torch.from_numpy(np.repeat(each, n).astype(np.float32))

    def reordered(self, orders: Sequence[Tensor]) -> Calibration:
        """For codes under other numbers: code k of field j is the old code `orders[j][k]`."""
        if self.columns is not None:  # they stay where they are
            new = [order.argsort()[k] for order, k in zip(orders, self.columns.T)]
            return replace(self, columns=torch.stack(new, dim=1))

        def moved(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            grid = x.view([len(order) for order in orders])
            for j, order in enumerate(orders):
                grid = grid.index_select(j, order)
            return grid.flatten().clone()

        return replace(
            self,
            log_norm=moved(self.log_norm),
            counted=self.counted and self.counted.reordered(orders),
            log_prior=moved(self.log_prior),
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors that `from_state` reads, beside `neutral`."""
        out = {"half_events": torch.tensor([self.half_events], dtype=torch.float64)}
        if self.code_prior != 1:  # as in older models, whose fingerprints stay what they were
            out["code_prior"] = torch.tensor([self.code_prior], dtype=torch.float64)
        if self.log_prior is not None:
            out["log_prior"] = self.log_prior
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
        share = state.get("code_prior", torch.ones(1, dtype=torch.float64))
        if share.shape != (1,) or not 0 <= float(share[0]) <= 1:
            raise FormatError("code_prior must be one number in [0, 1]")
        for name in ("log_norm", "log_prior"):
            if (x := state.get(name)) is not None and (
                x.shape != (combinations,) or x.dtype != torch.float64 or not x.isfinite().all()
            ):
                raise FormatError(f"{name} must be fp64 [{combinations}] and finite")
        how = cls(
            half_events=float(half[0]),
            code_prior=float(share[0]),
            log_prior=state.get("log_prior"),
        )
        if norm is None:
            return how
        return replace(how, neutral=neutral, log_norm=norm)


PLAIN = Calibration()


def log_lifts(
    engine: Engine, readings: Readings, soft: Tensor, neutral: Tensor | None, *how: Any
) -> Tensor:
    """[E, Z] fp32, log p(kind | codes) - log p(kind | nothing told); see `log_likelihoods`.

    Args:
        neutral: [S, D] soft rows that tell nothing; None for p(kind | codes) alone.
        how: `tokens` and `on_rows`.
    """
    if neutral is None:
        return log_likelihoods(engine, readings, soft, *how)
    rows = torch.cat([soft, neutral.to(soft)[None]])
    values = log_likelihoods(engine, readings, rows, *how)
    return values[:, :-1] - values[:, -1:]


def log_norm(lifts: Tensor, counts: Tensor) -> Tensor:
    """[Z] fp64, log of the mean of exp(lifts [E, Z]) over choices, of which `counts` [E] fell on
    each kind."""
    share = (counts.double() / counts.double().sum().clamp_min(1)).log()
    return (lifts.double() + share[:, None]).logsumexp(0)

"""What counting tells beyond the LM.

The LM says which codes choose an item, or like it, from the item's text. Where users of codes z had
n[i, z] events of kind i (an item, and how it went) and the table of `userip_fast.em.lifts` lets
expect e[i, z], its probability is multiplied by

    (n[i, z] + prior) / (e[i, z] + prior)

and scaled to add up to one again: the posterior mean of a factor with a Gamma(prior, prior)
distribution, by which Poisson counts differ from what was expected (DuMouchel 1999). Words that
texts share may have such factors first (`userip_fast.em.shared_words`), so that e knows of them.
The LM speaks for items of which little was seen, and with their words for new ones; counts speak
for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from userip_fast.core.errors import FormatError
from userip_fast.em.by_text import ByText, texts_and_values
from userip_fast.em.shared_words import row_sums, words_of
from userip_fast.prompts.format import BehaviourFormat


@dataclass(frozen=True, eq=False)
class _Factors(ByText):
    """Factors of the kinds of event of texts, or of words.

    Attributes:
        log_factors: [T, W, Z] float16, for W words of feedback and Z combinations of codes.
    """

    log_factors: npt.NDArray[np.float16]

    def reordered_factors(self, orders: Sequence[Tensor]) -> npt.NDArray[np.float16]:
        """For codes under other numbers: code k of field j is the old code `orders[j][k]`."""
        t, w, _ = self.log_factors.shape
        grid = torch.from_numpy(self.log_factors).view(t, w, *(len(order) for order in orders))
        for j, order in enumerate(orders):
            grid = grid.index_select(2 + j, order)
        return np.asarray(grid.reshape(t, w, -1).numpy())

    def to_arrow(self) -> pa.Table:
        """Ready for Parquet."""
        return self.table_with("log_factors", self.log_factors.astype(np.float32))


@dataclass(frozen=True, eq=False)
class WordFactors(_Factors):
    """Factors of words [T] that texts share."""

    def log_of(self, texts: Sequence[str]) -> Tensor:
        """[n W, Z] fp32, sums over the words of texts."""
        of = [[r for w in words_of(text) if (r := self._row.get(w)) is not None] for text in texts]
        ends = np.cumsum([0, *(len(rows) for rows in of)])
        rows = np.asarray([r for each in of for r in each], np.int64)
        flat = self.log_factors.reshape(len(self.texts), -1).astype(np.float64)
        found = row_sums(flat, rows, ends).astype(np.float32)
        return torch.from_numpy(found.reshape(-1, self.log_factors.shape[2]))

    def reordered(self, orders: Sequence[Tensor]) -> WordFactors:
        """See `reordered_factors`."""
        return WordFactors(self.texts, self.reordered_factors(orders))

    @cached_property
    def digest(self) -> bytes:
        """Of everything."""
        return self.digest_with(self.log_factors)

    @classmethod
    def from_arrow(cls, table: pa.Table, words: int, combinations: int) -> WordFactors:
        """The inverse of `to_arrow`; FormatError as `Counted.from_arrow`."""
        return cls(*_checked(table, words, combinations))


@dataclass(frozen=True, eq=False)
class Counted(_Factors):
    """Factors of the kinds of event that were counted.

    Attributes:
        shared: Factors of the words of their texts, which count beside; None for none.
    """

    shared: WordFactors | None = None

    @classmethod
    def of(
        cls,
        texts: list[str],
        observed: Tensor,
        expected: Tensor,
        words: int,
        prior: float,
        shared: WordFactors | None = None,
    ) -> Counted:
        """From numbers of events [T W, Z], observed, and expected with `shared`."""
        factors = ((observed + prior) / (expected + prior)).log()
        told = factors.view(len(texts), words, -1).numpy().astype(np.float16)
        return cls(texts, told, shared)

    def reordered(self, orders: Sequence[Tensor]) -> Counted:
        """See `reordered_factors`."""
        shared = self.shared and self.shared.reordered(orders)
        return Counted(self.texts, self.reordered_factors(orders), shared)

    def log_of(self, texts: Sequence[str]) -> Tensor:
        """[n W, Z] fp32; of texts that were not counted, what their words tell."""
        rows = self.rows_of(texts)
        out = np.zeros((len(rows), *self.log_factors.shape[1:]), np.float32)
        out[rows >= 0] = self.log_factors[rows[rows >= 0]]
        told = torch.from_numpy(out).flatten(0, 1)
        return told if self.shared is None else told + self.shared.log_of(texts)

    @cached_property
    def digest(self) -> bytes:
        """Of everything."""
        return self.digest_with(self.log_factors) + (self.shared.digest if self.shared else b"")

    @classmethod
    def from_arrow(cls, table: pa.Table, words: int, combinations: int) -> Counted:
        """The inverse of `to_arrow`, but for what is shared.

        Raises:
            FormatError: It is none, or of other words or codes.
        """
        return cls(*_checked(table, words, combinations))


def _checked(
    table: pa.Table, words: int, combinations: int
) -> tuple[list[str], npt.NDArray[np.float16]]:
    texts, values = texts_and_values(table, "log_factors")
    width = words * combinations
    if values.shape[1] != width or values.dtype != np.float32 or not np.isfinite(values).all():
        raise FormatError(f"log_factors must be lists of {width} float32, finite ones")
    return texts, values.reshape(len(texts), words, combinations).astype(np.float16)


def expected(observed: Tensor, values: Tensor, events: Tensor, fmt: BehaviourFormat) -> Tensor:
    """[E, Z] fp64, what a table lets expect where `observed` [E, Z] events were seen: of a code's
    users as many choices as they made, or of an item as many reactions.

    Args:
        values: [E, Z], as `Calibration.values` gives them.
        events: [E], of anybody.
        fmt: How events are told: under W words, or none.
    """
    if not fmt.words:
        share = events / events.sum().clamp_min(1)
        return observed.sum(0) * values.double().exp() * share[:, None]
    each = (-1, len(fmt.words), values.shape[1])
    p = (values.double() / fmt.feedback_weight).exp().view(each)
    return (observed.view(each).sum(1, keepdim=True) * p).flatten(0, 1)

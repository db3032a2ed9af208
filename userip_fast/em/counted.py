"""What counting tells beyond the LM.

The LM says which codes choose an item, or like it, from the item's text. Where users of codes z had
n[i, z] events of kind i (an item, and how it went) and the table of `userip_fast.em.lifts` lets
expect e[i, z], its probability is multiplied by

    (n[i, z] + prior) / (e[i, z] + prior)

and scaled to add up to one again: the posterior mean of a factor with a Gamma(prior, prior)
distribution, by which Poisson counts differ from what was expected (DuMouchel 1999). The LM speaks
for items of which little was seen, and alone for new ones; counts speak for the others.
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
from userip_fast.prompts.format import BehaviourFormat


@dataclass(frozen=True, eq=False)
class Counted(ByText):
    """Factors of the kinds of event that were counted.

    Attributes:
        log_factors: [T, W, Z] float16, for W words and Z combinations of codes.
    """

    log_factors: npt.NDArray[np.float16]

    @classmethod
    def of(
        cls, texts: list[str], observed: Tensor, expected: Tensor, words: int, prior: float
    ) -> Counted:
        """From numbers of events [T W, Z], observed and expected."""
        factors = ((observed + prior) / (expected + prior)).log()
        return cls(texts, factors.view(len(texts), words, -1).numpy().astype(np.float16))

    def reordered(self, orders: Sequence[Tensor]) -> Counted:
        """For codes under other numbers: code k of field j is the old code `orders[j][k]`."""
        t, w, _ = self.log_factors.shape
        grid = torch.from_numpy(self.log_factors).view(t, w, *(len(order) for order in orders))
        for j, order in enumerate(orders):
            grid = grid.index_select(2 + j, order)
        return Counted(self.texts, grid.reshape(t, w, -1).numpy())

    def log_of(self, texts: Sequence[str]) -> Tensor:
        """[n W, Z] fp32; 0 of texts that were not counted."""
        rows = self.rows_of(texts)
        out = np.zeros((len(rows), *self.log_factors.shape[1:]), np.float32)
        out[rows >= 0] = self.log_factors[rows[rows >= 0]]
        return torch.from_numpy(out).flatten(0, 1)

    @cached_property
    def digest(self) -> bytes:
        """Of everything."""
        return self.digest_with(self.log_factors)

    def to_arrow(self) -> pa.Table:
        """Ready for Parquet."""
        return self.table_with("log_factors", self.log_factors.astype(np.float32))

    @classmethod
    def from_arrow(cls, table: pa.Table, words: int, combinations: int) -> Counted:
        """The inverse of `to_arrow`.

        Raises:
            FormatError: It is none, or of other words or codes.
        """
        texts, values = texts_and_values(table, "log_factors")
        width = words * combinations
        if values.shape[1] != width or values.dtype != np.float32 or not np.isfinite(values).all():
            raise FormatError(f"log_factors must be lists of {width} float32, finite ones")
        return cls(texts, values.reshape(len(texts), words, combinations).astype(np.float16))


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

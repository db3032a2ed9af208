"""What items share: the words of their texts.

An item may be too rare to tell who chooses it, or likes it; all items with a word are not. Where
users of codes z had n[v] events of items with word v, and all that is known without that word lets
expect e[v], their probabilities are multiplied by

    f[v] = (n[v] + prior) / (e[v] + prior)

as those of single items are (`userip_fast.em.counted`). An item has several words, which compete:
`e` counts the factors of all others, by damped iterative scaling (Darroch & Ratcliff 1972).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from userip_fast.prompts.packing import Int64

Float64 = npt.NDArray[np.float64]

_WORD = re.compile(r"\w+")
_FEWEST = 2  # texts that share a word
_MOST = 0.9  # share of the texts: what nearly all have tells nothing
_WORDS = 1 << 14  # at most, the most frequent ones
_DAMPING = 0.5


def words_of(text: str) -> list[str]:
    """Each of its words once, in order."""
    return list(dict.fromkeys(_WORD.findall(text.casefold())))


@dataclass(frozen=True, eq=False)
class SharedWords:
    """Which of V words each of T texts has.

    Attributes:
        words: In order of their numbers.
        of, offsets: Text t has `of[offsets[t]:offsets[t + 1]]`.
    """

    words: list[str]
    of: Int64
    offsets: Int64

    @classmethod
    def among(cls, texts: Sequence[str]) -> SharedWords:
        """Those that some texts share, and not nearly all."""
        told = [words_of(text) for text in texts]
        flat = [word for each in told for word in each]
        number = {word: i for i, word in enumerate(dict.fromkeys(flat))}
        at = np.asarray([number[word] for word in flat], np.int64)
        count = np.bincount(at, minlength=len(number))
        kept = (count >= _FEWEST) & (count <= _MOST * len(texts))
        kept[np.argsort(-count, kind="stable")[_WORDS:]] = False
        there = kept[at]
        text = np.repeat(np.arange(len(texts)), [len(each) for each in told])[there]
        ends = np.cumsum(np.bincount(text, minlength=len(texts)))
        names = [word for word, i in number.items() if kept[i]]
        return cls(names, np.cumsum(kept)[at[there]] - 1, np.concatenate([[0], ends]))

    def sums(self, x: Float64) -> Float64:
        """[V, C] over the texts of each word of `x` [T, C]."""
        return row_sums(x, *self._texts)

    def spread(self, x: Float64) -> Float64:
        """[T, C] over the words of each text of `x` [V, C]."""
        return row_sums(x, self.of, self.offsets)

    def scaled(
        self, log_factors: Float64, observed: Float64, expected: Float64, prior: float
    ) -> Float64:
        """[V, C] logarithms of factors after one more round.

        Args:
            log_factors: [V, C] so far.
            observed, expected: [T, C] events of texts, expected with all factors so far.
        """
        n, e = self.sums(observed), self.sums(expected) / np.exp(log_factors)
        new = np.log((n + prior) / (e + prior))
        return np.asarray(log_factors + _DAMPING * (new - log_factors))

    @cached_property
    def _texts(self) -> tuple[Int64, Int64]:
        """As `of` and `offsets`, the texts of each word."""
        text = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        ends = np.cumsum(np.bincount(self.of, minlength=len(self.words)))
        return text[np.argsort(self.of, kind="stable")], np.concatenate([[0], ends])


def row_sums(x: Float64, of: Int64, offsets: Int64) -> Float64:
    """[len(offsets) - 1, C] sums of rows `of` of `x` [N, C]."""
    if not len(of):
        return np.zeros((len(offsets) - 1, x.shape[1]))
    found: Float64 = F.embedding_bag(
        torch.from_numpy(of),
        torch.from_numpy(np.ascontiguousarray(x)),
        torch.from_numpy(offsets),
        mode="sum",
        include_last_offset=True,
    ).numpy()
    return found

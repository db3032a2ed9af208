"""Users and items from an event table, in numpy: profiles that grow, affinities, best items.

What `userip_fast.model.fitted` and `userip_fast.serve` share; nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.core.errors import DataError, FormatError

NEGATIVE_WORDS = ("chosen", "passed over")
SAMPLING_POWER = 0.75
"""Of an item's count, when items passed over are sampled, as in word2vec (Mikolov et al., 2013)."""

_LEAST = 2.0**-25  # of a probability: half of what 16 bits can tell from nothing
_BLOCK = 1 << 22  # values of an event table that are looked at together


class Profile:
    """p(codes | a user's events), which takes more events: O(Z) each, whatever came before.

    Args:
        log_prior: [Z] fp64, of combinations of codes.
        sizes: [J] codes of each field.
        tell: Of an item and how it went, the number of that kind of event and its log p(event |
            codes) [Z]; None where the item is unknown.
        half_events: Events at which each counts half (`userip_fast.em.lifts.Calibration`).
        repeats: Whether an event told again counts again; else a kind counts once at most.
        columns: [Z, J] codes; None for all combinations, the last field's running fastest.
        code_prior: How much of the prior counts in `codes` (`userip_fast.em.lifts.Calibration`).

    Attributes:
        events, skipped: Events that are in it, and those of unknown items, which are not.
    """

    __slots__ = (
        "_code_prior", "_columns", "_half", "_mass", "_once", "_prior", "_sum", "_tell", "events",
        "sizes", "skipped",
    )  # fmt: skip

    def __init__(
        self,
        log_prior: NDArray[np.float64],
        sizes: Sequence[int],
        tell: Callable[[Any, Any], tuple[int, NDArray[np.floating[Any]]] | None],
        half_events: float = math.inf,
        repeats: bool = True,
        columns: NDArray[np.int64] | None = None,
        code_prior: float = 1.0,
    ) -> None:
        self._prior, self._code_prior = np.array(log_prior, np.float64), code_prior
        self._sum, self._mass = np.zeros_like(self._prior), 0.0
        self.sizes, self._tell, self._half = tuple(sizes), tell, half_events
        self._once: dict[int, float] | None = None if repeats else {}
        self.events = self.skipped = 0
        self._columns = all_codes(sizes) if columns is None else columns

    def extend(self, items: Sequence[Any], reactions: Sequence[Any] | None = None) -> Profile:
        """Adds events in turn, as `add` does each; returns itself.

        Raises:
            DataError: There are not as many reactions as items, or as `add`.
        """
        told = [None] * len(items) if reactions is None else reactions
        if len(items) != len(told):
            raise DataError(f"a user has {len(items)} items and {len(told)} reactions")
        for item, reaction in zip(items, told):
            self.add(item, reaction)
        return self

    @property
    def log_joint(self) -> NDArray[np.float64]:
        """[Z] fp64, log p(codes, events) in nats, as far as events count; the prior before there
        are events."""
        return np.asarray(self._prior + counting(self._mass, self._half) * self._sum)

    def add(self, item: Any, reaction: Any = None, weight: float = 1.0) -> bool:
        """Adds an event; False where the item is unknown, so that it was skipped and counted.

        Args:
            item, reaction: As in `Model.profile`.
            weight: How often it counts: below 0 takes it back, with what rounding left.

        Raises:
            DataError: The reaction is not one of the model's, or the weight is not finite.
        """
        if not np.isfinite(weight):
            raise DataError(f"weight={weight!r}: must be finite")
        told = self._tell(item, reaction)
        if told is None:
            self.skipped += 1
            return False
        kind, likelihood = told
        if self._once is not None:
            before = self._once.get(kind, 0.0)
            self._once[kind] = before + weight
            weight = min(1.0, before + weight) - min(1.0, before)
        self._sum += likelihood * np.float64(weight)
        self._mass = max(0.0, self._mass + weight)
        self.events += 1
        return True

    @property
    def evidence(self) -> float:
        """log p(events), in nats."""
        joint = self.log_joint
        high = joint.max()
        return float(high + np.log(np.exp(joint - high).sum()))

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """[Z], adding up to one."""
        return softmax(self.log_joint)

    @property
    def codes(self) -> NDArray[np.int64]:
        """[J], the code of each field given all events, as `infer` writes them."""
        p, prior = self.probabilities.astype(np.float64), softmax(self._prior)
        found = []
        for k, size in zip(self._columns.T, self.sizes):
            own, usual = np.bincount(k, p, size), np.bincount(k, prior, size)
            there = own > 0
            told = np.full(size, -np.inf)
            told[there] = np.log(own[there]) - (1 - self._code_prior) * np.log(usual[there])
            found.append(told.argmax())
        return np.asarray(found, np.int64)


def all_codes(sizes: Sequence[int]) -> NDArray[np.int64]:
    """[Z, J], all combinations of codes."""
    return np.indices(sizes).reshape(len(sizes), -1).T.copy()


def codes_of(table: pa.Table, sizes: Sequence[int]) -> NDArray[np.int64]:
    """[Z, J] columns of an event table, as a model keeps them.

    Raises:
        FormatError: They are none of fields of so many codes.
    """
    want = pa.schema([(str(j), pa.int64()) for j in range(len(sizes))])
    if not table.schema.equals(want) or any(c.null_count for c in table.columns) or not len(table):
        raise FormatError(f"columns must be {len(sizes)} codes each, at least one")
    codes = np.stack([c.to_numpy() for c in table.columns], axis=1)
    if (codes < 0).any() or (codes >= np.asarray(sizes)).any():
        raise FormatError(f"columns must have codes below {tuple(sizes)}")
    if len(np.unique(codes, axis=0)) < len(codes):
        raise FormatError("columns must be different combinations of codes")
    return codes


def joint(each: Sequence[NDArray[np.float32]], codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """[U, Z] fp32, adding up to one: the product of each field's probabilities [U, K_j] at columns
    `codes` [Z, J]. What 16 bits rounded to nothing is still possible."""
    out = np.ones((len(each[0]), len(codes)))
    for p, k in zip(each, codes.T):
        out *= np.maximum(p, _LEAST, dtype=np.float32)[:, k]
    return np.asarray(out / out.sum(1, keepdims=True), np.float32)


def softmax(log_joint: NDArray[np.float64]) -> NDArray[np.float32]:
    """[..., Z] probabilities of log joints in fp64."""
    p = np.exp(log_joint - log_joint.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.asarray(p, np.float32)


def counting(events: float, half_events: float) -> float:
    """How much each of so many events counts."""
    return 1.0 if math.isinf(half_events) else half_events / (half_events + events)


def lifts(values: NDArray[np.float32], log_prior: NDArray[np.float64]) -> NDArray[np.float32]:
    """[n, Z] how many times likelier than by anybody an item is chosen under codes, of its table
    values [n, 1, Z]."""
    told = values[:, 0].astype(np.float64)
    joint = told + log_prior
    high = joint.max(1, keepdims=True, initial=-np.inf)
    usual = high + np.log(np.exp(joint - high).sum(1, keepdims=True))
    return np.asarray(np.exp(told - usual), np.float32)


def likings(values: NDArray[np.float32], best: int, weight: float) -> NDArray[np.float32]:
    """[n, Z] p(the best word | item, codes) of `values` [n, W, Z], the words adding up to one.

    Whatever loss is on the text is the same for all words.

    Args:
        best: Which of the W words.
        weight: Loss weight of a word's tokens.
    """
    scores = values / np.float32(weight)
    scores -= scores.max(1, keepdims=True)
    np.exp(scores, out=scores)
    return np.asarray(scores[:, best] / scores.sum(1), np.float32)


def odds(likes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of a probability. "chosen" is told against items sampled by popularity, so that its odds are
    how much likelier an item is chosen under codes than it was sampled."""
    sure = np.clip(likes, 1e-30, 1 - 2.0**-24)
    return np.asarray(sure / (1 - sure), np.float32)


class Ranking:
    """The items of a catalogue by how well they would be liked, or how likely they are chosen.

    Args:
        keys: [M] item keys.
        scores: Of items `start:stop`, [n, Z] under each combination of codes.
        mass: [M] how often items are chosen by anybody, up to a factor: scores times that are the
            probabilities that an item, of this catalogue, is chosen next. None for ratings.

    Attributes:
        keys: [M] item keys.
        scores: [M, Z] fp32.
    """

    def __init__(
        self,
        keys: NDArray[Any],
        scores: Callable[[int, int], NDArray[np.float32]],
        codes: int,
        mass: NDArray[np.floating[Any]] | None,
    ) -> None:
        self.keys = keys
        self.scores = np.empty((len(keys), codes), np.float32)
        step = max(1, _BLOCK // codes)
        for a in range(0, len(keys), step):
            b = min(a + step, len(keys))
            self.scores[a:b] = scores(a, b)
        if mass is not None and len(keys):
            self.scores *= mass[:, None].astype(np.float32)
            self.scores /= self.scores.sum(0, dtype=np.float64).astype(np.float32)

    def top(
        self, probabilities: NDArray[np.floating[Any]], n: int
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """See `Model.top_items`."""
        p = np.asarray(probabilities, np.float32)
        if p.ndim not in (1, 2) or p.shape[-1] != self.scores.shape[1]:
            raise DataError(
                f"probabilities: must be [Z] or [U, Z], Z = {self.scores.shape[1]}, got {p.shape}"
            )
        if n < 1:
            raise DataError(f"n={n}: must be at least 1")
        users, n = np.atleast_2d(p), min(n, len(self.keys))
        items = np.empty((len(users), n), np.int64)
        scores = np.empty((len(users), n), np.float32)
        step = max(1, _BLOCK // max(1, len(self.keys)))
        for a in range(0, len(users), step):
            all_of_them = users[a : a + step] @ self.scores.T
            # Ties in the order of the catalogue, so that an answer repeats.
            if n < len(self.keys):
                least = np.partition(all_of_them, len(self.keys) - n, 1)[:, -n]
            for u, s in enumerate(all_of_them, start=a):
                there = np.flatnonzero(s >= least[u - a]) if n < len(s) else np.arange(len(s))
                items[u] = there[np.argsort(-s[there], kind="stable")[:n]]
                scores[u] = s[items[u]]
        if p.ndim == 1:
            return self.keys[items[0]], scores[0]
        return self.keys[items], scores

"""Behaviour of users as the LM reads it, block by block: a `Source`, and the one in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from userip_fast.core.errors import DataError
from userip_fast.core.keys import hash_keys
from userip_fast.data import Events
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import Layout, TokenTable, tokenize_events
from userip_fast.prompts.packing import (
    Behaviour,
    Int64,
    build_behaviour,
    ragged_arange,
    told_events,
)
from userip_fast.prompts.reach import Reach
from userip_fast.prompts.text_tokens import text_tokenizer

if TYPE_CHECKING:
    from userip_fast.prompts.stream import EventTokens

logger = logging.getLogger("userip_fast")


FEWEST_JUDGED = 50  # users, of whom some judge


def judging(users: int, share: float) -> npt.NDArray[np.bool_]:
    """[users] which of them, in hash order, judge instead of being learned from.

    The embedded LM and EM ask the same: who chooses how the LM's word is weighed has to be new to
    the LM as well. One of ten judges it, so that of larger shares it knows some.
    """
    if not share or users < FEWEST_JUDGED:
        return np.zeros(users, np.bool_)
    every = round(1 / share)
    return np.asarray(np.arange(users) % every == every - 1)


@dataclass(frozen=True)
class Told:
    """Events of U users that the LM is told of, by kind: an item's text and how it went.

    Attributes:
        texts, words: Of each kind; `words` is None where nothing is told of how it went.
        tokens: [kinds] int64, their numbers of tokens.
        kinds: [N] int64, the users' events one user after another, oldest first.
        offsets: [U + 1] int64; user u has events `offsets[u]:offsets[u + 1]`.
    """

    texts: list[str]
    words: list[str] | None
    tokens: Int64
    kinds: Int64
    offsets: Int64

    def select(self, users: Int64) -> Told:
        """What these users are told to have done, with no other kinds."""
        lengths = np.diff(self.offsets)[users]
        at = self.kinds[ragged_arange(self.offsets[users], lengths)]
        there, kinds = np.unique(at, return_inverse=True)
        return Told(
            [self.texts[k] for k in there.tolist()],
            None if self.words is None else [self.words[k] for k in there.tolist()],
            self.tokens[there],
            kinds.astype(np.int64),
            np.concatenate([[0], np.cumsum(lengths)]),
        )


class Source(Protocol):
    """Behaviour of users in the order of their key hashes, a block at a time.

    Attributes:
        format: How events are told.
    """

    format: BehaviourFormat

    @property
    def num_users(self) -> int: ...

    def hashes_of(self, start: int, stop: int) -> npt.NDArray[np.uint64]:
        """Key hashes of users `start:stop`."""
        ...

    def users_between(self, low: int, high: int) -> tuple[int, int]:
        """First user whose hash is at least `low`, and first whose hash is at least `high`."""
        ...

    def content_key(self) -> str:
        """A digest of everything the LM would read."""
        ...

    def keys_of(self, start: int, stop: int) -> pa.Array:
        """Keys of users `start:stop`."""
        ...

    def events_of(self, start: int, stop: int) -> Events:
        """Events of users `start:stop`."""
        ...

    def block(self, tokenizer: Any, layout: Layout, start: int, stop: int) -> Behaviour:
        """Behaviour of users `start:stop`."""
        ...

    def told(self, tokenizer: Any, start: int, stop: int, repeats: bool = False) -> Told:
        """The events in `block`, as kinds, without repeated ones unless the format tells them, or
        `repeats` asks for them."""
        ...

    def reach(self, tokenizer: Any, start: int, stop: int) -> Reach:
        """How much of what users `start:stop` did reaches the LM."""
        ...

    def part(self, start: int, stop: int) -> BehaviourSource:
        """Users `start:stop` alone, in memory."""
        ...

    def without_untold(self, tokenizer: Any, on_bad: str) -> Source:
        """Without the users whose history truncates to nothing; says what of the others does not
        reach the LM.

        Raises:
            DataError: Such users exist and `on_bad` is "error", or nobody is left.
        """
        ...


class BehaviourSource:
    """Behaviour of all users of a log, tokenised once per distinct event and built block by block.

    Attributes:
        events: What happened.
        hashes: [U] uint64 key hashes; users are in this order.

    Args:
        tokens: Tokens shared with other sources of the same tokenizer and format.
    """

    def __init__(
        self, events: Events, fmt: BehaviourFormat, tokens: EventTokens | None = None
    ) -> None:
        self.events, self.format, self._shared = events, fmt, tokens
        self.hashes = hash_keys(events.user_keys)
        words = max(1, len(events.words))
        level = np.zeros(events.num_events, np.int64) if events.level is None else events.level
        pairs = events.item_index.astype(np.int64) * words + level
        distinct, self.kinds = np.unique(pairs, return_inverse=True)
        self.texts: list[str] = events.item_text.take(pa.array(distinct // words)).to_pylist()
        self.feedback = (
            None if events.level is None else [events.words[i] for i in (distinct % words).tolist()]
        )
        self._tokens: dict[str, TokenTable] = {}

    @property
    def num_users(self) -> int:
        return self.events.num_users

    def hashes_of(self, start: int, stop: int) -> npt.NDArray[np.uint64]:
        """See `Source`."""
        return self.hashes[start:stop]

    def users_between(self, low: int, high: int) -> tuple[int, int]:
        """See `Source`."""
        at = [
            self.num_users if h >= 1 << 64 else int(np.searchsorted(self.hashes, np.uint64(h)))
            for h in (low, high)
        ]
        return at[0], at[1]

    def keys_of(self, start: int, stop: int) -> pa.Array:
        """See `Source`."""
        return self.events.user_keys.slice(start, stop - start)

    def events_of(self, start: int, stop: int) -> Events:
        """See `Source`."""
        return self.events.users(start, stop)

    def content_key(self) -> str:
        """A digest of everything the LM would read."""
        told = replace(self.format, repeats=True).to_dict()  # an LM learns from all
        digest = hashlib.sha256(repr(sorted(told.items())).encode())
        for text, word in zip(self.texts, self.feedback or [""] * len(self.texts)):
            digest.update(f"{text}\x1f{word}\x1e".encode())
        digest.update(self.kinds.tobytes())
        digest.update(self.events.offsets.tobytes())
        return digest.hexdigest()

    def rendered(self) -> list[str]:
        """Text of each event kind, separator in front, as it is tokenised."""
        return [
            self.format.separator
            + self.format.template.replace("{text}", t).replace("{feedback}", w)
            for t, w in zip(self.texts, self.feedback or [""] * len(self.texts))
        ]

    def block(self, tokenizer: Any, layout: Layout, start: int, stop: int) -> Behaviour:
        """Behaviour of users `start:stop`."""
        table = self._table(tokenizer)
        offsets = self.events.offsets[start : stop + 1]
        return build_behaviour(
            table,
            self.kinds[offsets[0] : offsets[-1]],
            offsets - offsets[0],
            layout,
            max_tokens=self.format.max_tokens,
            chunk_tokens=self.format.chunk_tokens,
            context=self.format.context,
            text_weight=self.format.text_weight,
            feedback_weight=self.format.feedback_weight,
        )

    def told(self, tokenizer: Any, start: int, stop: int, repeats: bool = False) -> Told:
        """See `Source`."""
        offsets = self.events.offsets[start : stop + 1]
        kinds = self.kinds[offsets[0] : offsets[-1]]
        tokens = np.diff(self._table(tokenizer).offsets)
        kept, user = told_events(tokens[kinds], offsets - offsets[0], *self.format.limits)
        kinds, user = kinds[kept], user[kept]
        if not (repeats or self.format.repeats):
            pair = user * len(self.texts) + kinds
            ordered = np.sort(pair)
            if (ordered[1:] == ordered[:-1]).any():
                first = np.sort(np.unique(pair, return_index=True)[1])
                kinds, user = kinds[first], user[first]
        ends = np.cumsum(np.bincount(user, minlength=stop - start))
        return Told(self.texts, self.feedback, tokens, kinds, np.concatenate([[0], ends]))

    def reach(self, tokenizer: Any, start: int, stop: int) -> Reach:
        """See `Source`."""
        offsets = self.events.offsets[start : stop + 1]
        return Reach.count(
            self._table(tokenizer),
            self.kinds[offsets[0] : offsets[-1]],
            offsets - offsets[0],
            self.format.limits,
            text_tokenizer(tokenizer).unknown,
        )

    def empty_users(self, tokenizer: Any) -> Int64:
        """Users of whom no event is told."""
        size = np.diff(self._table(tokenizer).offsets)[self.kinds]
        kept, user = told_events(size, self.events.offsets, *self.format.limits)
        return np.flatnonzero(np.bincount(user[kept], minlength=self.num_users) == 0)

    def part(self, start: int, stop: int) -> BehaviourSource:
        """See `Source`."""
        if (start, stop) == (0, self.num_users):
            return self
        return BehaviourSource(self.events.users(start, stop), self.format, self._shared)

    def refuse_untold(self, tokenizer: Any, on_bad: str) -> Int64:
        """Users of whom no event is told; DataError as `without_untold` says."""
        untold = self.empty_users(tokenizer)
        names = [self.events.user_keys[int(u)].as_py() for u in untold[:10]]
        check_untold(len(untold), names, self.num_users, self.format, on_bad)
        return untold

    def without_untold(self, tokenizer: Any, on_bad: str) -> BehaviourSource:
        """See `Source`."""
        untold, told = self.refuse_untold(tokenizer, on_bad), self
        if len(untold):
            kept = np.setdiff1d(np.arange(self.num_users), untold)
            told = BehaviourSource(self.events.select_users(kept), self.format, self._shared)
        told.reach(tokenizer, 0, told.num_users).warn(*self.format.limits[:2])
        return told

    def blocks(
        self, tokenizer: Any, layout: Layout, size: int
    ) -> Iterator[tuple[int, int, Behaviour]]:
        """(start, stop, behaviour) of all users, `size` users at a time."""
        for start in range(0, self.num_users, size):
            stop = min(start + size, self.num_users)
            yield start, stop, self.block(tokenizer, layout, start, stop)

    def _table(self, tokenizer: Any) -> TokenTable:
        if self._shared is not None:
            return self._shared.table(self.texts, self.feedback)
        key = f"{id(tokenizer)}"
        if key not in self._tokens:
            self._tokens = {
                key: tokenize_events(
                    tokenizer,
                    self.texts,
                    self.feedback,
                    self.format.template,
                    self.format.separator,
                )
            }
        return self._tokens[key]


def check_untold(
    count: int, names: list[Any], users: int, fmt: BehaviourFormat, on_bad: str
) -> None:
    """Refuses `count` of `users`, of whom no event is told, or says that they are skipped.

    Args:
        names: Of the first of them.
    """
    if count:
        name = "chunk_tokens" if fmt.chunk_tokens < fmt.max_tokens else "max_tokens"
        limit = f"data.{name}={fmt.chunk_tokens}"
        why = (
            f"{count} users have a history that truncates to nothing: their latest event "
            f"alone has more than {limit} tokens; first users: {names}"
        )
        if on_bad == "error":
            raise DataError(
                f"{why}; raise data.{name}, shorten the text, or skip them (on_bad=skip)"
            )
        if count == users:
            raise DataError(f"{why}; nobody is left")
        logger.warning("%s; skipped", why)

"""Behaviour of users whose histories lie on disk, built block by block; or of whatever there is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from userip_fast.core.keys import hash_keys
from userip_fast.core.profiles import NEGATIVE_WORDS
from userip_fast.data import Catalogue, Data, Events, InteractionStream
from userip_fast.prompts.behaviour import BehaviourSource, Told, check_untold
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import Layout, TokenTable, tokenize_events
from userip_fast.prompts.packing import Behaviour, Int64
from userip_fast.prompts.reach import Reach

_SURVEY_USERS = 1 << 16
_TOLD_USERS = 1 << 12  # of a stream, those who are looked at before the rest is read


class EventTokens:
    """Tokens of event texts, each tokenised once however many blocks it occurs in."""

    def __init__(self, tokenizer: Any, fmt: BehaviourFormat) -> None:
        self.tokenizer, self.format = tokenizer, fmt
        self._row: dict[tuple[str, str], int] = {}
        self._ids: list[npt.NDArray[np.int32]] = []
        self._flags: list[npt.NDArray[np.bool_]] = []

    def table(self, texts: Sequence[str], feedback: Sequence[str] | None) -> TokenTable:
        """As `tokenize_events` gives it."""
        events = list(zip(texts, feedback if feedback is not None else [""] * len(texts)))
        new = [e for e in dict.fromkeys(events) if e not in self._row]
        if new:
            made = tokenize_events(
                self.tokenizer,
                [t for t, _ in new],
                None if feedback is None else [w for _, w in new],
                self.format.template,
                self.format.separator,
            )
            for i, event in enumerate(new):
                here = slice(made.offsets[i], made.offsets[i + 1])
                self._row[event] = len(self._ids)
                self._ids.append(made.ids[here])
                self._flags.append(made.is_feedback[here])
        rows = [self._row[e] for e in events]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(self._ids[r]) for r in rows], out=offsets[1:])
        none = [np.zeros(0, np.int32)]
        return TokenTable(
            np.concatenate([self._ids[r] for r in rows] or none),
            np.concatenate([self._flags[r] for r in rows] or none).astype(np.bool_),
            offsets,
        )


class StreamSource:
    """See the module; a `Source` of the same behaviour as `BehaviourSource` has in memory.

    Attributes:
        empty: Users of `data`, ascending, whose latest event alone has more tokens than fit.
            Nothing is left of them: they are not among this source's users.
    """

    def __init__(
        self,
        data: InteractionStream,
        fmt: BehaviourFormat,
        catalogue: Catalogue,
        tokens: EventTokens | None = None,
    ) -> None:
        self.data, self.format, self.catalogue = data, fmt, catalogue
        self._tokens = tokens
        self._recent: dict[tuple[int, int], BehaviourSource] = {}
        self.empty: Int64 = np.zeros(0, np.int64)

    @property
    def num_users(self) -> int:
        return self.data.num_users - len(self.empty)

    def hashes_of(self, start: int, stop: int) -> npt.NDArray[np.uint64]:
        """See `Source`."""
        return self.part(start, stop).hashes

    def users_between(self, low: int, high: int) -> tuple[int, int]:
        """See `Source`."""
        first, last = self.data.first_at(low), self.data.first_at(high)
        return (
            first - int(np.searchsorted(self.empty, first)),
            last - int(np.searchsorted(self.empty, last)),
        )

    def keys_of(self, start: int, stop: int) -> pa.Array:
        """See `Source`."""
        return self.part(start, stop).events.user_keys

    def events_of(self, start: int, stop: int) -> Events:
        """See `Source`."""
        return self.part(start, stop).events

    def content_key(self) -> str:
        """See `Source`."""
        digest = hashlib.sha256(self.data.digest.encode())
        digest.update(repr(sorted(self.format.to_dict().items())).encode())
        digest.update(hash_keys(self.catalogue.item_keys).tobytes())
        digest.update(self.catalogue.counts.tobytes())
        return digest.hexdigest()

    def block(self, tokenizer: Any, layout: Layout, start: int, stop: int) -> Behaviour:
        """See `Source`."""
        return self.part(start, stop).block(tokenizer, layout, 0, stop - start)

    def told(self, tokenizer: Any, start: int, stop: int, repeats: bool = False) -> Told:
        """See `Source`."""
        return self.part(start, stop).told(tokenizer, 0, stop - start, repeats)

    def reach(self, tokenizer: Any, start: int, stop: int) -> Reach:
        """See `Source`."""
        return self.part(start, stop).reach(tokenizer, 0, stop - start)

    def part(self, start: int, stop: int) -> BehaviourSource:
        """See `Source`; the last few asked for are kept."""
        if (found := self._recent.get((start, stop))) is not None:
            return found
        # Users of `data` at which those of this source lie, behind the empty ones before them.
        behind = self.empty - np.arange(len(self.empty))
        first, last = (
            i + int(np.searchsorted(behind, i, side="right")) for i in (start, max(stop - 1, start))
        )
        last = last + 1 if stop > start else first
        data = self.data.users(first, last)
        if last - first > stop - start:
            rows = np.setdiff1d(np.arange(first, last), self.empty) - first
            data = data.select_users(rows)
        events = self.format.events(data, self.catalogue)
        found = BehaviourSource(events, self.format, self._tokens)
        while len(self._recent) > 4:
            self._recent.pop(next(iter(self._recent)), None)
        self._recent[start, stop] = found
        return found

    def without_untold(self, tokenizer: Any, on_bad: str) -> StreamSource:
        """See `Source`."""
        told = StreamSource(
            self.data, self.format, self.catalogue, EventTokens(tokenizer, self.format)
        )
        told.empty = told._find_empty(tokenizer)
        names = [self.data.users(u, u + 1).user_keys[0].as_py() for u in told.empty[:10].tolist()]
        check_untold(len(told.empty), names, self.data.num_users, self.format, on_bad)
        some = min(_TOLD_USERS, told.num_users)
        who = "users" if some == told.num_users else f"of the first {some:,} users"
        told.reach(tokenizer, 0, some).warn(*self.format.limits[:2], who)
        return told

    def _find_empty(self, tokenizer: Any) -> Int64:
        """Reads all users only where the catalogue has an event that does not fit by itself."""
        assert self._tokens is not None
        words: tuple[str, ...] | None = None
        texts = self.data.item_text.to_pylist()
        if self.format.negatives:
            words = NEGATIVE_WORDS
            texts += self.catalogue.item_text.to_pylist()
        elif self.format.scale is not None:
            words = self.format.scale.words
        longest = 0
        for word in words or ("",):
            table = self._tokens.table(texts, None if words is None else [word] * len(texts))
            longest = max(longest, int(np.diff(table.offsets).max(initial=0)))
        if longest <= self.format.chunk_tokens:
            return self.empty
        found = [
            start
            + self.part(start, min(start + _SURVEY_USERS, self.data.num_users)).empty_users(
                tokenizer
            )
            for start in range(0, self.data.num_users, _SURVEY_USERS)
        ]
        self._recent.clear()
        return np.concatenate(found)


def behaviour_source(
    data: Data, fmt: BehaviourFormat, catalogue: Catalogue
) -> BehaviourSource | StreamSource:
    """Behaviour of the users of `data`, in memory or on disk as the data is."""
    if isinstance(data, InteractionStream):
        return StreamSource(data, fmt, catalogue)
    return BehaviourSource(fmt.events(data, catalogue), fmt)

"""From events to behaviour tokens: one format, fixed at fit, saved with the model, reused later."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from userip_fast.core.config import DataConfig
from userip_fast.core.errors import ConfigError, DataError, FormatError, MismatchError, shown
from userip_fast.core.keys import hash_keys
from userip_fast.core.profiles import NEGATIVE_WORDS
from userip_fast.core.settings import build
from userip_fast.data import Catalogue, Events, FeedbackScale, Interactions, Negatives, make_events
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
    from userip_fast.data import InteractionStream
    from userip_fast.prompts.stream import EventTokens

logger = logging.getLogger("userip_fast")


@dataclass(frozen=True)
class BehaviourFormat:
    """How a user's events are told to the LM, and which tokens carry loss.

    Attributes:
        template: Event template, with `{feedback}` when there is feedback.
        scale: Ratings to words, or None.
        chunk_tokens: Longest sequence, at most `max_tokens`.
        negatives: Sampled negatives per event of a log without ratings; 0 for none.
        text_weight, feedback_weight: Loss weight of a token of the item text, of the feedback.
        text: Template of the item text that the model was fitted on; None where it is not known.
        repeats: Whether an independent event that a user has again is told again. Who buys an item
            ten times has not told ten things of himself.
    """

    template: str
    separator: str
    context: Literal["sequence", "independent"]
    max_tokens: int
    chunk_tokens: int
    scale: FeedbackScale | None
    negatives: int
    text_weight: float
    feedback_weight: float
    seed: int
    text: str | None = None
    repeats: bool = True

    @classmethod
    def fit(
        cls, config: DataConfig, data: Interactions | InteractionStream, seed: int
    ) -> BehaviourFormat:
        """Chooses what the config leaves open, from the training data.

        Raises:
            DataError: The config asks for feedback that the data cannot give.
        """
        words = config.feedback_words
        ratings = data.rating_counts()
        if ratings is None:
            scale = None
        elif config.feedback_thresholds is not None:
            scale = FeedbackScale(words, config.feedback_thresholds)
        else:
            scale = FeedbackScale.fit_counts(*ratings, words)
        negatives = 0
        if scale is None:
            negatives = config.negatives or 0
        has_feedback = scale is not None or negatives > 0
        template = config.behaviour
        if template == "auto":
            template = "{text}: {feedback}" if has_feedback else "{text}"
        if "{feedback}" not in template:
            scale, negatives, has_feedback = None, 0, False
        elif not has_feedback:
            raise DataError(
                f"data.behaviour={template!r} tells feedback, but the log has no varying rating "
                "and data.negatives is 0; name a rating column, ask for negatives, or "
                "drop {feedback}"
            )
        if isinstance(config.loss, tuple):
            text_weight, feedback_weight = config.loss
        elif config.loss == "all" or (config.loss == "auto" and not has_feedback):
            text_weight = feedback_weight = 1.0
        else:
            text_weight, feedback_weight = 0.0, 1.0
        if not has_feedback and text_weight == 0:
            raise DataError(
                f"data.loss={config.loss!r} puts no loss on item text, and the log has no "
                "feedback: no token would carry loss; use loss=all"
            )
        context = "sequence" if config.behaviour_context == "auto" else config.behaviour_context
        made = cls(
            template,
            config.separator,
            context,
            *config.token_limits,
            scale,
            negatives,
            text_weight,
            feedback_weight,
            seed,
            None if data.read_as is None else data.read_as.text,
        )
        return replace(made, repeats=context == "sequence" or not made.by_lifts)

    @property
    def limits(self) -> tuple[int, int, bool]:
        """What `told_events` goes by, after sizes and offsets."""
        return self.max_tokens, self.chunk_tokens, self.context == "independent"

    @property
    def words(self) -> tuple[str, ...]:
        """The words that tell how an event went; none where nothing is told of it."""
        if self.scale is not None:
            return self.scale.words
        return NEGATIVE_WORDS if self.negatives else ()

    @property
    def best_word(self) -> int:
        """Index of the word for the best that may happen."""
        return 0 if self.negatives else len(self.words) - 1

    @property
    def by_lifts(self) -> bool:
        """Whether an event is a choice or a reaction, whose probabilities add up to one over items
        or words (`userip_fast.em.lifts`); not both at once."""
        return not self.words or self.text_weight == 0

    def check_text(self, data: Interactions | InteractionStream) -> None:
        """Raises MismatchError where items of `data` are told in another text than at fit."""
        given = None if data.read_as is None else data.read_as.text
        if self.text is not None and given is not None and given != self.text:
            raise MismatchError(
                f"text={given!r}: the model was fitted on items told as {self.text!r}; read the "
                "log with that text, or fit a model on this one"
            )

    def events(self, data: Interactions, catalogue: Catalogue) -> Events:
        """The users' events, ratings told as words or negatives added from the catalogue."""
        if self.negatives:
            return make_events(data, Negatives(catalogue, n=self.negatives, seed=self.seed))
        return make_events(data, self.scale)

    def kinds(self, tokenizer: Any, layout: Layout, kinds: Sequence[tuple[str, str]]) -> Behaviour:
        """Independent events [E], texts and words, each event in the place of a user."""
        texts = [text for text, _ in kinds]
        words = [word for _, word in kinds] if "{feedback}" in self.template else None
        table = tokenize_events(tokenizer, texts, words, self.template, self.separator)
        return build_behaviour(
            table,
            np.arange(len(kinds)),
            np.arange(len(kinds) + 1),
            layout,
            max_tokens=int(np.diff(table.offsets).max(initial=2)),
            context="independent",
            text_weight=self.text_weight,
            feedback_weight=self.feedback_weight,
        )

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["scale"] = self.scale.to_dict() if self.scale else None
        if self.text is None:
            del values["text"]  # as in older models, whose fingerprints stay what they were
        if self.repeats:
            del values["repeats"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BehaviourFormat:
        """The inverse of `to_dict`.

        Raises:
            FormatError: Something is missing, of another type or out of range.
        """
        values = {"chunk_tokens": values["max_tokens"], **values}  # absent in older models
        try:
            made = build(cls, values, "behaviour")
        except (ConfigError, DataError) as e:
            raise FormatError(str(e)) from e
        sizes = made.chunk_tokens, made.negatives, made.text_weight, made.feedback_weight
        if "{text}" not in made.template or min(sizes) < 0 or made.max_tokens < made.chunk_tokens:
            raise FormatError(f"behaviour: must be a format that was saved, is {shown(values)}")
        return made


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

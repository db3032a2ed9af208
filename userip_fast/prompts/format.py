"""How events are told to the LM: one format, fixed at fit, saved with the model, reused later."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from userip_fast.core.config import DataConfig
from userip_fast.core.errors import ConfigError, DataError, FormatError, MismatchError, shown
from userip_fast.core.profiles import NEGATIVE_WORDS
from userip_fast.core.settings import build
from userip_fast.data import Catalogue, Events, FeedbackScale, Interactions, Negatives, make_events
from userip_fast.prompts.layout import Layout, tokenize_events
from userip_fast.prompts.packing import Behaviour, build_behaviour

if TYPE_CHECKING:
    from userip_fast.data import InteractionStream


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

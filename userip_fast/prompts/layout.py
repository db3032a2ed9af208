"""Profile fields, and where their names, soft rows and the behaviour stand in the prompt.

    BOS | name_1 soft_1 | name_2 soft_2 | ... | name_J soft_J | behaviour

One segment id per row is the whole attention mask (arXiv 2408.06577, section on soft prompts; the
causal story is that traits cause behaviour, and that a trait is described by its own name alone):

    row r sees column c  iff  c is not later, and
        segment_r == segment_c  or  segment_c < 0  or  segment_c < J <= segment_r

BOS has segment -1, field j has segment j, behaviour has segment J (one sequence) or J + event
(events that are independent given the profile). Names are constant text: together with BOS they are
the *prefix*, whose keys and values are computed once per LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from userip_fast.core.errors import ConfigError
from userip_fast.core.fields import ProfileField as ProfileField  # which many take from here
from userip_fast.prompts.text_tokens import text_tokenizer

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """Rows of a prompt, for one tokenizer.

    Attributes:
        prefix_ids: [P] token ids of BOS and the field names.
        prefix_segment, prefix_position: [P].
        soft_segment, soft_position: [S], rows of theta[u] in order (field by field, m rows each).
        field_slices: Where field j lies among the S rows.
        behaviour_start: Position of the first behaviour row, P + S.
    """

    prefix_ids: Int32
    prefix_segment: Int32
    prefix_position: Int32
    soft_segment: Int32
    soft_position: Int32
    field_slices: tuple[slice, ...]

    @property
    def num_fields(self) -> int:
        return len(self.field_slices)

    @property
    def num_soft(self) -> int:
        return len(self.soft_segment)

    @property
    def behaviour_start(self) -> int:
        return len(self.prefix_ids) + len(self.soft_segment)


@dataclass(frozen=True)
class PromptTemplate:
    """The fields of a profile and the order they stand in.

    Raises:
        ConfigError: There is no field.
    """

    fields: tuple[ProfileField, ...]

    def __post_init__(self) -> None:
        if not self.fields:
            raise ConfigError("a PromptTemplate needs at least one ProfileField")

    def layout(self, tokenizer: Any) -> Layout:
        """Tokenises the names. Here, and here alone, control tokens of the LM's format are meant.

        Args:
            tokenizer: A Hugging Face tokenizer. Its BOS, if it has one, becomes the first prefix
            row.
        """
        ids: list[int] = []
        prefix_segment: list[int] = []
        prefix_position: list[int] = []
        soft_segment: list[int] = []
        soft_position: list[int] = []
        slices: list[slice] = []
        if tokenizer.bos_token_id is not None:
            ids.append(tokenizer.bos_token_id)
            prefix_segment.append(-1)
            prefix_position.append(0)
        for j, f in enumerate(self.fields):
            name = tokenizer(f.prompt, add_special_tokens=False)["input_ids"] if f.prompt else []
            at = len(ids) + len(soft_segment)
            ids += name
            prefix_segment += [j] * len(name)
            prefix_position += range(at, at + len(name))
            slices.append(slice(len(soft_segment), len(soft_segment) + f.num_virtual_tokens))
            soft_position += range(at + len(name), at + len(name) + f.num_virtual_tokens)
            soft_segment += [j] * f.num_virtual_tokens

        def as_int32(values: Sequence[int]) -> Int32:
            return np.asarray(values, np.int32)

        return Layout(
            as_int32(ids),
            as_int32(prefix_segment),
            as_int32(prefix_position),
            as_int32(soft_segment),
            as_int32(soft_position),
            tuple(slices),
        )


@dataclass(frozen=True)
class TokenTable:
    """Token ids of distinct event texts, as a CSR: event kind e has `ids[offsets[e]:offsets[e +
    1]]`.

    Attributes:
        ids: [N] int32.
        is_feedback: [N] bool, tokens that tell the user's reaction.
        offsets: [E + 1] int64.
    """

    ids: Int32
    is_feedback: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]


def tokenize_events(
    tokenizer: Any,
    texts: Sequence[str],
    feedback: Sequence[str] | None,
    behaviour: str,
    separator: str,
) -> TokenTable:
    """Tokenises events, each with the separator in front of it.

    So an event's tokens do not depend on its place in the history, and its first word is predicted
    from the separator. Feedback tokens are found by character offsets; where a token would reach
    from the feedback into other text, the parts are tokenised apart. All of it is read as text: a
    title that spells a control token becomes no such token (`userip_fast.prompts.text_tokens`).

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        texts: Item text of each event kind.
        feedback: Word of each event kind, or None when `behaviour` has no `{feedback}`.
        behaviour: Event template, for example "{text}: {feedback}".
        separator: Text between events.

    Raises:
        UnsupportedError: The tokenizer cannot tell character offsets, or makes control tokens of
            text.
    """
    read = text_tokenizer(tokenizer)
    before, word, after = behaviour.partition("{feedback}")
    if bool(word) != (feedback is not None):
        raise ConfigError(
            f"behaviour template {behaviour!r} {'needs' if word else 'has no place for'} feedback"
        )
    heads = [separator + before.replace("{text}", t) for t in texts]
    tails = [after.replace("{text}", t) for t in texts]
    words = feedback if feedback is not None else [""] * len(texts)
    whole = [h + w + t for h, w, t in zip(heads, words, tails, strict=True)]
    ids: list[npt.NDArray[np.int32]] = []
    flags: list[npt.NDArray[np.bool_]] = []
    step = 8192  # bounds the tokenizer's own memory
    for i in range(0, len(whole), step):
        for n, encoding in enumerate(read.encode(whole[i : i + step]), start=i):
            start = len(heads[n])
            stop = start + len(words[n])
            token_ids = np.asarray(encoding.ids, np.int32)
            span = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            hit = (span[:, 1] > start) & (span[:, 0] < stop)
            straddles = any(
                (whole[n][a:start] + whole[n][stop:b]).strip() for a, b in span[hit].tolist()
            )
            if straddles:
                parts = [read(part) if part else [] for part in (heads[n], words[n], tails[n])]
                token_ids = np.asarray([t for part in parts for t in part], np.int32)
                hit = np.repeat([False, True, False], [len(part) for part in parts])
            ids.append(token_ids)
            flags.append(hit)
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(x) for x in ids], out=offsets[1:])
    return TokenTable(
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.concatenate(flags) if flags else np.zeros(0, np.bool_),
        offsets,
    )

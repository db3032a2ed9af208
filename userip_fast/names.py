"""What a code means, in words: nearest vocabulary words, and the items its users favour."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from userip_fast.codebook import Codebook
from userip_fast.data import Events
from userip_fast.lm.frozen import FrozenLM
from userip_fast.packing import Int64
from userip_fast.prompts import ProfileField


@dataclass(frozen=True)
class CodeCard:
    """One code.

    Attributes:
        users: Users who have it.
        words: Vocabulary words nearest to what sets its codeword apart from the field's others.
        items: Texts of the items most over-represented among its users.
        lift: Of each item: its share among the code's users over its share among all.
    """

    code: int
    users: int
    words: tuple[str, ...]
    items: tuple[str, ...]
    lift: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def code_cards(
    lm: FrozenLM,
    fields: tuple[ProfileField, ...],
    codebooks: list[Codebook],
    code_ids: Int64,
    events: Events,
    *,
    words: int = 3,
    items: int = 3,
) -> dict[str, list[CodeCard]]:
    """Cards of every field's codes, from the users' events.

    Args:
        code_ids: [U, J], the users of `events` in its order.
        events: Only events with the best feedback count (the top rating word, or items chosen).
    """
    kept = np.ones(events.num_events, bool)
    if events.level is not None:
        best = 0 if events.words[0] == "chosen" else len(events.words) - 1
        kept = events.level == best
    user = np.repeat(np.arange(events.num_users), np.diff(events.offsets))[kept]
    item = events.item_index[kept].astype(np.int64)
    base = np.bincount(item, minlength=len(events.item_keys)).astype(np.float64)
    share = base / max(base.sum(), 1.0)

    cards: dict[str, list[CodeCard]] = {}
    for j, (f, book) in enumerate(zip(fields, codebooks)):
        near = _nearest_words(lm, f, book, words)
        counts = np.bincount(code_ids[:, j], minlength=len(book))
        cards[f.name] = []
        for k in range(len(book)):
            own = np.bincount(item[code_ids[user, j] == k], minlength=len(base)).astype(np.float64)
            expected = share * own.sum()
            # Deviation in standard errors: a lift alone would crown items bought once.
            score = (own - expected) / np.sqrt(expected + 1e-9)
            score[own < 2] = -math.inf
            top = [i for i in np.argsort(-score, kind="stable")[:items] if score[i] > 0]
            cards[f.name].append(
                CodeCard(
                    code=k,
                    users=int(counts[k]),
                    words=near[k],
                    items=tuple(events.item_text[int(i)].as_py() for i in top),
                    lift=tuple(float(own[i] / expected[i]) for i in top),
                )
            )
    return cards


def _nearest_words(
    lm: FrozenLM, f: ProfileField, book: Codebook, count: int
) -> list[tuple[str, ...]]:
    """Words by cosine, both sides centred: what all codewords share says nothing of one code."""
    ids, words = lm.vocabulary_words()
    table = lm.embed(ids).float()
    center = table.mean(0)
    if f.candidates:
        own = torch.stack([lm.word_embedding(w) for w in f.candidates])
        center = own.mean(0)
        table, words = torch.cat([own, table]), [*f.candidates, *words]
    codewords = book.codewords.view(len(book), f.num_virtual_tokens, -1).mean(1).to(table)
    apart = codewords - codewords.mean(0) if len(book) > 1 else codewords - center
    score = F.normalize(apart, dim=1) @ F.normalize(table - center, dim=1).T
    out = []
    for order in score.argsort(dim=1, descending=True)[:, : 4 * count].tolist():
        distinct = dict.fromkeys(words[i] for i in order)
        out.append(tuple(distinct)[:count])
    return out

"""What a code means, in words: nearest vocabulary words, and the items its users favour."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from userip_fast.codebook import Codebook
from userip_fast.data import Events
from userip_fast.em.distributed import Processes
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


class ItemCounts:
    """How often each item goes with each code, added up block by block.

    Args:
        sizes: [J] codes of each field.
        items: Number of items.
    """

    def __init__(self, sizes: list[int], items: int) -> None:
        self.users = [np.zeros(k, np.int64) for k in sizes]
        self.items = [np.zeros((k, items), np.int64) for k in sizes]

    def add(self, code_ids: Int64, events: Events) -> None:
        """Adds users' events; only those with the best feedback count.

        Args:
            code_ids: [U, J], the users of `events` in its order.
            events: The top rating word or items chosen count, or all where there is no feedback.
                Items of that kind are among the first `items`.
        """
        kept = np.ones(events.num_events, bool)
        if events.level is not None:
            best = 0 if events.words[0] == "chosen" else len(events.words) - 1
            kept = events.level == best
        user = np.repeat(np.arange(events.num_users), np.diff(events.offsets))[kept]
        item = events.item_index[kept].astype(np.int64)
        for j, (users, items) in enumerate(zip(self.users, self.items)):
            users += np.bincount(code_ids[:, j], minlength=len(users))
            pair, count = np.unique(code_ids[user, j] * items.shape[1] + item, return_counts=True)
            items.reshape(-1)[pair] += count

    def merge(self, processes: Processes) -> None:
        """Adds up the counts of all processes, in every one of them."""
        mine = {
            f"{n}.{j}": torch.from_numpy(x)
            for n in ("users", "items")
            for j, x in enumerate(getattr(self, n))
        }
        parts = processes.gather(mine)
        for name in mine:
            kind, j = name.split(".")
            getattr(self, kind)[int(j)] = sum(p[name].numpy() for p in parts)


def code_cards(
    lm: FrozenLM,
    fields: tuple[ProfileField, ...],
    codebooks: list[Codebook],
    counts: ItemCounts,
    item_text: pa.Array,
    *,
    words: int = 3,
    items: int = 3,
) -> dict[str, list[CodeCard]]:
    """Cards of every field's codes.

    Args:
        counts: Of the users' events.
        item_text: [I] text of each item of `counts`.
    """
    cards: dict[str, list[CodeCard]] = {}
    for j, (f, book) in enumerate(zip(fields, codebooks)):
        near = _nearest_words(lm, f, book, words)
        base = counts.items[j].sum(0).astype(np.float64)
        share = base / max(base.sum(), 1.0)
        cards[f.name] = []
        for k in range(len(book)):
            own = counts.items[j][k].astype(np.float64)
            expected = share * own.sum()
            # Deviation in standard errors: a lift alone would crown items bought once.
            score = (own - expected) / np.sqrt(expected + 1e-9)
            score[own < 2] = -math.inf
            top = [i for i in np.argsort(-score, kind="stable")[:items] if score[i] > 0]
            cards[f.name].append(
                CodeCard(
                    code=k,
                    users=int(counts.users[j][k]),
                    words=near[k],
                    items=tuple(item_text[int(i)].as_py() for i in top),
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

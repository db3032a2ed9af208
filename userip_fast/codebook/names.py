"""What a code means, told by what its users do otherwise than everybody.

A code's name is made of attribute values, words of item texts and items that its users choose more
often than all users do. What stands out is chosen on one half of the users, and told with the
figures of the other half: of thousands of words some always look special among those they were
looked for in. Codes were read from the same choices, so a name describes, it does not forecast.
Both halves lie in folds, so that intervals are over users and not over events.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from userip_fast.codebook.books import Codebook
from userip_fast.core.distributed import Processes
from userip_fast.core.fields import ProfileField
from userip_fast.core.keys import hash_keys, seeded
from userip_fast.data import Events
from userip_fast.data.attributes import item_attributes
from userip_fast.lm.frozen import FrozenLM
from userip_fast.prompts.packing import Int64

_FOLDS = 5  # of either half
_T = 2.776  # 97.5 % of Student's t with a degree of freedom less than folds
_FEWEST_EVENTS = 10  # of a code on a trait, in the half that it is chosen on
_WORDS, _ITEMS, _WORD_ITEMS = 4096, 2048, 3  # traits looked at; items that share a word
_TRAITS_TOLD = 3
_NAMED = 1.5


@dataclass(frozen=True)
class Tell:
    """Something that a code's users choose more often than everybody.

    Attributes:
        what: "genres: Horror", a word in quotes, or an item's text.
        ratio: Its share of the choices of the code's users over its share of all users', among the
            users that it was not chosen on.
        low, high: 95 % interval, by jackknife over users.
    """

    what: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class CodeCard:
    """One code.

    Attributes:
        users: Users who have it.
        words: Its name: what it tells most surely, or, of an LM that knows words, those nearest to
            what sets its codeword apart from the field's others.
        items: Texts of the items most over-represented among its users.
        lift: Of each item: its share among the code's users over its share among all.
        told: What its users choose more often, the surest first.
        reactions: Word -> share of its users' events; empty where nothing is told of how they went.
    """

    code: int
    users: int
    words: tuple[str, ...]
    items: tuple[str, ...]
    lift: tuple[float, ...]
    told: tuple[Tell, ...] = ()
    reactions: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Traits:
    """Attribute values, words and items that codes may be told by.

    Attributes:
        texts: [I] of the items.
        names: [T].
        item, trait: [N] pairs of an item and one of its traits.
        is_item: [T] bool.
    """

    texts: pa.Array
    names: list[str]
    item: Int64
    trait: Int64
    is_item: NDArray[np.bool_]

    @classmethod
    def of(cls, items: pa.Table, texts: pa.Array, counts: Int64) -> Traits:
        """Of a catalogue.

        Args:
            items: [I] the items' columns.
            texts: [I] their texts.
            counts: [I] how often they were chosen; rare items are no traits.
        """
        names: list[str] = []
        pairs: list[tuple[Int64, Int64]] = []
        for a in item_attributes(items):
            row, place = np.nonzero(a.values)
            pairs.append((row, a.values[row, place] - 1 + len(names)))
            names += [f"{a.name}: {word}" for word in a.words]
        told = [t.lower() for t in texts.to_pylist()]
        own = [sorted(set(re.findall(r"[^\W\d_]{3,}", text))) for text in told]
        often = Counter(word for words in own for word in words)
        kept = [w for w, n in often.most_common(_WORDS) if n >= _WORD_ITEMS]
        # A word that is an attribute's value is told as that.
        values = {name.partition(": ")[2].lower() for name in names}
        number = {w: len(names) + i for i, w in enumerate(w for w in kept if w not in values)}
        found = [(i, number[w]) for i, words in enumerate(own) for w in words if w in number]
        if found:
            row, trait = np.asarray(found, np.int64).T
            pairs.append((row, trait))
        names += [f'"{w}"' for w in number]
        popular = np.argsort(-counts, kind="stable")[:_ITEMS]
        pairs.append((popular, len(names) + np.arange(len(popular))))
        is_item = np.arange(len(names) + len(popular)) >= len(names)
        names += [texts[int(i)].as_py() for i in popular]
        item, trait = (np.concatenate(x) for x in zip(*pairs))
        return cls(texts, names, item, trait, is_item)


class ItemCounts:
    """How often each item and trait goes with each code, added up block by block.

    Args:
        sizes: [J] codes of each field.
        traits: What to look for.
        words: For how an event went; empty where none is told.
    """

    def __init__(self, sizes: list[int], traits: Traits, words: tuple[str, ...] = ()) -> None:
        self.traits, self.words = traits, words
        self.users = [np.zeros(k, np.int64) for k in sizes]
        self.items = [np.zeros((k, len(traits.texts)), np.int64) for k in sizes]
        # The last column counts all choices.
        self.folds = [np.zeros((2 * _FOLDS, k, len(traits.names) + 1), np.int64) for k in sizes]
        self.reactions = [np.zeros((k, len(words)), np.int64) for k in sizes]

    def add(self, code_ids: Int64, events: Events) -> None:
        """Adds users' events; only those with the best feedback count.

        Args:
            code_ids: [U, J], the users of `events` in its order.
            events: The top rating word or items chosen count, or all where there is no feedback.
                Items of that kind are among the first `items`.
        """
        kept = np.ones(events.num_events, bool)
        owner = np.repeat(np.arange(events.num_users), np.diff(events.offsets))
        if events.level is not None:
            best = 0 if events.words[0] == "chosen" else len(events.words) - 1
            kept = events.level == best
            if self.words:
                for j, table in enumerate(self.reactions):
                    np.add.at(table, (code_ids[owner, j], events.level), 1)
        user = owner[kept]
        item = events.item_index[kept].astype(np.int64)
        fold = (seeded(hash_keys(events.user_keys), 23) % np.uint64(2 * _FOLDS)).astype(np.int64)
        for j, (users, items) in enumerate(zip(self.users, self.items)):
            users += np.bincount(code_ids[:, j], minlength=len(users))
            pair, count = np.unique(code_ids[user, j] * items.shape[1] + item, return_counts=True)
            items.reshape(-1)[pair] += count
            for f in range(2 * _FOLDS):
                own = fold[user] == f
                self._add_traits(self.folds[j][f], code_ids[user[own], j], item[own])

    def _add_traits(self, table: Int64, code: Int64, item: Int64) -> None:
        """Adds choices [n] to [K, T + 1]."""
        size = self.items[0].shape[1]
        table[:, -1] += np.bincount(code, minlength=len(table))
        if not len(item):
            return
        pair, count = np.unique(code * size + item, return_counts=True)
        k, i = np.divmod(pair, size)
        first, last = (np.searchsorted(self._by_item[0], i, side=s) for s in ("left", "right"))
        repeats = last - first
        at = np.repeat(first - np.cumsum(repeats) + repeats, repeats) + np.arange(repeats.sum())
        where = np.repeat(k, repeats) * table.shape[1] + self._by_item[1][at]
        table += (
            np.bincount(where, np.repeat(count, repeats), table.size)
            .astype(np.int64)
            .reshape(table.shape)
        )

    @cached_property
    def _by_item(self) -> tuple[Int64, Int64]:
        order = np.argsort(self.traits.item, kind="stable")
        return self.traits.item[order], self.traits.trait[order]

    def merge(self, processes: Processes) -> None:
        """Adds up the counts of all processes, in every one of them."""
        kinds = ("users", "items", "folds", "reactions")
        mine = {
            f"{n}.{j}": torch.from_numpy(x) for n in kinds for j, x in enumerate(getattr(self, n))
        }
        parts = processes.gather(mine)
        for name in mine:
            kind, j = name.split(".")
            getattr(self, kind)[int(j)] = sum(p[name].numpy() for p in parts)

    def told(self, j: int) -> list[tuple[Tell, ...]]:
        """Per code of field j what its users choose more often, the surest first."""
        folds = self.folds[j].astype(np.float64)
        ratio, error = _log_ratios(folds[:_FOLDS])
        surest = ratio - _T * error
        there, there_error = _log_ratios(folds[_FOLDS:])
        out = []
        for k in range(folds.shape[1]):
            enough = folds[:_FOLDS, k, :-1].sum(0) >= _FEWEST_EVENTS
            order = np.argsort(-np.where(enough, surest[k], -math.inf), kind="stable")
            found: list[Tell] = []
            items = 0
            for t in order[: 8 * _TRAITS_TOLD].tolist():
                if not enough[t] or surest[k, t] <= 0 or len(found) == 2 * _TRAITS_TOLD:
                    break
                items += self.traits.is_item[t]
                if (self.traits.is_item[t] and items > _TRAITS_TOLD) or not np.isfinite(
                    there[k, t]
                ):
                    continue
                spread = _T * there_error[k, t]
                found.append(
                    Tell(
                        self.traits.names[t],
                        *(float(np.exp(there[k, t] + x)) for x in (0.0, -spread, spread)),
                    )
                )
            out.append(tuple(found))
        return out


def _log_ratios(folds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[K, T] log of a trait's share of a code's choices over its share of all, and its error: by
    jackknife over the folds [n, K, T + 1], but at least that of as many choices made apart (of a
    thousand traits a few are alike in all folds by chance). -inf where a code lacks the trait."""
    total = folds.sum(0)

    def ratio(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        own, every = counts[:, :-1], counts[:, :-1].sum(0)
        n, all_of_them = counts[:, -1:], counts[:, -1].sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.log(own / n) - np.log(every / all_of_them))

    left_out = np.stack([ratio(total - fold) for fold in folds])
    found = np.nan_to_num(ratio(total), nan=-np.inf)
    n = len(folds)
    with np.errstate(invalid="ignore"):
        error = np.sqrt((n - 1) / n * np.square(left_out - left_out.mean(0)).sum(0))
        error = np.maximum(error, 1 / np.sqrt(np.maximum(total[:, :-1], 1)))
    return found, np.nan_to_num(error, nan=np.inf, posinf=np.inf)


def code_cards(
    lm: FrozenLM,
    fields: tuple[ProfileField, ...],
    codebooks: list[Codebook],
    counts: ItemCounts,
    *,
    words: int = 3,
    items: int = 3,
) -> dict[str, list[CodeCard]]:
    """Cards of every field's codes.

    Args:
        counts: Of the users' events.
    """
    cards: dict[str, list[CodeCard]] = {}
    for j, (f, book) in enumerate(zip(fields, codebooks)):
        # Only what the other half bears out.
        told = [tuple(t for t in own if t.low > 1) for own in counts.told(j)]
        if lm.foldin is None:
            names = _nearest_words(lm, f, book, words)
        else:  # its soft rows are no words
            names = [tuple(t.what for t in own)[:words] for own in told]
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
            went = counts.reactions[j][k]
            cards[f.name].append(
                CodeCard(
                    code=k,
                    users=int(counts.users[j][k]),
                    words=names[k],
                    items=tuple(counts.traits.texts[int(i)].as_py() for i in top),
                    lift=tuple(float(own[i] / expected[i]) for i in top),
                    told=told[k],
                    reactions=dict(zip(counts.words, (went / max(1, went.sum())).tolist())),
                )
            )
    return cards


def named_share(cards: Sequence[CodeCard]) -> float:
    """Share of users whose code tells something that its users choose 1.5 times as often, or
    more."""
    users = sum(card.users for card in cards)
    named = sum(card.users for card in cards if any(t.ratio >= _NAMED for t in card.told))
    return named / max(users, 1)


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

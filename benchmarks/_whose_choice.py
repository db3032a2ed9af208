"""Whose choice is an item? A frozen LM is told of users by a soft row, and a map to it is learned.

The lesson draws items, each with the user who chose it and others who did not, told by fold-in
vectors of what else they chose; the LM, which has read the item's title, is to say " yes" to the
first more than to the others. Popularity cancels, and what is learned is taste.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _frozen_reader import FrozenReader, Texts
from numpy.typing import NDArray
from torch import Tensor

from userip_fast.core.files import atomic_file
from userip_fast.lm.foldin import fold_in, kind_vectors
from userip_fast.lm.gguf import file_of
from userip_fast.prompts.behaviour import judging
from userip_fast.prompts.packing import Int64, ragged_arange

YES, NO, BEGIN = " yes", " no", ":"
JUDGE = 0.1  # of the users
FIRST = 10  # choices that judges are told by
MOST = 40  # tokens of a text
ITEMS, USERS = 128, 4  # of a step; a title's first user chose it
RATE = 0.01  # of a step, in units of an embedding's root mean square
EVERY = 40  # steps between checkpoints


class Lesson:
    """Whose choice is it? Items, each with the user who chose it and others, told by vectors.

    Attributes:
        vectors: [titles, r] fp32.
        judge: [U] bool, users of whom nothing is learned.
    """

    def __init__(self, offsets: Int64, title: Int64, titles: int) -> None:
        self.offsets, self.title, self.titles = offsets, title, titles
        self.count = np.diff(offsets)
        user = np.repeat(np.arange(len(self.count)), self.count)
        self.pairs = np.sort(user * titles + title)
        self.judge = judging(len(self.count), JUDGE)
        own = ~self.judge[user]
        self.vectors = kind_vectors(user[own], title[own], titles, 0)
        # Whoever has many choices is asked of as often as whoever has thirty.
        share = np.where((self.count > 1) & ~self.judge, np.minimum(self.count, 30), 0)
        self.cumulative = np.cumsum(share) / share.sum()

    def batch(self, random: np.random.Generator, items: int) -> tuple[Int64, Tensor]:
        """[P] titles and [P, Q, r] their users."""

        def draw(n: int) -> Int64:
            at = np.searchsorted(self.cumulative, random.random(n), side="right")
            return np.minimum(at, len(self.count) - 1)

        user = draw(items)
        title = self.title[self.offsets[user] + self._place(random, self.count[user])]
        users = self._with_others(user, title, draw)
        most = self.count[users.ravel()]
        number = np.exp(random.random(len(most)) * np.log(most + 1)).astype(np.int64)
        return title, self._told(users, title, number, self._place(random, most))

    def judged(self, items: int = 768) -> tuple[Int64, Tensor]:
        """The same of judges, told by their first events; always the same ones."""
        random = np.random.default_rng(5)
        judges = np.flatnonzero(self.judge & (self.count > FIRST + 1))
        user = random.choice(judges, items)
        later = self._place(random, np.minimum(self.count[user] - FIRST, 30))
        title = self.title[self.offsets[user] + FIRST + later]
        users = self._with_others(user, title, lambda n: random.choice(judges, n))
        ten = np.full(users.size, FIRST)
        return title, self._told(users, title, ten, np.zeros_like(ten))

    def _with_others(self, user: Int64, title: Int64, draw: Any) -> Int64:
        """[P, Q] the chooser and others, who did not choose the title (as far as draws go)."""
        asked = np.repeat(title, USERS - 1)
        others = draw(len(asked))
        for _ in range(4):
            pair = others * self.titles + asked
            at = np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)
            bad = self.pairs[at] == pair
            others[bad] = draw(int(bad.sum()))
        return np.concatenate([user[:, None], others.reshape(len(user), -1)], axis=1)

    def _told(self, users: Int64, title: Int64, number: Int64, start: Int64) -> Tensor:
        """[P, Q, r] by so many choices in a row from `start`, the title asked for left out."""
        user = users.ravel()
        most = self.count[user]
        number = np.clip(number, 1, most)
        row = np.repeat(np.arange(len(user)), number)
        step = ragged_arange(np.zeros(len(user), np.int64), number)
        kind = self.title[self.offsets[user][row] + (start[row] + step) % most[row]]
        told = kind != np.repeat(title, USERS)[row]
        sums = sums_of(self.vectors[kind] * told[:, None], row, len(user))
        v = fold_in(sums, np.bincount(row, told, len(user)))
        return torch.from_numpy(v).view(*users.shape, -1)

    @staticmethod
    def _place(random: np.random.Generator, below: Int64) -> Int64:
        return (random.random(len(below)) * below).astype(np.int64)


def sums_of(x: NDArray[np.float32], row: Int64, rows: int) -> NDArray[np.float32]:
    out = torch.zeros(rows, x.shape[1])
    return out.index_add_(0, torch.from_numpy(row), torch.from_numpy(x)).numpy()


class Teller:
    """One soft row of any user: v W + b.

    Args:
        rank: r.
        begin: [D] where b begins: the embedding of a token.
        rms: Root mean square of embeddings.
    """

    def __init__(self, rank: int, begin: Tensor, rms: float) -> None:
        noise = torch.randn(rank, len(begin), generator=torch.Generator().manual_seed(0))
        self.weight = (0.3 * rms / rank**0.5 * noise).requires_grad_()
        self.bias = begin.clone().requires_grad_()
        self.adam = torch.optim.Adam([self.weight, self.bias], betas=(0.9, 0.95))
        self.rate, self.step = RATE * rms, 0

    def __call__(self, v: Tensor) -> Tensor:
        return (v @ self.weight + self.bias)[..., None, :]

    def learn(self, loss: Tensor, share_left: float) -> None:
        """One step, of full size until a half is left, then smaller to the end."""
        for group in self.adam.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step + 1) / 10, 2 * share_left)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight, "bias": self.bias, "adam": self.adam.state_dict(),
                "step": self.step}  # fmt: skip

    def take(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])
        self.adam.load_state_dict(state["adam"])
        self.step = state["step"]


class Reading:
    """A log's titles before the frozen LM.

    Args:
        asked: What is read of a title, which stands for {}.
        folder: Keeps the texts' keys and values, and what was learned.
    """

    def __init__(self, name: str, titles: list[str], asked: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)
        lm, tokenizer = small()

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)[:MOST]

        self.words = ids(YES)[0], ids(NO)[0]
        self.reader = FrozenReader(lm, self.words)
        self.begin = self.reader.embedding[ids(BEGIN)[0]]
        self.rms = float(self.reader.embedding.square().mean().sqrt())
        self.cost: dict[str, float] = {}
        path = folder / "texts.pt"
        if not path.is_file():
            began = time.process_time()
            every = [ids(asked.format(title)) for title in titles]
            self._check(lm, every[:8])
            texts = self.reader.read(every)
            cost = {"titles": len(titles), "tokens": texts.tokens,
                    "seconds": time.process_time() - began,
                    "bytes": texts.kept.numel() * 2}  # fmt: skip
            with atomic_file(path) as tmp:
                torch.save((texts.kept, texts.offsets, texts.tokens, cost), tmp)
        kept, offsets, tokens, self.cost = torch.load(path, mmap=True, weights_only=False)
        self.texts = Texts(kept, offsets, tokens)

    @torch.no_grad()
    def _check(self, lm: Any, texts: list[list[int]]) -> None:
        """Whole readings by transformers, in fp32, say the same as far as bfloat16 goes."""
        own = self.reader.odds(
            self.reader.read(texts), np.arange(len(texts)), self.begin.expand(len(texts), 1, 1, -1)
        )[:, 0]
        for text, odds in zip(texts, own.tolist()):
            rows = torch.cat([self.reader.embedding[text], self.begin[None]])
            logits = lm(inputs_embeds=rows[None]).logits[0, -1, list(self.words)]
            assert abs(odds - float(logits[0] - logits[1])) < 0.2, (odds, logits)

    def learn(self, lesson: Lesson, events: int, until: float) -> Teller | None:
        """W and b, learned from so many events; None where time was up before."""
        path = self.folder / "map.pt"
        teller = Teller(lesson.vectors.shape[1], self.begin, self.rms)
        history: list[dict[str, float]] = []
        if path.is_file():
            state = torch.load(path, weights_only=False)
            teller.take(state)
            history = state["history"]
        steps, judged, batches = events // ITEMS, lesson.judged(), []
        spent = history[-1]["seconds"] if history else 0.0
        began, losses = time.process_time(), []

        def look() -> None:
            entry = {"step": teller.step, **self._judge(teller, *judged)}
            entry["learned_from"] = float(np.mean(losses)) if losses else 0.0
            entry["seconds"] = spent + time.process_time() - began
            history.append(entry)
            losses.clear()
            print(self.name, entry, flush=True)
            with atomic_file(path) as tmp:
                torch.save(teller.state() | {"history": history}, tmp)

        while teller.step < steps:
            if teller.step % EVERY == 0:
                if not history or history[-1]["step"] < teller.step:
                    look()
                if time.monotonic() > until:
                    return None
            # Each window of batches has a seed of its own, so that it can be gone on with.
            window, place = divmod(teller.step, EVERY)
            if place == 0 or not batches:
                batches = self._window(lesson, window)
            title, v = batches[place]
            odds = self.reader.odds(self.texts, title, teller(v))
            loss = F.cross_entropy(odds, torch.zeros(len(odds), dtype=torch.int64))
            teller.learn(loss, 1 - teller.step / steps)
            losses.append(float(loss))
        if history[-1]["step"] < teller.step:
            look()
        self.history = history
        return teller

    def _window(self, lesson: Lesson, seed: int) -> list[tuple[Int64, Tensor]]:
        """Batches of titles of like length."""
        random = np.random.default_rng([7, seed])
        title, v = lesson.batch(random, EVERY * ITEMS)
        order = np.argsort(np.diff(self.texts.offsets)[title], kind="stable")
        parts = order.reshape(EVERY, ITEMS)[random.permutation(EVERY)]
        return [(title[part], v[torch.from_numpy(part)]) for part in parts]

    def _judge(self, teller: Teller, title: Int64, v: Tensor) -> dict[str, float]:
        order = np.argsort(np.diff(self.texts.offsets)[title], kind="stable")
        odds = self._odds(teller, title[order], v[torch.from_numpy(order)])
        nll = F.cross_entropy(odds, torch.zeros(len(odds), dtype=torch.int64))
        right = (odds[:, :1] > odds[:, 1:]).double() + 0.5 * (odds[:, :1] == odds[:, 1:]).double()
        return {"judges": float(nll), "judges_right": float(right.mean())}

    @torch.no_grad()
    def _odds(self, teller: Teller, title: Int64, v: Tensor, rows: int = 512) -> Tensor:
        """[P, Q] of P titles and Q users each, so many rows at a time."""
        size = max(1, rows // v.shape[1])
        return torch.cat(
            [
                self.reader.odds(self.texts, title[a : a + size], teller(v[a : a + size]))
                for a in range(0, len(title), size)
            ]
        )

    def table(self, teller: Teller, v: Tensor) -> Tensor:
        """[titles, K] of the codes that stand for users v [K, r]."""
        order = np.argsort(np.diff(self.texts.offsets), kind="stable")
        out = torch.empty(len(order), len(v))
        out[order] = self._odds(teller, order, v.expand(len(order), -1, -1))
        return out

    def pairs(self, teller: Teller, title: Int64, v: Tensor) -> NDArray[np.float32]:
        """[N] of pairs of a title and a user v [N, r]."""
        order = np.lexsort((title, np.diff(self.texts.offsets)[title]))
        out = np.empty(len(title), np.float32)
        told = self._odds(teller, title[order], v[torch.from_numpy(order)][:, None], 256)
        out[order] = told[:, 0].numpy()
        return out


def small() -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = file_of("small")
    assert file is not None
    where = {"gguf_file": file.name}
    lm = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    return lm.eval(), AutoTokenizer.from_pretrained(file.parent, **where)

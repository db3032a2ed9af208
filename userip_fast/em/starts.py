"""First codewords of a mixture of soft prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook, ResidualCodebook
from userip_fast.core.config import Config, EMConfig
from userip_fast.core.errors import ConfigError
from userip_fast.em.free import FreeMixture
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.steps import Block, EMState
from userip_fast.lm.engine import Engine
from userip_fast.lm.foldin import FoldIn
from userip_fast.lm.frozen import FrozenLM
from userip_fast.prompts.behaviour import Source, Told
from userip_fast.prompts.layout import Layout, ProfileField
from userip_fast.prompts.packing import Int64

_TOLD_USERS = 1 << 14  # whose soft rows codewords start from
_CHOOSING_USERS = 128  # who choose among more words than there are codes


class Starts:
    """Codebooks to begin EM with.

    Args:
        block: Training users.
        config: `start`, `start_spread`.
        start: [S, D], the shared start of all users' soft rows.
        told: What some users did, where the LM has a language to be told of it.

    Attributes:
        drawn: Whether another seed gives other codebooks.

    Raises:
        ConfigError: `start="words"`, and a field has no candidate words.
    """

    def __init__(
        self,
        block: Block,
        engine: Engine,
        config: EMConfig,
        fields: tuple[ProfileField, ...],
        start: Tensor,
        told: ToldUsers | None = None,
    ) -> None:
        self.block, self.engine, self.config = block, engine, config
        self.fields, self.start, self.told = fields, start, told
        self.kinds = [kind_of_start(config, f, told is not None) for f in fields]
        self.drawn = any(
            kind != "words" or len(f.candidates) < f.codebook_size
            for kind, f in zip(self.kinds, fields)
        )

    def draw(self, seed: int) -> list[Codebook]:
        """The codebooks; `seed` decides what is drawn."""
        generator = torch.Generator().manual_seed(seed)
        spread = self.config.start_spread * self.engine.lm.embedding_rms
        books = []
        told: list[Codebook] = []
        if "told" in self.kinds:
            assert self.told is not None
            told = self.told.codebooks(self.fields, self.engine.layout, seed)
        for j, (f, s, kind) in enumerate(
            zip(self.fields, self.engine.layout.field_slices, self.kinds)
        ):
            center = self.start[s].flatten()
            drawn = torch.randn(f.codebook_size, len(center), generator=generator)
            codewords = center + spread * drawn
            if kind == "kmeans++":
                x = self.thetas[:, s].flatten(1)
                codewords = Codebook.kmeans(x, f.codebook_size, seed=seed).codewords
            elif kind == "words":
                words = word_codewords(self.engine.lm, f)
                codewords = torch.cat([words, codewords[len(words) :]])
            if kind == "told":
                books.append(told[j])
            else:
                books.append(Codebook(codewords))
        return self._chosen(books)

    @cached_property
    def thetas(self) -> Tensor:
        """[U, S, D] of the gradient E-step."""
        found = GradientEStep(self.engine, self.start, self.config).run(self.block, None, EMState())
        assert found.theta is not None
        return found.theta

    def _chosen(self, books: list[Codebook]) -> list[Codebook]:
        """Of more words than codes those that some users' behaviour speaks for most."""
        if all(len(book) == f.codebook_size for book, f in zip(books, self.fields)):
            return books
        some = self.block.select(np.arange(min(_CHOOSING_USERS, len(self.block.hashes))))
        found = PosteriorEStep(self.engine, self.config).run(some, books, EMState())
        assert found.log_resp is not None
        best = [
            r.exp().sum(0).topk(f.codebook_size).indices.sort().values
            for f, r in zip(self.fields, found.log_resp)
        ]
        return [Codebook(book.codewords[k]) for book, k in zip(books, best)]


@dataclass
class ToldUsers:
    """What U users did, and how the LM is told of it.

    Attributes:
        foldin: The LM's language.
        events: The users' events.
        words: The words for how events went; empty where none is told.
    """

    foldin: FoldIn
    events: Told
    words: tuple[str, ...] = ()
    _free: dict[tuple[int, int], FreeMixture] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, source: Source, judging: npt.NDArray[np.bool_], engine: Engine) -> ToldUsers | None:
        """The first users of `source` who do not judge; None where the LM cannot be told."""
        lm = engine.lm
        if lm.foldin is None or len(lm.foldin.bias) != engine.layout.num_soft:
            return None
        some = judging[:_TOLD_USERS]
        events = source.told(lm.tokenizer, 0, len(some)).select(np.flatnonzero(~some))
        return cls(lm.foldin, events, source.format.words)

    def codebooks(
        self, fields: tuple[ProfileField, ...], layout: Layout, seed: int
    ) -> list[Codebook]:
        """First codewords: what the LM is told of a user who did all that a group's users did.

        The groups of a single field are those of a mixture without an LM. Of several fields, the
        first has the centres of k-means on the users' soft rows, the next those of what it leaves.
        """
        if len(fields) == 1:
            return [self._groups(fields[0].codebook_size, seed)]
        x = self.foldin.theta(self._kinds, self.events.kinds, self.events.offsets).flatten(1)
        center, dims = x.mean(0), self.foldin.bias.shape[1]
        sizes = [f.codebook_size for f in fields]
        levels = ResidualCodebook.kmeans(x - center, sizes, seed=seed).levels
        return [
            Codebook((center + level.codewords)[:, s.start * dims : s.stop * dims].clone())
            for level, s in zip(levels, layout.field_slices)
        ]

    @property
    def _kinds(self) -> list[tuple[str, str]]:
        words = self.events.words
        return list(zip(self.events.texts, words or [""] * len(self.events.texts)))

    def groups(self, texts: Sequence[str], codes: int, seed: int) -> tuple[Tensor, Tensor]:
        """[T W, K] fp32 log p(kind | group) of texts under each word, and [K] fp64 log prior of the
        groups that codewords begin at; 0 throughout of a text that none of these users had."""
        free, words = self._mixture(codes, seed), max(1, len(self.words))
        table = np.concatenate([free.table, np.zeros((words, codes))]).astype(np.float32)
        at = np.asarray([self._texts.get(text, len(self._texts)) for text in texts], np.int64)
        rows = (at[:, None] * words + np.arange(words)).ravel()
        return torch.from_numpy(table[rows]), torch.from_numpy(free.log_prior)

    @cached_property
    def _texts(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(dict.fromkeys(self.events.texts))}

    @property
    def _told(self) -> tuple[Int64, Int64, Int64 | None]:
        """Offsets, texts and words of all events."""
        text = np.asarray([self._texts[t] for t in self.events.texts], np.int64)
        at, level = self.events.kinds, None
        if self.events.words is not None:
            word = {w: i for i, w in enumerate(self.words)}
            level = np.asarray([word[w] for w in self.events.words], np.int64)[at]
        return self.events.offsets, text[at], level

    def _mixture(self, codes: int, seed: int) -> FreeMixture:
        if (codes, seed) not in self._free:
            size = len(self._texts), codes, seed, max(1, len(self.words))
            self._free[codes, seed] = FreeMixture(*self._told, *size, list(self._texts))
        return self._free[codes, seed]

    def _groups(self, codes: int, seed: int) -> Codebook:
        """Codewords [K, S D], and the groups' shares as prior."""
        resp = torch.from_numpy(self._mixture(codes, seed).posterior(*self._told, power=1.0))
        at = self.events.kinds
        theta = self.foldin.theta_of_groups(self._kinds, at, self.events.offsets, resp)
        book = Codebook(theta.flatten(1))
        book.log_prior = ((resp.sum(0) + 1) / (resp.sum() + codes)).log().float()
        return book


def word_codewords(lm: FrozenLM, f: ProfileField) -> Tensor:
    """[words, m D] fp32: the embedding of each candidate word, in each of the field's soft rows."""
    words = torch.stack([lm.word_embedding(w) for w in f.candidates]).cpu()
    return words.repeat(1, f.num_virtual_tokens)


def kind_of_start(config: EMConfig, f: ProfileField, told: bool) -> str:
    """Where the field's codewords start: `config.start`, or what "auto" stands for where the LM
    can be told of users (`told`), and where not."""
    if config.start == "auto":
        return "told" if told else "words" if f.candidates else "random"
    if config.start == "told" and not told:
        raise ConfigError(
            "em.start='told': this LM has not learned to read what a user did; choose 'auto'"
        )
    if config.start == "words" and not f.candidates:
        raise ConfigError(
            f"em.start='words': field {f.name!r} has no candidate words; name some, or choose "
            "'random'"
        )
    return config.start


def shared_start(engine: Engine, config: Config, source: Source) -> Tensor:
    """[S, D] fp32: where all users of a field begin.

    What the embedded LM is told of a user of whom nothing is known; else the mean embedding of the
    field's candidate words; without candidates, of the tokens that the
    first users' behaviour is made of.
    """
    lm = engine.lm
    if lm.foldin is not None and lm.foldin.bias.shape[0] == engine.layout.num_soft:
        return lm.foldin.bias
    rows: list[Tensor] = []
    typical: Tensor | None = None
    for f in config.fields:
        if f.candidates:
            point = torch.stack([lm.word_embedding(w) for w in f.candidates]).mean(0)
        else:
            if typical is None:
                some = min(source.num_users, 1024)
                ids = source.block(lm.tokenizer, engine.layout, 0, some).ids
                kinds, counts = np.unique(ids, return_counts=True)
                share = torch.from_numpy(counts / counts.sum()).float().to(lm.device)
                table = lm.embed(torch.from_numpy(kinds).long().to(lm.device)).float()
                typical = share @ table
            point = typical
        rows += [point] * f.num_virtual_tokens
    return torch.stack(rows).cpu()

"""First codewords of a mixture of soft prompts."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from userip_fast.codebook import Codebook, ResidualCodebook
from userip_fast.config import EMConfig
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.steps import Block, EMState
from userip_fast.errors import ConfigError
from userip_fast.lm.engine import Engine
from userip_fast.lm.frozen import FrozenLM
from userip_fast.packing import telling
from userip_fast.prompts import ProfileField

_CHOOSING_USERS = 128  # who choose among more words than there are codes


class Starts:
    """Codebooks to begin EM with.

    Args:
        block: Training users.
        config: `start`, `start_spread`.
        start: [S, D], the shared start of all users' soft rows.

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
    ) -> None:
        self.block, self.engine, self.config = block, engine, config
        self.fields, self.start = fields, start
        self.kinds = [kind_of_start(config, f) for f in fields]
        self.drawn = any(
            kind != "words" or len(f.candidates) < f.codebook_size
            for kind, f in zip(self.kinds, fields)
        )

    def draw(self, seed: int) -> list[Codebook]:
        """The codebooks; `seed` decides what is drawn."""
        generator = torch.Generator().manual_seed(seed)
        spread = self.config.start_spread * self.engine.lm.embedding_rms
        books = []
        told = self._told(seed) if "behaviour" in self.kinds else []
        for j, (f, s, kind) in enumerate(
            zip(self.fields, self.engine.layout.field_slices, self.kinds)
        ):
            center = self.start[s].flatten()
            drawn = torch.randn(f.codebook_size, len(center), generator=generator)
            codewords = center + spread * drawn
            if kind == "kmeans++":
                x = self.thetas[:, s].flatten(1)
                codewords = Codebook.kmeans(x, f.codebook_size, seed=seed).codewords
            elif kind == "behaviour":
                codewords = told[j].repeat(1, f.num_virtual_tokens)
            elif kind == "words":
                words = word_codewords(self.engine.lm, f)
                codewords = torch.cat([words, codewords[len(words) :]])
            books.append(Codebook(codewords))
        return self._chosen(books)

    @cached_property
    def thetas(self) -> Tensor:
        """[U, S, D] of the gradient E-step."""
        found = GradientEStep(self.engine, self.start, self.config).run(self.block, None, EMState())
        assert found.theta is not None
        return found.theta

    def _told(self, seed: int) -> list[Tensor]:
        """Per field [K_j, D]: the centres of what is told, then of what the fields before leave
        of it; else all fields would begin as one."""
        center = self.told.mean(0)
        sizes = [f.codebook_size for f in self.fields]
        levels = ResidualCodebook.kmeans(self.told - center, sizes, seed=seed).levels
        return [center + book.codewords for book in levels]

    @cached_property
    def told(self) -> Tensor:
        """[U, D] fp32: soft rows that tell of all of a user's behaviour, as those do that the
        embedded LM is pre-trained with."""
        b, lm = self.block.behaviour, self.engine.lm
        kinds, kind = np.unique(b.ids, return_inverse=True)
        table = lm.embed(torch.from_numpy(kinds).long().to(lm.device)).double().cpu()
        users = pairwise(b.offsets.tolist())
        rows = [torch.from_numpy(telling(b.weight[x:y])) @ table[kind[x:y]] for x, y in users]
        return torch.stack(rows).float()

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


def word_codewords(lm: FrozenLM, f: ProfileField) -> Tensor:
    """[words, m D] fp32: the embedding of each candidate word, in each of the field's soft rows."""
    words = torch.stack([lm.word_embedding(w) for w in f.candidates]).cpu()
    return words.repeat(1, f.num_virtual_tokens)


def kind_of_start(config: EMConfig, f: ProfileField) -> str:
    """Where the field's codewords start: `config.start`, or what "auto" stands for."""
    if config.start == "auto":
        return "words" if f.candidates else "random"
    if config.start == "words" and not f.candidates:
        raise ConfigError(
            f"em.start='words': field {f.name!r} has no candidate words; name some, or choose "
            "'random'"
        )
    return config.start

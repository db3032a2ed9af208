"""The users that a mixture of soft prompts learns from: what E-step and M-step find of them all.

`Apart` reads some users whole. `Crowd` never reads users: it keeps an event table of their most
frequent texts and adds up, whatever their number; its LM work is that of the texts. A drawn M-step
reads few of its (text, codes) pairs and expects what all would give.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook, UsageStats
from userip_fast.core.config import EMConfig
from userip_fast.em.calibrate import add_by_kind, chunks
from userip_fast.em.columns import MOST, PROPOSERS, Grid, choose, has_all
from userip_fast.em.counted import expected
from userip_fast.em.lifts import Calibration, Usual, log_lifts, log_norm
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.readings import Readings, gradients
from userip_fast.em.scorer import soft_tables
from userip_fast.em.steps import (
    Block,
    Candidates,
    EMState,
    Profiles,
    books_digest,
    profiles_total,
)
from userip_fast.em.table import Kind, Numbering, survey
from userip_fast.em.units import Units
from userip_fast.lm.engine import Engine
from userip_fast.ops import profile_posterior
from userip_fast.prompts.behaviour import Source, Told, judging
from userip_fast.prompts.layout import ProfileField
from userip_fast.prompts.packing import Int64, iter_packs

logger = logging.getLogger("userip_fast.em")

APART_USERS = 1_024  # read whole, if not told how many
_FEWEST_TEXTS = 256  # in the table, however many codes there are
_START_USERS = 1_024  # whose behaviour codewords start from


@dataclass(frozen=True)
class Found:
    """What an E-step finds of the users, added up.

    Attributes:
        objective: Sum of the training users' ELBO, in nats.
        held_out: The same of users whom the M-step never sees; 0 where there are none.
        used: Per field [K_j] fp64, the training users' responsibilities.
        usage: Per field, the training users' likeliest codes.
        totals: As `profiles_total` of the training users.
        shares: Who has which codes, for `Users.stats`.
        table: [E, Z], what was read of kinds; None where users were read whole.
        columns: [Z, J] codes of its columns, where these are not all combinations.
    """

    objective: float
    held_out: float
    used: list[Tensor]
    usage: list[UsageStats]
    totals: npt.NDArray[np.float64]
    shares: Any
    table: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class MixtureStats:
    """Sums over users: per field the gradient [K_j, m_j D] of the weighted NLL and the
    responsibilities [K_j], fp64, and the NLL itself."""

    gradient: list[Tensor]
    counts: list[Tensor]
    nll: float


class Users(Protocol):
    """Training users, and others who judge.

    Attributes:
        judging: [U] who judges, of all in hash order.
        trained, judged: Their numbers.
        some: Training users whose behaviour codewords may start from.
        lm_tokens: Rows that the LM has read so far; forward and backward count one each.
    """

    judging: npt.NDArray[np.bool_]
    trained: int
    judged: int
    some: Block
    lm_tokens: int

    def judge(self, codebooks: list[Codebook]) -> Found:
        """The E-step."""
        ...

    def stats(self, found: Found, codebooks: list[Codebook]) -> MixtureStats:
        """Gradients at `codebooks` for the shares in `found`."""
        ...


class Apart:
    """Some users, read whole.

    Args:
        users: Of whom the share `config.held_out` judges.
    """

    def __init__(self, users: Block, engine: Engine, config: EMConfig) -> None:
        self.engine, self.config = engine, config
        self.judging = judging(len(users.hashes), config.held_out)
        self.some = users.select(np.flatnonzero(~self.judging))
        self.judges = users.select(np.flatnonzero(self.judging))
        self.trained, self.judged = len(self.some.hashes), len(self.judges.hashes)
        self.lm_tokens = 0

    def judge(self, codebooks: list[Codebook]) -> Found:
        """See `Users`."""
        held_out = self._run(self.judges, codebooks).elbo if self.judged else None
        found = self._run(self.some, codebooks)
        assert found.elbo is not None
        assert found.log_resp is not None
        assert found.code_ids is not None
        return Found(
            float(found.elbo.sum()),
            0.0 if held_out is None else float(held_out.sum()),
            [r.double().exp().sum(0) for r in found.log_resp],
            [book.usage(z) for book, z in zip(codebooks, found.code_ids.T)],
            np.array(profiles_total(found)),
            found.candidates,
        )

    def _run(self, users: Block, codebooks: list[Codebook]) -> Profiles:
        found = PosteriorEStep(self.engine, self.config).run(users, codebooks, EMState())
        rows = torch.from_numpy(users.behaviour.pack_rows(self.engine.layout.num_soft))
        self.lm_tokens += round(float(rows.double() @ found.forward_equivalents.double()))
        return found

    def stats(self, found: Found, codebooks: list[Codebook]) -> MixtureStats:
        """One pass, forward and backward, over every candidate.

        Gradients of single candidates are added in their order in fp64: packs leave no trace.
        """
        engine, slices = self.engine, self.engine.layout.field_slices
        candidates: Candidates = found.shares
        tables = soft_tables([book.codewords for book in codebooks], engine)
        gradient = [torch.zeros_like(book.codewords, dtype=torch.float64) for book in codebooks]
        counts = [torch.zeros(len(book), dtype=torch.float64) for book in codebooks]
        for j, n in enumerate(counts):
            n.index_add_(0, candidates.codes[:, j], candidates.weight)
        units = Units.of(self.some.behaviour, engine.layout)
        pairs = units.pairs(candidates.users, candidates.codes)
        weights = pairs.spread(candidates.weight)
        total, done = 0.0, 0
        for pack in iter_packs(
            units.behaviour, pairs.unit, engine.layout, engine.lm.device, self.config.pack_tokens
        ):
            here = slice(done, done + pack.num_users)
            done += pack.num_users
            codes, weight = pairs.codes[here], weights[here]
            picked = codes.to(engine.lm.device)
            rows = torch.cat([t[picked[:, j]] for j, t in enumerate(tables)], dim=1)
            rows.requires_grad_()
            nll = engine.nll(pack, rows)
            (grad,) = torch.autograd.grad(nll.sum(), rows)
            grad = grad.cpu().double() * weight[:, None, None]
            total += float(nll.detach().cpu().double() @ weight)
            for j, s in enumerate(slices):
                gradient[j].index_add_(0, codes[:, j], grad[:, s].flatten(1))
            self.lm_tokens += 2 * int(pack.cu_seqlens[-1])
        return MixtureStats(gradient, counts, total)


class Crowd:
    """All users of a source, through an event table of their most frequent texts.

    A table has `config.table_readings` pairs of a text and codes at most (but 256 texts); events of
    rarer texts are left out here, as if they had not been told. Sums run over fixed chunks of users
    in hash order, so blocks, threads and processes leave no trace in them.

    Args:
        source, users: The first so many users of it.
        fields: Whose codes make up the table's columns.
        neutral: [S, D] soft rows that tell nothing, where events are told by lifts.

    Attributes:
        kinds: How often users have each kind of event, read here or not.
        usual: Reactions to items, where events tell of them and are told by lifts.
    """

    def __init__(
        self,
        source: Source,
        users: int,
        engine: Engine,
        config: EMConfig,
        fields: tuple[ProfileField, ...],
        neutral: Tensor | None = None,
    ) -> None:
        self.source, self.engine, self.config, self.neutral = source, engine, config, neutral
        tokenizer, layout = engine.lm.tokenizer, engine.layout
        self.judging = judging(users, config.held_out)
        self.judged = int(self.judging.sum())
        self.trained = users - self.judged
        self.lm_tokens = 0
        start = min(users, _START_USERS)
        block = Block(source.block(tokenizer, layout, 0, start), source.hashes_of(0, start))
        self.some = block.select(np.flatnonzero(~self.judging[:start]))

        sizes = [f.codebook_size for f in fields]
        self.all = has_all(config, sizes)
        columns = math.prod(sizes) if self.all else min(MOST, math.prod(sizes))
        self.kinds = counts = survey(source, tokenizer, 0, users)
        texts = _frequent(counts, max(_FEWEST_TEXTS, config.table_readings // columns))
        words = source.format.words
        self.usual = None if neutral is None or not words else Usual.of(counts, words)
        if self.usual is None:
            kinds = sorted(kind for kind in counts if kind[0] in texts)
        else:
            kinds = [(text, word) for text in sorted(texts) for word in words]
        self.counts = torch.tensor([counts[kind] for kind in kinds], dtype=torch.float64)
        share = float(self.counts.sum()) / max(1, counts.total())
        logger.info(
            "EM reads %d of %d kinds, %.1f %% of events", len(kinds), len(counts), 100 * share
        )
        self.numbering = Numbering(kinds)
        self.texts = sorted(texts)
        told = source.format.kinds(tokenizer, layout, kinds)
        self.readings = Readings.of(told)
        self.weight = torch.from_numpy(told.total_weight)
        self.tokens = torch.from_numpy(told.lengths)

    def _read(self, rows: int) -> None:
        self.lm_tokens += rows

    def judge(self, codebooks: list[Codebook]) -> Found:
        """See `Users`."""
        before = self.lm_tokens
        columns, table = self._columns(codebooks)
        grid = Grid(codebooks, self.engine, columns)
        objective, held_out, own_rows = 0.0, 0.0, 0
        used = [torch.zeros(k, dtype=torch.float64) for k in grid.sizes]
        counts = [torch.zeros(k, dtype=torch.int64) for k in grid.sizes]
        shares = torch.zeros(table.shape, dtype=torch.float64)
        totals = np.zeros(4)
        for first, told in chunks(self.source, self.engine.lm.tokenizer, len(self.judging)):
            kinds, user, offsets = self._known(told)
            log_resp, evidence = profile_posterior(table, kinds, offsets, grid.log_prior)
            trains = torch.from_numpy(~self.judging[first : first + len(evidence)])
            objective += float(evidence[trains].sum())
            held_out += float(evidence[~trains].sum())
            marginals, codes, at = grid.likeliest(log_resp)
            joint = log_resp.gather(1, at[:, None]).flatten().double() + evidence
            resp = log_resp.double().exp() * trains[:, None]
            for j, (r, k) in enumerate(zip(marginals, grid.sizes)):
                # NumPy adds rows one after another whatever the number of threads.
                used[j] += torch.from_numpy(r[trains].double().exp().numpy().sum(0))
                counts[j] += torch.bincount(codes[trains, j], minlength=k)
            add_by_kind(shares, kinds, user, resp)
            own = trains[user]
            own_rows += int(self.tokens[kinds[own]].sum())
            totals[1] += float((grid.log_prior[at] - joint)[trains].sum())
            totals[2] += float(self.weight[kinds[own]].sum())
        own_rows += self.trained * self.engine.layout.num_soft
        totals[0] = self.trained
        totals[3] = self.trained * (self.lm_tokens - before) / own_rows
        usage = [UsageStats.of(c) for c in counts]
        if self.neutral is not None:
            shares -= expected(shares, table, self.counts, self.source.format)
        return Found(objective, held_out, used, usage, totals, shares, table, columns)

    def _columns(self, codebooks: list[Codebook]) -> tuple[Tensor | None, Tensor]:
        """Codes [Z, J] of the table's columns, None for all combinations, and the table [E, Z]."""
        if self.all:
            return None, self._table(Grid(codebooks, self.engine))
        kinds, _, offsets = self._known(self.proposers)
        chosen = choose(
            codebooks,
            lambda codes: self._table(Grid(codebooks, self.engine, codes)),
            kinds,
            offsets,
        )
        return chosen.codes, chosen.values

    @cached_property
    def proposers(self) -> Told:
        """Events of the first training users, by whom columns are chosen."""
        some = self.judging[:PROPOSERS]
        told = self.source.told(self.engine.lm.tokenizer, 0, len(some))
        return told.select(np.flatnonzero(~some))

    def _table(self, grid: Grid) -> Tensor:
        """[E, Z] of the kinds that EM reads."""
        asked = self.engine, self.readings, grid.soft, self.neutral
        told = log_lifts(*asked, self.config.pack_tokens, self._read)
        return self.values(told, self.texts, self.counts)

    def values(self, told: Tensor, texts: list[str], counts: Tensor) -> Tensor:
        """[E, Z] of lifts, or likelihoods, of texts under each word, of which kinds there were
        `counts` [E]."""
        norm = None if self.neutral is None or self.usual else log_norm(told, counts)
        how = Calibration(self.neutral, norm, usual=self.usual)
        return how.values(told, texts, self.source.format.feedback_weight)

    def stats(self, found: Found, codebooks: list[Codebook]) -> MixtureStats:
        """One pass, forward and backward, over pairs of a reading and codes: all, or as many as
        `config.codeword_draws` says, drawn by weight."""
        grid, weight = Grid(codebooks, self.engine, found.columns), found.shares
        readings = torch.zeros(
            self.readings.num_readings, len(grid.codes), dtype=torch.float64
        ).index_add_(0, torch.from_numpy(self.readings.reading), weight.abs())
        seed = np.frombuffer(books_digest(codebooks), np.uint32)
        random = np.random.default_rng([self.config.seed, *seed.tolist()])
        reading, codes, factor = draw(
            readings.numpy(), self.config.codeword_draws, random.random(len(grid.codes))
        )
        gradient, nll = gradients(
            self.engine,
            self.readings,
            grid.soft,
            reading,
            codes,
            torch.from_numpy(factor),
            weight,
            self.config.pack_tokens,
            self._read,
        )
        fields = []
        for j, (s, k) in enumerate(zip(self.engine.layout.field_slices, grid.sizes)):
            g = gradient[:, s].flatten(1)
            fields.append(g.new_zeros(k, g.shape[1]).index_add_(0, grid.codes[:, j], g))
        return MixtureStats(fields, found.used, nll)

    def _known(self, told: Told) -> tuple[Tensor, Tensor, Tensor]:
        """[N] rows of the table and [N] users of the events that have one, and [U + 1] offsets."""
        kinds, users = self.numbering.of(told)[told.kinds], len(told.offsets) - 1
        user = np.repeat(np.arange(users), np.diff(told.offsets))[kinds >= 0]
        ends = np.cumsum(np.bincount(user, minlength=users))
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        return (
            torch.from_numpy(kinds[kinds >= 0]),
            torch.from_numpy(user),
            torch.from_numpy(offsets),
        )


def draw(
    weight: npt.NDArray[np.float64], draws: int, offset: npt.NDArray[np.float64]
) -> tuple[Int64, Int64, npt.NDArray[np.float64]]:
    """Pairs (row, column) of `weight` [R, Z] to stand for all of positive weight.

    Each column has the same number of draws, so that codes of few users are not noise: at evenly
    spaced points of its running weight, the first of them anywhere in the first interval. A column
    of no more pairs than draws has them all.

    Args:
        draws: In all; 0 for all pairs.
        offset: [Z] in [0, 1), where a column's first point lies.

    Returns:
        [N] row, column, and factor: how often a pair counts. Over all offsets it is 1 on average.
    """
    rows, columns, factors = [], [], []
    each = max(1, draws // weight.shape[1])
    for z, w in enumerate(weight.T):
        there = np.flatnonzero(w > 0)
        factor = np.ones(len(there))
        if draws and len(there) > each:
            running = np.cumsum(w[there])
            points = (np.arange(each) + offset[z]) * (running[-1] / each)
            hit = np.searchsorted(running, points, side="right").clip(max=len(there) - 1)
            count = np.bincount(hit, minlength=len(there))
            factor = count * (running[-1] / each) / w[there]
            there, factor = there[count > 0], factor[count > 0]
        rows.append(there)
        columns.append(np.full(len(there), z))
        factors.append(factor)
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(factors)


def _frequent(counts: Counter[Kind], texts: int) -> set[str]:
    """The most frequent texts."""
    mass: Counter[str] = Counter()
    for (text, _), count in counts.items():
        mass[text] += count
    return set(sorted(mass, key=lambda text: (-mass[text], text))[:texts])

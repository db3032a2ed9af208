"""The EM loop: E-step over blocks of users, addable statistics, M-step, checkpoint; then everyone's
codes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook, UsageStats
from userip_fast.core.progress import progress
from userip_fast.em.amortised import AmortisedEStep, Head, HeadReport, features, train_head
from userip_fast.em.blocks import in_memory
from userip_fast.em.cache import BlockCache, DiskCache, MemoryCache
from userip_fast.em.checkpoints import Checkpoints, Log, Rounds
from userip_fast.em.crowd import APART_USERS, Apart, Crowd, Users
from userip_fast.em.finish import finished
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.lifts import PLAIN, Calibration
from userip_fast.em.mixture import Mixture, is_last
from userip_fast.em.mstep import Stats, ThetaMStep, check_codebook_sizes
from userip_fast.em.paper import run_paper
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.starts import ToldUsers, shared_start
from userip_fast.em.steps import EMState, EStep, Profiles, profiles_total
from userip_fast.em.sweeps import Sweeps
from userip_fast.em.table import EventTable, Kind, answers, has_table, survey
from userip_fast.prompts.behaviour import Source


@dataclass(frozen=True)
class FitResult:
    """Codebooks, and the shared start [S, D] they were learned from; how an event table is read,
    and the one of what was read for it; of an amortised E-step also its head, and how that does on
    users it has not learned from."""

    codebooks: list[Codebook]
    start: Tensor
    calibration: Calibration = PLAIN
    table: EventTable | None = None
    head: Head | None = None
    head_report: HeadReport | None = None


class Trainer(Sweeps):
    """Runs EM for one LM, template and config. See `Sweeps` for the arguments.

    Attributes:
        head: What an amortised E-step answers with.
        calibration: How an event table is read.
    """

    head: Head | None = None
    calibration = PLAIN
    # What `fit` leaves for an `infer` of the same users: descents already made, or, in the
    # published recipe, the thetas that were trained with the codebooks.
    _estep: EStep | None = None
    _trained: tuple[str, Profiles] | None = None

    def fit(
        self,
        source: Source,
        *,
        log: Log = lambda record: None,
        checkpoints: Path | None = None,
        resume: bool = False,
    ) -> FitResult:
        """Learns the codebooks.

        An interrupt (see `deferred_interrupts`) ends it after the block at hand, which is kept.

        Args:
            source: The training users.
            log: Called with a record after each round; first, on resuming, with those of old.
            checkpoints: Folder that gets `round-NNNN/` after each round, and finished blocks
                between; cleared at the start unless `resume`.
            resume: Goes on after the last round, and the blocks since, found in `checkpoints`.

        Raises:
            DataError: A codebook is larger than the number of users.
            MismatchError: `resume` finds a checkpoint of other data, LM or settings.
            StorageError: A checkpoint cannot be written.
        """
        em = self.config.em
        check_codebook_sizes(self.config.fields, source.num_users)
        start = shared_start(self.engine, self.config, source)
        if em.recipe == "paper":
            return FitResult(self._fit_as_published(source, log), start)
        kept = None
        if checkpoints is not None:
            kept = Checkpoints(checkpoints, self.run_key(source, start))
            if not resume:
                if self.processes.rank == 0:
                    kept.clear()
                self.processes.barrier()
        rounds = Rounds(kept, resume, self.processes.rank == 0, log)
        if em.estep == "gradient":
            cache = None if kept is None else DiskCache(kept.blocks, kept.run_key.encode())
            return FitResult(self._fit_thetas(source, start, rounds, cache), start)
        tables = self.infer_cache(checkpoints, start) if checkpoints else None
        books, table = self._fit_mixture(source, start, rounds, tables)
        self.calibration = PLAIN if table is None else table.calibration
        if em.estep == "posterior":
            return FitResult(books, start, self.calibration, table)
        self.head, report = self._fit_head(source, books, start)
        return FitResult(books, start, self.calibration, table, self.head, report)

    def _fit_as_published(self, source: Source, log: Log) -> list[Codebook]:
        block = self.block(source, 0, source.num_users)
        fields, em = self.config.fields, self.config.em
        books, profiles = run_paper(block, self.engine, fields, em, show=self.show)
        self._trained = source.content_key(), profiles
        log(self._record(0, profiles_total(profiles), _usage(books, profiles.code_ids), 0))
        return books

    def _fit_thetas(
        self, source: Source, start: Tensor, rounds: Rounds, cache: BlockCache | None
    ) -> list[Codebook]:
        """Codebooks of the thetas that descents find.

        Args:
            cache: Keeps the descents.
        """
        em = self.config.em
        estep = self._estep = GradientEStep(self.engine, start, em, cache=cache)
        mstep = ThetaMStep(self.config.fields, self.engine.layout.field_slices, em)
        before: Tensor | None = None
        if rounds.last is not None:
            mstep.codebooks, before = rounds.last.codebooks, rounds.last.codes
        while len(rounds.records) < em.max_rounds and not _settled(rounds.records):
            state = EMState(len(rounds.records))
            stats = Stats(em.kmeans_sample)
            codes: list[Tensor] = []
            totals = np.zeros(4)
            what = f"EM round {state.round + 1} of {em.max_rounds}"
            for profiles in self.sweep(what, estep, source, mstep.codebooks, state):
                stats = mstep.stats(profiles, stats)
                totals += profiles_total(profiles)
                if profiles.code_ids is not None:
                    codes.append(self.small(profiles.code_ids))
            stats, totals = self.reduce(stats), self.add_up(totals)
            now = self.gather_codes(codes) if mstep.codebooks is not None else None
            usage = _usage(mstep.codebooks, now)
            books = mstep.apply(stats)
            record = self._record(state.round, totals, usage, mstep.revived)
            if now is not None and before is not None:
                record["changed"] = float((now != before).any(1).double().mean())
            rounds.add(record, books, now)
            before = now
        assert mstep.codebooks is not None
        return mstep.codebooks

    def _fit_mixture(
        self, source: Source, start: Tensor, rounds: Rounds, tables: BlockCache | None
    ) -> tuple[list[Codebook], EventTable | None]:
        """Codebooks of a mixture of soft prompts, from the users that `em.fit_users` says, and
        their event table, calibrated.

        Each process learns them for itself: they see the same users and find the same.

        Args:
            tables: Keeps what is read into an event table.
        """
        em, fields = self.config.em, self.config.fields
        users: Users
        if has_table(self.config):
            count = min(em.fit_users or source.num_users, source.num_users)
            neutral = start if source.format.by_lifts else None
            users = Crowd(source, count, self.engine, em, fields, neutral)
        else:
            count = min(em.fit_users or APART_USERS, source.num_users)
            users = Apart(self.block(source, 0, count), self.engine, em)
        started = ToldUsers.of(source, users.judging, self.engine)
        mixture = Mixture(users, self.engine, em, fields, started)

        def read(table: EventTable, kinds: Iterable[Kind]) -> None:
            table.cache, table.show = tables, self.show
            self._read(table, kinds)

        books = self._mixture_rounds(mixture, start, rounds)
        if not isinstance(users, Crowd):
            return books, None
        return finished(source, users, books, fields, started, read)

    def _mixture_rounds(self, mixture: Mixture, start: Tensor, rounds: Rounds) -> list[Codebook]:
        """Codebooks after the last round."""
        em, records = self.config.em, rounds.records
        if rounds.last is None:
            books = mixture.best_start(self.config.fields, start)
        else:
            books = rounds.last.codebooks
            if is_last(records[-1], em):
                return books
        found = mixture.rounds(books, records[-1]["lr"] if records else None)
        if records:
            next(found)  # where the last record stands
        with progress("EM", em.max_rounds, "rounds", self.show, at_most=True) as bar:
            for at in found:
                usage = _told_usage(at.found.usage)
                record = self._record(len(records), at.found.totals, usage, 0)
                record |= mixture.record(at, len(records))
                rounds.add(record, at.codebooks, None)
                told = {n: record[n] for n in ("elbo", "elbo_held_out") if record[n] is not None}
                bar.advance(len(records) > 1, **told)
                if is_last(record, em):
                    return at.codebooks
        raise AssertionError("EM goes on until its last round")

    def _fit_head(
        self, source: Source, codebooks: list[Codebook], start: Tensor
    ) -> tuple[Head, HeadReport]:
        """A head that learned from the posterior of the first `head_users` users.

        Each process learns it for itself, as it does the codewords.
        """
        em = self.config.em
        users = (0, min(em.head_users, source.num_users))
        slow = PosteriorEStep(self.engine, em)
        x, answers = [], []
        done = 0
        what = "posterior for the head"
        for profiles in self.sweep(what, slow, source, codebooks, EMState(), users):
            block = self.block(source, done, done + len(profiles.nll))
            x.append(features(self.engine, block.behaviour, start, em)[0])
            assert profiles.log_resp is not None
            answers.append(profiles.log_resp)
            done += len(profiles.nll)
        return train_head(torch.cat(x), [torch.cat(r) for r in zip(*answers)], em)

    def infer(
        self,
        source: Source,
        codebooks: list[Codebook],
        start: Tensor,
        *,
        users: tuple[int, int] | None = None,
        cache: BlockCache | None = None,
        table: EventTable | None = None,
    ) -> Iterator[Profiles]:
        """Profiles of all users, block by block, with the codebooks as they are.

        Args:
            users: Only those from the first to before the second, in hash order.
            cache: Keeps the profiles of finished blocks (without theta), or what was read into a
                table, and finds them again.
            table: Of these codebooks, to go on with where an event table serves.
        """
        em = self.config.em
        if em.recipe == "paper":
            if self._trained is not None:
                content, profiles = self._trained
                same_users = np.array_equal(profiles.hashes, source.hashes_of(0, source.num_users))
                if same_users and content == source.content_key():
                    yield profiles
                    return
            first, last = users or (0, source.num_users)
            for a in range(first, last, em.block_users):
                block = self.block(source, a, min(a + em.block_users, last))
                fields = self.config.fields
                yield run_paper(block, self.engine, fields, em, codebooks, self.show)[1]
            return
        if em.estep == "posterior" and (table or answers(self.config, self.calibration)):
            if table is None:
                table = EventTable(self.engine, source.format, codebooks, em, self.calibration)
            table.cache, table.show = cache, self.show
            yield from self._infer_by_table(source, table, users)
            return
        estep = self._estep
        if em.estep != "gradient":
            estep = slow = PosteriorEStep(self.engine, em)
            if em.estep == "amortised":
                assert self.head is not None, "an amortised E-step needs the head of its model"
                estep = AmortisedEStep(self.engine, start, self.head, slow, em)
        elif estep is None:
            # Each user comes once: a kept descent would only take memory.
            estep = GradientEStep(self.engine, start, em, cache=MemoryCache(0))
        yield from self.sweep(
            "inferring profiles", estep, source, codebooks, EMState(em.max_rounds), users, cache
        )

    def _infer_by_table(
        self,
        source: Source,
        table: EventTable,
        users: tuple[int, int] | None,
    ) -> Iterator[Profiles]:
        """As `sweep`, from an event table."""
        tokenizer, size = self.engine.lm.tokenizer, self.config.em.block_users
        # Processes that share the users read alike, and so find the same to the bit.
        self._read(table, survey(source, tokenizer, *(users or (0, source.num_users))))
        for bar, (told, hashes) in self.blocks(
            "inferring profiles",
            users or self.own_users(source),
            size,
            lambda a, b: (source.told(tokenizer, a, b), source.hashes_of(a, b)),
        ):
            profiles = table.profiles(told, hashes)
            bar.advance(len(hashes))
            yield profiles

    def _read(self, table: EventTable, kinds: Iterable[Kind]) -> None:
        longest = table.format.chunk_tokens + self.engine.layout.num_soft
        in_memory(lambda: table.read(kinds), table, longest)

    def infer_cache(self, checkpoints: Path, start: Tensor) -> DiskCache | None:
        """Where the pass over everybody that ends a fit keeps its blocks.

        The gradient E-step needs none: its descents are kept, and the rest is cheap.
        """
        if self.config.em.estep == "gradient":
            return None
        return DiskCache(checkpoints / "blocks", self.settings_key(start))

    def forget(self, checkpoints: Path) -> None:
        """Drops the blocks that a fit, now safe elsewhere, kept in `checkpoints`."""
        self._estep = None
        shutil.rmtree(checkpoints / "blocks", ignore_errors=True)

    def _record(
        self, round_: int, totals: Any, usage: list[dict[str, Any]], revived: int
    ) -> dict[str, Any]:
        users, nll, weight, cost = totals.tolist()
        return {
            "time": time.time(),
            "round": round_,
            "users": int(users),
            "nll_per_weight": nll / max(weight, 1e-12),
            "forward_equivalents": cost / max(users, 1),
            "revived": revived,
            "fields": {f.name: u for f, u in zip(self.config.fields, usage)},
        }


def _settled(records: list[dict[str, Any]]) -> bool:
    """Whether the last round left every code as it was."""
    return bool(records) and records[-1].get("changed") == 0.0 and not records[-1]["revived"]


def _usage(books: list[Codebook] | None, codes: Tensor | None) -> list[dict[str, Any]]:
    if books is None or codes is None:
        return []
    return _told_usage([book.usage(codes[:, j].long()) for j, book in enumerate(books)])


def _told_usage(usage: list[UsageStats]) -> list[dict[str, Any]]:
    return [
        {"perplexity": u.perplexity, "dead": u.dead, "counts": u.counts.tolist()} for u in usage
    ]

"""The EM loop: E-step over blocks of users, addable statistics, M-step, checkpoint; then everyone's
codes.

Given the codebooks users are independent, so a block is read ahead in a thread, inferred, kept on
disk and dropped; memory depends on the block, and per user on nothing but the codes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook, UsageStats
from userip_fast.core.config import Config
from userip_fast.core.distributed import Processes
from userip_fast.core.interrupts import deferred_interrupts
from userip_fast.core.prefetch import Prefetch
from userip_fast.core.progress import progress
from userip_fast.em.amortised import AmortisedEStep, Head, HeadReport, features, train_head
from userip_fast.em.blocks import Ticker, in_memory, run
from userip_fast.em.cache import BlockCache, DiskCache, MemoryCache
from userip_fast.em.checkpoints import Checkpoint, Checkpoints
from userip_fast.em.crowd import APART_USERS, Apart, Crowd, Users
from userip_fast.em.finish import finished
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.lifts import PLAIN, Calibration
from userip_fast.em.mixture import Mixture, is_last
from userip_fast.em.mstep import Stats, ThetaMStep, check_codebook_sizes
from userip_fast.em.paper import run_paper
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.starts import ToldUsers, shared_start
from userip_fast.em.steps import (
    Block,
    EMState,
    EStep,
    Profiles,
    profiles_total,
)
from userip_fast.em.table import EventTable, Kind, answers, has_table, survey
from userip_fast.lm.engine import Engine
from userip_fast.prompts.behaviour import Source, Told

_PROGRESS_USERS = 256

Log = Callable[[dict[str, Any]], None]
"""Receives one record per round, for metrics.jsonl."""


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


class Trainer:
    """Runs EM for one LM, template and config.

    Args:
        engine: Scores packs.
        config: Everything.
        show: Whether to show progress.
        processes: This process among those that share the users.

    Attributes:
        head: What an amortised E-step answers with.
        calibration: How an event table is read.
        swept_s, waited_s: Seconds spent in sweeps so far, and of these waiting for input.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        show: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.engine, self.config, self.show = engine, config, show
        self.processes = processes or Processes()
        self.swept_s = self.waited_s = 0.0
        # What `fit` leaves for an `infer` of the same users: descents already made, or, in the
        # published recipe, the thetas that were trained with the codebooks.
        self._estep: EStep | None = None
        self.head: Head | None = None
        self.calibration = PLAIN
        self._trained: tuple[str, Profiles] | None = None

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
            block = self._block(source, 0, source.num_users)
            books, profiles = run_paper(block, self.engine, self.config.fields, em, show=self.show)
            self._trained = source.content_key(), profiles
            log(self._record(0, profiles_total(profiles), _usage(books, profiles.code_ids), 0))
            return FitResult(books, start)

        kept, cache = None, None
        if checkpoints is not None:
            kept = Checkpoints(checkpoints, self.run_key(source, start))
            cache = DiskCache(kept.blocks, kept.run_key.encode())
            if not resume:
                if self.processes.rank == 0:
                    kept.clear()
                self.processes.barrier()
        if em.estep != "gradient":
            tables = self.infer_cache(checkpoints, start) if checkpoints else None
            books, table = self._fit_mixture(source, start, kept, resume, log, tables)
            self.calibration = PLAIN if table is None else table.calibration
            if em.estep == "posterior":
                return FitResult(books, start, self.calibration, table)
            self.head, report = self._fit_head(source, books, start)
            return FitResult(books, start, self.calibration, table, self.head, report)
        estep = GradientEStep(self.engine, start, em, cache=cache)
        mstep = ThetaMStep(self.config.fields, self.engine.layout.field_slices, em)
        state = EMState()
        before: Tensor | None = None
        records: list[dict[str, Any]] = []
        if resume and kept is not None and (last := kept.last()):
            state.round, mstep.codebooks = last.round, last.codebooks
            before, records = last.codes, last.records
            for record in records:
                log(record)
        while state.round < em.max_rounds and not _settled(records):
            stats = Stats(em.kmeans_sample)
            codes: list[Tensor] = []
            totals = np.zeros(4)
            what = f"EM round {state.round + 1} of {em.max_rounds}"
            for profiles in self._sweep(what, estep, source, mstep.codebooks, state):
                stats = mstep.stats(profiles, stats)
                totals += profiles_total(profiles)
                if profiles.code_ids is not None:
                    codes.append(self._small(profiles.code_ids))
            stats, totals = self._reduce(stats), self.add_up(totals)
            now = self.gather_codes(codes) if mstep.codebooks is not None else None
            usage = _usage(mstep.codebooks, now)
            books = mstep.apply(stats)
            record = self._record(state.round, totals, usage, mstep.revived)
            if now is not None and before is not None:
                record["changed"] = float((now != before).any(1).double().mean())
            records.append(record)
            before = now
            state.round += 1
            if kept is not None and self.processes.rank == 0:
                kept.save(Checkpoint(state.round, books, now, records))
            log(record)
        assert mstep.codebooks is not None
        self._estep = estep
        return FitResult(mstep.codebooks, start)

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
                block = self._block(source, a, min(a + em.block_users, last))
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
        yield from self._sweep(
            "inferring profiles", estep, source, codebooks, EMState(em.max_rounds), users, cache
        )

    def _infer_by_table(
        self,
        source: Source,
        table: EventTable,
        users: tuple[int, int] | None,
    ) -> Iterator[Profiles]:
        """As `_sweep`, from an event table."""
        first, last = users or self.own_users(source)
        tokenizer, size = self.engine.lm.tokenizer, self.config.em.block_users
        began = time.perf_counter()
        # Processes that share the users read alike, and so find the same to the bit.
        self._read(table, survey(source, tokenizer, *(users or (0, source.num_users))))

        def told(a: int) -> tuple[Told, npt.NDArray[np.uint64]]:
            b = min(a + size, last)
            return source.told(tokenizer, a, b), source.hashes_of(a, b)

        with (
            progress("inferring profiles", last - first, "users", self.show) as bar,
            Prefetch(range(first, last, size), told) as blocks,
            deferred_interrupts() as let_through,
        ):
            for block, hashes in blocks:
                profiles = table.profiles(block, hashes)
                bar.advance(len(hashes))
                yield profiles
                let_through()
            self.waited_s += blocks.waited_s
        self.swept_s += time.perf_counter() - began

    def _fit_mixture(
        self,
        source: Source,
        start: Tensor,
        kept: Checkpoints | None,
        resume: bool,
        log: Log,
        tables: BlockCache | None,
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
            users = Apart(self._block(source, 0, count), self.engine, em)
        started = ToldUsers.of(source, users.judging, self.engine)
        mixture = Mixture(users, self.engine, em, fields, started)

        def read(table: EventTable, kinds: Iterable[Kind]) -> None:
            table.cache, table.show = tables, self.show
            self._read(table, kinds)

        def finish(books: list[Codebook]) -> tuple[list[Codebook], EventTable | None]:
            if not isinstance(users, Crowd):
                return books, None
            return finished(source, users, books, fields, started, read)

        records: list[dict[str, Any]] = []
        if resume and kept is not None and (last := kept.last()):
            books, records = last.codebooks, last.records
            for record in records:
                log(record)
            if is_last(records[-1], em):
                return finish(books)
        else:
            books = mixture.best_start(fields, start)
        rounds = mixture.rounds(books, records[-1]["lr"] if records else None)
        if records:
            next(rounds)  # where the last record stands
        with progress("EM", em.max_rounds, "rounds", self.show, at_most=True) as bar:
            for at in rounds:
                usage = _told_usage(at.found.usage)
                record = self._record(len(records), at.found.totals, usage, 0)
                record |= mixture.record(at, len(records))
                records.append(record)
                if kept is not None and self.processes.rank == 0:
                    kept.save(Checkpoint(len(records), at.codebooks, None, records))
                log(record)
                told = {n: record[n] for n in ("elbo", "elbo_held_out") if record[n] is not None}
                bar.advance(len(records) > 1, **told)
                if is_last(record, em):
                    return finish(at.codebooks)
        raise AssertionError("EM goes on until its last round")

    def _read(self, table: EventTable, kinds: Iterable[Kind]) -> None:
        longest = table.format.chunk_tokens + self.engine.layout.num_soft
        in_memory(lambda: table.read(kinds), table, longest)

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
        for profiles in self._sweep(what, slow, source, codebooks, EMState(), users):
            block = self._block(source, done, done + len(profiles.nll))
            x.append(features(self.engine, block.behaviour, start, em)[0])
            assert profiles.log_resp is not None
            answers.append(profiles.log_resp)
            done += len(profiles.nll)
        return train_head(torch.cat(x), [torch.cat(r) for r in zip(*answers)], em)

    def run_key(self, source: Source, start: Tensor) -> str:
        """Digest of what decides the profiles of users: data, LM, prompts and settings."""
        digest = hashlib.sha256(source.content_key().encode())
        digest.update(self.settings_key(start))
        return digest.hexdigest()

    def settings_key(self, start: Tensor) -> bytes:
        """The same without the data."""
        fields = [asdict(f) for f in self.config.fields]
        about = [self.engine.lm.fingerprint, str(self.engine.lm.dtype), fields]
        # May change: what is found is the same, up to rounding where packs are cut differently.
        free = dict.fromkeys(("rounds", "block_users", "pack_tokens"))
        em = {**asdict(self.config.em), **free}
        digest = hashlib.sha256(json.dumps([*about, em]).encode())
        digest.update(start.contiguous().numpy().tobytes())
        return digest.digest()

    def gather_codes(self, codes: list[Tensor]) -> Tensor:
        """[U, J] codes of all users in hash order, from each process's own."""
        mine = torch.cat(codes) if codes else torch.zeros(0, len(self.config.fields)).byte()
        return self.gather_users(self._small(mine))

    def gather_users(self, mine: Tensor) -> Tensor:
        """[U, ...] of all users in hash order, from each process's own."""
        return torch.cat([p["mine"] for p in self.processes.gather({"mine": mine})])

    def _small(self, codes: Tensor) -> Tensor:
        """`codes` in a small type: this is what is held per user."""
        largest = max(f.codebook_size for f in self.config.fields)
        return codes.to(torch.uint8 if largest <= 256 else torch.int32)

    def _reduce(self, stats: Stats) -> Stats:
        if self.processes.world == 1:
            return stats
        parts = self.processes.gather(stats.to_tensors())
        out = Stats(stats.sample_size)
        for part in parts:
            out = out + Stats.from_tensors(part, stats.sample_size)
        return out

    def add_up(self, totals: Any) -> Any:
        """Sum over processes of an array of each."""
        parts = self.processes.gather({"totals": torch.from_numpy(totals)})
        return sum(p["totals"].numpy() for p in parts)

    def _sweep(
        self,
        what: str,
        estep: EStep,
        source: Source,
        codebooks: list[Codebook] | None,
        state: EMState,
        users: tuple[int, int] | None = None,
        cache: BlockCache | None = None,
    ) -> Iterator[Profiles]:
        """Profiles of `users` (None: this process's) in hash order, block by block."""
        size = self.config.em.block_users
        # It tells its progress by blocks; but the more users, the more events they share.
        shares = self.config.told.behaviour_context == "independent"
        if not isinstance(estep, GradientEStep) and not shares:
            size = min(size, _PROGRESS_USERS)
        first, last = users or self.own_users(source)
        began = time.perf_counter()
        with (
            progress(what, last - first, "users", self.show) as bar,
            Prefetch(
                range(first, last, size), lambda a: self._block(source, a, min(a + size, last))
            ) as blocks,
            deferred_interrupts() as let_through,
        ):
            if isinstance(estep, GradientEStep):
                estep.on_step = Ticker(bar, self.config.em.steps)
            done = 0
            for block in blocks:
                profiles = run(estep, block, codebooks, state, cache)
                done += len(profiles.nll)
                bar.done = done
                bar.advance(0, nll=float((profiles.nll / profiles.weight).mean()))
                yield profiles
                let_through()
            self.waited_s += blocks.waited_s
        self.swept_s += time.perf_counter() - began

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

    def own_users(self, source: Source) -> tuple[int, int]:
        """The range of users, in hash order, that is this process's."""
        first, last = self.processes.owned_shards()
        return source.users_between(first << 56, last << 56)

    def _block(self, source: Source, start: int, stop: int) -> Block:
        behaviour = source.block(self.engine.lm.tokenizer, self.engine.layout, start, stop)
        return Block(behaviour, source.hashes_of(start, stop))

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

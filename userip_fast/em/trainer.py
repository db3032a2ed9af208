"""The EM loop: E-step over blocks of users, addable statistics, M-step, checkpoint; then everyone's
codes.

Given the codebooks users are independent, so a block is read, inferred and dropped; memory depends
on the block and never on the number of users.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from userip_fast.behaviour import BehaviourSource
from userip_fast.codebook import Codebook
from userip_fast.config import Config
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.mstep import Stats, ThetaMStep, check_codebook_sizes
from userip_fast.em.paper import run_paper
from userip_fast.em.steps import Block, EMState, Profiles
from userip_fast.errors import FormatError
from userip_fast.files import atomic_dir, read_json, read_tensors, write_json, write_tensors
from userip_fast.lm.engine import Engine
from userip_fast.progress import Progress, progress

logger = logging.getLogger("userip_fast.em")

Log = Callable[[dict[str, Any]], None]
"""Receives one record per round, for metrics.jsonl."""


@dataclass(frozen=True)
class FitResult:
    """Codebooks, and the shared start [S, D] they were learned from."""

    codebooks: list[Codebook]
    start: Tensor


class Trainer:
    """Runs EM for one LM, template and config.

    Args:
        engine: Scores packs.
        config: Everything.
        show: Whether to show progress.
    """

    def __init__(self, engine: Engine, config: Config, show: bool = False) -> None:
        self.engine, self.config, self.show = engine, config, show
        # What `fit` leaves for an `infer` of the same users: descents already made, or, in the
        # published recipe, the thetas that were trained with the codebooks.
        self._estep: GradientEStep | None = None
        self._trained: tuple[str, Profiles] | None = None

    def fit(
        self,
        source: BehaviourSource,
        *,
        log: Log = lambda record: None,
        checkpoints: Path | None = None,
        resume: bool = False,
    ) -> FitResult:
        """Learns the codebooks.

        Args:
            source: The training users.
            log: Called with a record after each round.
            checkpoints: Folder that gets `round-NNNN/` after each round.
            resume: Goes on after the last round found in `checkpoints`.

        Raises:
            DataError: A codebook is larger than the number of users.
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

        estep = GradientEStep(self.engine, start, em)
        mstep = ThetaMStep(self.config.fields, self.engine.layout.field_slices, em)
        state = EMState()
        before: Tensor | None = None
        if resume and checkpoints is not None:
            state.round, mstep.codebooks = _last_checkpoint(checkpoints)
        while state.round < em.rounds:
            stats = Stats(em.kmeans_sample)
            codes: list[Tensor] = []
            totals = np.zeros(4)
            what = f"EM round {state.round + 1} of {em.rounds}"
            for profiles in self._sweep(what, estep, source, mstep.codebooks, state):
                stats = mstep.stats(profiles, stats)
                totals += profiles_total(profiles)
                if profiles.code_ids is not None:
                    codes.append(profiles.code_ids)
            now = torch.cat(codes) if codes else None
            usage = _usage(mstep.codebooks, now)
            books = mstep.apply(stats)
            record = self._record(state.round, totals, usage, mstep.revived)
            if now is not None and before is not None:
                record["changed"] = float((now != before).any(1).double().mean())
            log(record)
            before = now
            state.round += 1
            if checkpoints is not None:
                _save_checkpoint(checkpoints, state.round, books)
            if record.get("changed") == 0.0 and not mstep.revived:
                break
        assert mstep.codebooks is not None
        self._estep = estep
        return FitResult(mstep.codebooks, start)

    def infer(
        self, source: BehaviourSource, codebooks: list[Codebook], start: Tensor
    ) -> Iterator[Profiles]:
        """Profiles of all users, block by block, with the codebooks as they are."""
        em = self.config.em
        if em.recipe == "paper":
            if self._trained is not None:
                content, profiles = self._trained
                same_users = np.array_equal(profiles.hashes, source.hashes)
                if same_users and content == source.content_key():
                    yield profiles
                    return
            for a in range(0, source.num_users, em.block_users):
                block = self._block(source, a, min(a + em.block_users, source.num_users))
                fields = self.config.fields
                yield run_paper(block, self.engine, fields, em, codebooks, self.show)[1]
            return
        estep = self._estep or GradientEStep(self.engine, start, em)
        yield from self._sweep("inferring profiles", estep, source, codebooks, EMState(em.rounds))

    def _sweep(
        self,
        what: str,
        estep: GradientEStep,
        source: BehaviourSource,
        codebooks: list[Codebook] | None,
        state: EMState,
    ) -> Iterator[Profiles]:
        size = self.config.em.block_users
        with progress(what, source.num_users, "users", self.show) as bar:
            for a in range(0, source.num_users, size):
                block = self._block(source, a, min(a + size, source.num_users))
                estep.on_step = _Ticker(bar, self.config.em.steps + self.config.em.refine_steps)
                profiles = estep.run(block, codebooks, state)
                bar.done = a
                bar.advance(len(profiles.nll), nll=float((profiles.nll / profiles.weight).mean()))
                yield profiles

    def _block(self, source: BehaviourSource, start: int, stop: int) -> Block:
        behaviour = source.block(self.engine.lm.tokenizer, self.engine.layout, start, stop)
        return Block(behaviour, source.hashes[start:stop])

    def _record(
        self, round_: int, totals: Any, usage: list[dict[str, Any]], revived: int
    ) -> dict[str, Any]:
        users, nll, weight, cost = totals.tolist()
        return {
            "round": round_,
            "users": int(users),
            "nll_per_weight": nll / max(weight, 1e-12),
            "forward_equivalents": cost / max(users, 1),
            "revived": revived,
            "fields": {f.name: u for f, u in zip(self.config.fields, usage)},
        }


class _Ticker:
    """Turns E-step packs into fractions of a block on a progress bar."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self.bar, self.steps, self.pending = bar, steps, 0

    def __call__(self, users: int, nll: float) -> None:
        self.pending += users
        whole, self.pending = divmod(self.pending, self.steps)
        self.bar.advance(whole, nll=nll)


def profiles_total(profiles: Profiles) -> Any:
    """[4] users, NLL, weight and forward equivalents, summed in fp64."""
    return np.array(
        [
            len(profiles.nll),
            float(profiles.nll.double().sum()),
            float(profiles.weight.sum()),
            float(profiles.forward_equivalents.double().sum()),
        ]
    )


def shared_start(engine: Engine, config: Config, source: BehaviourSource) -> Tensor:
    """[S, D] fp32: where all users of a field begin.

    The mean embedding of the field's candidate words; without candidates, of the tokens that the
    first users' behaviour is made of.
    """
    lm = engine.lm
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


def _usage(books: list[Codebook] | None, codes: Tensor | None) -> list[dict[str, Any]]:
    if books is None or codes is None:
        return []
    found = [book.usage(codes[:, j]) for j, book in enumerate(books)]
    return [
        {"perplexity": u.perplexity, "dead": u.dead, "counts": u.counts.tolist()} for u in found
    ]


def _save_checkpoint(folder: Path, round_: int, books: list[Codebook]) -> None:
    tensors = {f"{j}.{k}": v for j, book in enumerate(books) for k, v in book.state().items()}
    with atomic_dir(folder / f"round-{round_:04d}") as tmp:
        write_tensors(tmp / "codebooks.safetensors", tensors)
        write_json(tmp / "state.json", {"format": 1, "round": round_, "fields": len(books)})


def _last_checkpoint(folder: Path) -> tuple[int, list[Codebook] | None]:
    """The newest readable checkpoint, or (0, None)."""
    for path in sorted(folder.glob("round-[0-9]*"), reverse=True):
        try:
            state = read_json(path / "state.json")
            return int(state["round"]), load_codebooks(
                path / "codebooks.safetensors", int(state["fields"])
            )
        except (FormatError, KeyError, TypeError, ValueError) as e:
            logger.warning("checkpoint %s is passed over: %s", path, e)
    return 0, None


def load_codebooks(path: Path, fields: int) -> list[Codebook]:
    """Codebooks saved as `<field>.<tensor>`.

    Raises:
        FormatError: The file is torn or holds something else.
    """
    tensors = read_tensors(path)
    try:
        return [
            Codebook.from_state(
                {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{j}.")}
            )
            for j in range(fields)
        ]
    except (ValueError, IndexError) as e:
        raise FormatError(f"{path}: does not hold {fields} codebooks ({e})") from e

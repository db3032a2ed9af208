"""The event table: what the LM says of every kind of event under every combination of codes.

Given the codes, independent events are independent, and a kind of event (an item's text, and how it
went) has the same likelihood for everyone. So the LM reads kinds, once, and whatever the number of
users the rest is `ops.profile_posterior`: an exact posterior without an LM.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core import heap
from userip_fast.core.config import Config, EMConfig
from userip_fast.core.progress import Progress, progress
from userip_fast.core.segments import Part, Segments
from userip_fast.em.cache import BlockCache, found_like
from userip_fast.em.columns import Grid, has_all, has_some, places
from userip_fast.em.lifts import Calibration, log_lifts
from userip_fast.em.readings import Readings
from userip_fast.em.steps import Profiles, books_digest
from userip_fast.lm.engine import Engine
from userip_fast.ops import profile_posterior
from userip_fast.prompts.behaviour import Source, Told
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.packing import Behaviour, Int64

Kind = tuple[str, str]
"""An item's text, and the word for how it went ("" where none is told)."""

_SURVEY_USERS = 1 << 14
_TEXTS = 1 << 12  # read before they are kept: what a kill may cost


def has_table(config: Config) -> bool:
    """Whether an event table serves a fit of this config: posteriors of independent events."""
    em, sizes = config.em, [f.codebook_size for f in config.fields]
    return (
        em.recipe == "userip"
        and em.estep != "gradient"
        and config.told.behaviour_context == "independent"
        and (has_all(em, sizes) or has_some(em, sizes))
    )


def answers(config: Config, calibration: Calibration) -> bool:
    """Whether an event table serves what was fitted: its columns are all combinations of codes, or
    known."""
    sizes = [f.codebook_size for f in config.fields]
    return has_table(config) and (calibration.columns is not None or has_all(config.em, sizes))


class Numbering:
    """Numbers of kinds, from 0."""

    def __init__(self, kinds: Iterable[Kind] = ()) -> None:
        self.number: dict[Kind, int] = {}
        self.add(kinds)

    def add(self, kinds: Iterable[Kind]) -> None:
        """Gives `kinds`, which have none yet, the next numbers."""
        for kind in kinds:
            self.number[kind] = len(self.number)
        self._last: tuple[list[str], Int64] | None = None

    def of(self, told: Told) -> Int64:
        """[kinds] the number of each kind of `told`; -1 for those that have none."""
        # A source in memory tells of the same kinds again and again.
        if self._last is None or self._last[0] is not told.texts:
            words = told.words or [""] * len(told.texts)
            found = [self.number.get(kind, -1) for kind in zip(told.texts, words)]
            self._last = told.texts, np.asarray(found, np.int64)
        return self._last[1]


def survey(source: Source, tokenizer: object, first: int, last: int) -> Counter[Kind]:
    """How often users `first:last` have each kind of event, as far as they are told."""
    found: Counter[Kind] = Counter()
    for a in range(first, last, _SURVEY_USERS):
        told = source.told(tokenizer, a, min(a + _SURVEY_USERS, last))
        count = np.bincount(told.kinds, minlength=len(told.texts))
        for i in np.flatnonzero(count).tolist():
            found[told.texts[i], told.words[i] if told.words else ""] += int(count[i])
    return found


class EventTable:
    """See the module.

    A text is read under all words and codes at once, and its values are used as they are kept, to
    16 bits (`userip_fast.core.segments`): who finds them on disk finds the same profiles to the
    bit.

    Args:
        fmt: How events are told.
        calibration: How its values are read.

    Attributes:
        codebooks, grid: What makes the columns.
        words: [W] for how an event went; "" alone where none is told.
        store: Where what is read is kept, and found again; None for in memory.
        cache: The same for the time of one run; used where there is no store.
        show: Whether to show progress.
        parts: What is there, as it is kept.
        values: [E, Z] fp32, log p(kind | codes), or its lift.
    """

    def __init__(
        self,
        engine: Engine,
        fmt: BehaviourFormat,
        codebooks: list[Codebook],
        config: EMConfig,
        calibration: Calibration | None = None,
    ) -> None:
        self.engine, self.format, self.config = engine, fmt, config
        self.calibration = calibration or Calibration()
        self.codebooks = codebooks
        self.words = fmt.words or ("",)
        self.store: Segments | None = None
        self.cache: BlockCache | None = None
        self.show = False
        columns = self.calibration.columns
        self.grid = Grid(codebooks, engine, columns, self.calibration.log_prior)
        self.parts: list[Part] = []
        self._raw: list[tuple[list[str], Behaviour, Tensor]] = []
        self.values = torch.empty(0, len(self.grid.codes))
        self._unpaid = 0  # rows that were read, and are no user's cost yet
        self._books = books_digest(codebooks)
        if self.calibration.neutral is not None:
            self._books += self.calibration.neutral.numpy().tobytes()
        if columns is not None:
            self._books += columns.numpy().tobytes()
        self._numbering = Numbering()
        self._weight = np.zeros(0)  # [E] loss weight of a kind
        self._tokens = np.zeros(0, np.int64)  # [E] its rows in a history of its own

    def read(self, kinds: Iterable[Kind]) -> None:
        """Has the LM read the texts of `kinds` that it has not read; in an order of their own."""
        wanted = {text for text, _ in kinds}
        if self._unread(wanted):
            self.find()
        if not self._unread(wanted):
            return
        if self.store is None:
            self._read(self._unread(wanted))
            return
        with self.store.alone():  # others may have read the same meanwhile
            self.find()
            self._read(self._unread(wanted))

    def find(self) -> None:
        """Takes in what has been kept in the store since the last time."""
        if self.store is not None:
            self._take(self.store.new())

    def _unread(self, texts: Iterable[str]) -> list[str]:
        number, word = self._numbering.number, self.words[0]
        return sorted(text for text in texts if (text, word) not in number)

    def _read(self, texts: list[str]) -> None:
        words = len(self.words)
        kinds = [(text, word) for text in texts for word in self.words]
        told = self.format.kinds(self.engine.lm.tokenizer, self.engine.layout, kinds)
        groups = []
        for a in range(0, len(texts), _TEXTS):
            some = texts[a : a + _TEXTS]
            own = told.select(np.arange(a * words, (a + len(some)) * words))
            groups.append((some, own, Readings.of(own)))
        soft, codes = self.engine.layout.num_soft, len(self.grid.codes)
        columns = codes + (self.calibration.neutral is not None)
        total = columns * sum(int(r.behaviour.pack_rows(soft).sum()) for _, _, r in groups)
        with progress("reading events", total, "rows", self.show) as bar:
            for some, own, readings in groups:
                self._keep(some, own, self._scored(readings, own, bar))

    def _keep(self, texts: list[str], own: Behaviour, told: Tensor) -> None:
        """Takes in what was read: [T W, Z], likelihoods or lifts."""
        shape = len(texts), len(self.words)
        values = self.calibration.values(told, texts, self.format.feedback_weight)
        part = Part.of(
            texts,
            own.lengths.reshape(shape),
            own.total_weight.reshape(shape),
            values.numpy().reshape(*shape, -1),
        )
        if self.store is not None:
            self.store.add(part)
        self._take([part])
        if self.calibration.raw:
            self._raw.append((texts, own, told))
        heap.trim()

    def calibrated(self, how: Calibration, codebooks: list[Codebook]) -> EventTable:
        """A raw table's likelihoods or lifts, read as `how` says; the codebooks may have other
        shares of codes."""
        out = EventTable(self.engine, self.format, codebooks, self.config, how)
        out._unpaid = self._unpaid
        for texts, own, told in self._raw:
            out._keep(texts, own, told)
        return out

    @staticmethod
    def joined(tables: Sequence[EventTable], columns: Tensor) -> EventTable:
        """One raw table of `columns` [Z, J], each being in one at least of raw tables of the same
        texts."""
        first, codes = tables[0], torch.cat([table.grid.codes for table in tables])
        _, at = np.unique(codes.numpy(), axis=0, return_index=True)
        pick = torch.from_numpy(at[places(columns.numpy(), codes.numpy()[at])])
        how = replace(first.calibration, columns=columns)
        out = EventTable(first.engine, first.format, first.codebooks, first.config, how)
        out._unpaid = sum(table._unpaid for table in tables)
        for same in zip(*(table._raw for table in tables), strict=True):
            texts, own, _ = same[0]
            out._keep(texts, own, torch.cat([told for _, _, told in same], dim=1)[:, pick])
        return out

    def _take(self, parts: Iterable[Part]) -> None:
        """Adds to the table what it lacks."""
        number, values, weight, tokens = self._numbering.number, [], [], []
        for part in parts:
            there = [(t, self.words[0]) in number for t in part.texts.to_pylist()]
            if any(there):
                part = part.take(np.flatnonzero(~np.asarray(there)).tolist())
            texts = part.texts.to_pylist()
            self._numbering.add((text, word) for text in texts for word in self.words)
            self.parts.append(part)
            values.append(torch.from_numpy(part.values()).flatten(0, 1))
            weight.append(part.weight.ravel())
            tokens.append(part.tokens.ravel().astype(np.int64))
        if values:
            self.values = torch.cat([self.values, *values])
            self._weight = np.concatenate([self._weight, *weight])
            self._tokens = np.concatenate([self._tokens, *tokens])

    def _scored(self, readings: Readings, told: Behaviour, bar: Progress) -> Tensor:
        content = told.ids.tobytes() + told.offsets.tobytes()
        key = hashlib.sha256(self._books + content).digest()
        cache = self.cache if self.store is None else None
        like = {"values": (readings.num_kinds, len(self.grid.codes))}
        if cache is not None and (found := found_like(cache, "table", key, like)):
            return found["values"]
        before = bar.done
        asked = self.engine, readings, self.grid.soft, self.calibration.neutral
        values = log_lifts(*asked, self.config.pack_tokens, bar.advance)
        self._unpaid += bar.done - before
        if cache is not None:
            cache.put("table", key, {"values": values})
        return values

    def rows(self, kinds: Sequence[Kind]) -> Int64:
        """[N] row of each of `kinds`, those that are new being read first."""
        self.read(kinds)
        return np.asarray([self._numbering.number[kind] for kind in kinds], np.int64)

    @property
    def texts(self) -> list[str]:
        """Whose rows are there: those of a text under each word follow each other."""
        return [text for part in self.parts for text in part.texts.to_pylist()]

    def rows_told(self, told: Told) -> Int64:
        """[N] the same of each event."""
        rows = self._numbering.of(told)[told.kinds]
        if len(unread := np.unique(told.kinds[rows < 0])):
            words = told.words or [""] * len(told.texts)
            self.read((told.texts[i], words[i]) for i in unread.tolist())
            rows = self._numbering.of(told)[told.kinds]
        return rows

    def posterior(self, rows: Int64, offsets: Int64) -> tuple[Tensor, Tensor]:
        """[U, Z] log responsibilities and [U] evidence of users whose events are `rows`."""
        return profile_posterior(
            self.values,
            torch.from_numpy(rows),
            torch.from_numpy(offsets),
            self.grid.log_prior,
            self.calibration.weights(offsets),
        )

    def profiles(self, told: Told, hashes: npt.NDArray[np.uint64]) -> Profiles:
        """Of the users of `told`; what was read since the last ones costs each of them alike."""
        rows, offsets = self.rows_told(told), told.offsets
        log_resp, evidence = self.posterior(rows, offsets)
        marginals, codes, at = self.grid.likeliest(log_resp, self.calibration.code_prior)
        each = at.numpy().repeat(np.diff(offsets))
        nll = -_sums(self.values.numpy()[rows, each].astype(np.float64), offsets)
        own = self._tokens[rows].sum() + self.engine.layout.num_soft * len(hashes)
        cost, self._unpaid = self._unpaid / own, 0
        return Profiles(
            hashes=hashes,
            code_ids=codes,
            nll=torch.from_numpy(nll).float(),
            weight=torch.from_numpy(_sums(self._weight[rows], offsets)),
            forward_equivalents=torch.full((len(hashes),), float(cost)),
            log_resp=marginals,
            elbo=evidence,
        )


def _sums(values: npt.NDArray[np.float64], offsets: Int64) -> npt.NDArray[np.float64]:
    running = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(running[offsets[1:]] - running[offsets[:-1]])

"""The end of a fit by an event table: all texts are read, under all columns or those that users
need, and the table is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.em.calibrate import calibrate
from userip_fast.em.columns import choose, lines, places
from userip_fast.em.crowd import Crowd
from userip_fast.em.lifts import Calibration
from userip_fast.em.starts import ToldUsers, kind_of_start
from userip_fast.em.table import EventTable, Kind
from userip_fast.prompts.behaviour import Source
from userip_fast.prompts.layout import ProfileField


def finished(
    source: Source,
    users: Crowd,
    books: list[Codebook],
    fields: tuple[ProfileField, ...],
    told: ToldUsers | None,
    read: Callable[[EventTable, Iterable[Kind]], None],
) -> tuple[list[Codebook], EventTable]:
    """The codebooks with the codes' shares, and everything that was read of the users, to be read
    as their judges say.

    Args:
        told: What some users did, where the LM has a language to be told of it.
        read: Has a table read texts.
    """
    em = users.config

    def raw(columns: Tensor | None) -> EventTable:
        how = Calibration(users.neutral, columns=columns, raw=True)
        table = EventTable(users.engine, source.format, books, em, how)
        read(table, users.kinds)
        return table

    def calibrated(table: EventTable) -> tuple[Calibration, Tensor]:
        groups = None
        if told is not None and len(fields) == 1 and kind_of_start(em, fields[0], True) == "told":
            groups = told.groups(table.texts, len(books[0]), em.seed)
        return calibrate(source, users.judging, table, users.kinds, users.usual, groups)

    if users.all:
        table = raw(None)
        how, log_prior = calibrated(table)
    else:
        tables = _Tables(users, raw, books)
        table = tables.chosen(Calibration())
        how, log_prior = calibrated(table)
        # Where events count less, posteriors are flatter, and users need more columns.
        if how.finite_half is not None:
            table = tables.chosen(how)
            how, log_prior = calibrated(table)
    if len(books) == 1:
        book = Codebook.from_state(books[0].state())
        book.log_prior = log_prior.float()
        books = [book]
    return books, table.calibrated(how, books)


class _Tables:
    """Raw tables of all texts, each of columns that no other has.

    Args:
        raw: Has the LM read all texts under columns [Z, J].
    """

    def __init__(
        self, users: Crowd, raw: Callable[[Tensor], EventTable], books: list[Codebook]
    ) -> None:
        self.users, self.raw, self.books = users, raw, books
        self.tables = [raw(lines([len(book) for book in books]))]
        table = self.tables[0]
        kinds = [(text, word) for text in table.texts for word in table.words]
        self.texts = table.texts
        self.counts = torch.tensor([users.kinds.get(k, 0) for k in kinds], dtype=torch.float64)
        self.rows = torch.from_numpy(table.rows_told(users.proposers))
        self.offsets = torch.from_numpy(users.proposers.offsets)

    def chosen(self, how: Calibration) -> EventTable:
        """One raw table of the columns that users need where events count as `how` says."""
        weights = how.weights(self.users.proposers.offsets)
        found = choose(self.books, self._values, self.rows, self.offsets, weights)
        return EventTable.joined(self.tables, found.codes)

    def _values(self, columns: Tensor) -> Tensor:
        """[E, n] under columns [n, J], which are read if they have not been."""
        known = torch.cat([table.grid.codes for table in self.tables])
        new = columns[torch.from_numpy(places(columns.numpy(), known.numpy()) < 0)]
        if len(new):
            self.tables.append(self.raw(new))
        values = torch.cat([table.values for table in self.tables], dim=1)
        known = torch.cat([table.grid.codes for table in self.tables])
        at = torch.from_numpy(places(columns.numpy(), known.numpy()))
        return self.users.values(values[:, at], self.texts, self.counts)

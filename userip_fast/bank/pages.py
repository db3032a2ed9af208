"""Checksums of pages: what a look-up reads of a bank is checked before it is first believed.

A bank is mapped, not read, so a sum of a whole file would be checked too late or cost seconds. Each
4 KiB of every array (what the system reads at once anyhow) has a CRC-32, which every language has
and `zlib` computes at gigabytes a second; it finds any change of up to 32 bits in a row. A byte per
page remembers what was checked: a bank that is in use costs one look into that map.
"""

from __future__ import annotations

import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userip_fast.core.errors import FormatError

PAGE = 4096
"""Bytes that have one sum; the last page of an array may be shorter."""

Rows = NDArray[np.int64]


def num_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE)


class PageSums:
    """CRC-32 of each page of bytes that come in pieces of any size."""

    def __init__(self) -> None:
        self._done = array("I")
        self._sum, self._room = 0, PAGE

    def add(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            piece = data[at : at + self._room]
            self._sum = zlib.crc32(piece, self._sum)
            at += len(piece)
            self._room -= len(piece)
            if self._room == 0:
                self._done.append(self._sum)
                self._sum, self._room = 0, PAGE

    def sums(self) -> NDArray[np.uint32]:
        """[pages] of what was added."""
        last = [self._sum] if self._room < PAGE else []
        return np.array(self._done + array("I", last), "<u4")


class PagedArray:
    """A mapped array whose pages are checked before they are first read.

    Attributes:
        path: Its file, for messages.
        unchecked: [n, ...]; only rows that were asked for below may be believed.
        sums: [pages] uint32, or None in a bank of before there were any: nothing is checked then.
        seen: [pages] uint8, 1 where a page is known to be whole. The compiled look-up shares it.
    """

    def __init__(self, path: Path, values: NDArray[Any], sums: NDArray[np.uint32] | None) -> None:
        self.path, self.unchecked, self.sums = path, values, sums
        pages = num_pages(values.nbytes)
        self.seen = np.full(pages, sums is None, np.uint8)
        self._row_bytes = values.itemsize * int(np.prod(values.shape[1:]))
        self._whole = bool(self.seen.all())

    def __len__(self) -> int:
        return len(self.unchecked)

    def check(self, first: Rows, rows: int | Rows = 1) -> None:
        """Checks the pages of `rows` rows from each row `first[i]` on.

        Raises:
            FormatError: A page was altered; names it.
        """
        if self._whole:
            return
        page = first * self._row_bytes // PAGE
        end = -(-(first + rows) * self._row_bytes // PAGE)
        while (on := page < end).any():
            page, end = page[on], end[on]
            if len(new := page[self.seen[page] == 0]):
                self._read(np.unique(new))
            page = page + 1

    def rows(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start:stop`, checked, not copied.

        Raises:
            FormatError: See `check`.
        """
        stop = len(self) if stop is None else stop
        if not self._whole:
            first, end = start * self._row_bytes // PAGE, -(-stop * self._row_bytes // PAGE)
            self._read(first + np.flatnonzero(self.seen[first:end] == 0))
        return self.unchecked[start:stop]

    def _read(self, pages: Rows) -> None:
        assert self.sums is not None
        data = self.unchecked.reshape(-1).view(np.uint8).data
        for page in pages.tolist():
            start = page * PAGE
            if zlib.crc32(data[start : start + PAGE]) != self.sums[page]:
                raise FormatError(
                    f"{self.path}: page {page} (bytes {start} to {start + PAGE - 1}) was altered "
                    "since it was written (CRC-32 differs); restore the bank from a copy or write "
                    "it again"
                )
            self.seen[page] = 1
        self._whole = bool(self.seen.all())

"""Bad rows: which rules were broken, how often, and where first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.core.errors import DataError

if TYPE_CHECKING:
    from userip_fast.data.sources import Source

NUM_EXAMPLES = 10
"""Offenders that are listed, of each kind of report."""


@dataclass(frozen=True)
class BadRow:
    """One offender: 1-based data row (a CSV header does not count) of `file`.

    `column` is empty where the row as a whole is no row.
    """

    file: str
    row: int
    column: str
    rule: str
    value: str

    def __str__(self) -> str:
        column = f", column {self.column!r}" if self.column else ""
        return f"{self.file}, row {self.row}{column}: {self.rule} ({self.value})"


@dataclass(frozen=True)
class BadRows:
    """What reading dropped.

    Attributes:
        rows_read: Rows of the interactions before anything was dropped.
        rows_filtered: Rows that `filter` dropped.
        counts: Rule -> rows that broke it; a row counts for the first rule it breaks only.
        examples: The first 10 offenders.
        short_users: Users left with fewer than `min_history` events (none, by default), dropped.
        short_examples: The first 10 of their keys.
    """

    rows_read: int = 0
    rows_filtered: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: tuple[BadRow, ...] = ()
    short_users: int = 0
    short_examples: tuple[int | str, ...] = ()
    min_history: int = 1

    @property
    def rows_bad(self) -> int:
        """Rows dropped for a rule."""
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "rows_read": self.rows_read,
            "rows_filtered": self.rows_filtered,
            "rows_bad": self.rows_bad,
            "counts": dict(self.counts),
            "examples": [vars(example) for example in self.examples],
            "min_history": self.min_history,
            "short_users": self.short_users,
            "short_examples": list(self.short_examples),
        }

    def table(self) -> str:
        """A plain-text table of counts, followed by the offenders."""
        lines = [("rows read", self.rows_read), ("dropped by filter", self.rows_filtered)]
        lines += list(self.counts.items())
        lines += [(f"users below {self.min_history} event(s)", self.short_users)]
        width = max(len(name) for name, _ in lines)
        text = [f"{name:<{width}}  {count:>12,}" for name, count in lines]
        text += [f"  {example}" for example in self.examples]
        if self.short_examples:
            keys = ", ".join(repr(key) for key in self.short_examples)
            more = ", ..." if self.short_users > len(self.short_examples) else ""
            text.append(f"  users without enough events: {keys}{more}")
        return "\n".join(text)


class RowChecks:
    """Collects bad rows, source by source: `start` one, then `add` each rule's offenders.

    Attributes:
        bad: Of the source at hand: which of its rows broke a rule so far.
        counts: Over all sources: rule -> rows.
        time_unit: What times that are numbers are counted in, once some were seen.
        rows_lost: Rows that could not be read as such.
        parsed: Columns of text in which some value was read as a number or a time.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.time_unit: str | None = None
        self.rows_lost = 0
        self.parsed: set[str] = set()
        self._found: list[tuple[int, int, BadRow]] = []
        self._sources = 0

    def start(self, source: Source, rows: NDArray[np.int64]) -> None:
        """Turns to rows `rows` of `source`; the masks of `add` follow these."""
        self._source, self._rows = source, rows
        self._sources += 1
        self.bad = np.zeros(len(rows), bool)

    def add(self, rule: str, column: str, offends: NDArray[np.bool_], values: pa.Array) -> None:
        """Counts the rows that break `rule` and none before it."""
        new = np.flatnonzero(offends & ~self.bad)
        if len(new) == 0:
            return
        self.bad[new] = True
        self.counts[rule] = self.counts.get(rule, 0) + len(new)
        for i in new[:NUM_EXAMPLES]:
            file, row = self._source.where(int(self._rows[i]))
            example = BadRow(file, row, column, rule, repr(values[int(i)].as_py()))
            self._found.append((self._sources, int(self._rows[i]), example))

    def lose(self, source: Source) -> None:
        """Counts the rows that are missing in `source`, at hand, because they are none."""
        for lost in source.lost:
            self.rows_lost += len(lost)
            for rule, count in lost.counts.items():
                self.counts[rule] = self.counts.get(rule, 0) + count
            self._found += [(self._sources, lost.before + e.row - 1, e) for e in lost.examples]

    def examples(self) -> tuple[BadRow, ...]:
        """The first offenders in the order of sources and rows."""
        found = sorted(self._found, key=lambda entry: entry[:2])
        return tuple(example for _, _, example in found[:NUM_EXAMPLES])

    def error(self) -> DataError:
        """What to raise where bad rows are not to be skipped."""
        lines = [f"{sum(self.counts.values()):,} bad row(s):"]
        lines += [f"  {count:,} x {rule}" for rule, count in self.counts.items()]
        lines.append(f"the first {len(self.examples())}:")
        lines += [f"  {example}" for example in self.examples()]
        if any(e.rule == "unknown item" and _is_whole_float(e.value) for e in self.examples()):
            lines.append(
                "keys such as 13.0 were integers in a frame that had gaps: save them as integers "
                "(pandas: frame[column].astype('Int64'))"
            )
        lines.append('correct the files, or drop these rows with on_bad="skip" (--on-bad skip)')
        return DataError("\n".join(lines))


def _is_whole_float(value: str) -> bool:
    whole, _, rest = value.strip("'").partition(".")
    return rest == "0" and whole.lstrip("-").isdigit()

"""CSV in whatever form it comes: packed, with any separator, encoding and header; and what all text
files have in common.

Arrow reads a file at the rate of memory, and refuses it whole for one bad row or value. Such a file
is read again row by row: rows that are none are left out and listed, and values stay text, which
later checks judge one by one.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from userip_fast.core.errors import DataError, shown
from userip_fast.data.arrow import combine, is_text, to_numpy
from userip_fast.data.report import NUM_EXAMPLES, BadRow
from userip_fast.data.values import cast_or_null, guess, numbers_of

BLOCK = 16 << 20  # bytes; a JSON row may not be longer, and CSV types are guessed from one block
_HEAD = 1 << 16  # bytes that tell what a file is
_LARGE, _EXPANSION = 1 << 30, 1000  # of a packed file: bytes, and times its size

_SEPARATORS = (
    ",",
    "\t",
    "::",
    ";",
    "|",
    "\x01",
)  # MovieLens has "|" within "::"; the last is Hive's
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_TYPES = (":token", ":token_seq", ":float", ":float_seq")  # in the headers of RecBole's files
_STAND_IN = "\x1f"  # ASCII's unit separator, where Arrow cannot have one of several characters


class UnreadableError(Exception):
    """Why a file cannot be read; who reads it says which."""


@dataclass(frozen=True)
class TextForm:
    """How text files are written; what is None, the files tell.

    Attributes:
        sep: Between the columns of a CSV file; where it is several characters, nothing is quoted.
        encoding: By Python's names; None is UTF-8, or UTF-16 where the file begins with its mark.
        header: Names of the columns of CSV files that have no header line.
        likely: A separator to look for first.
    """

    sep: str | None = None
    encoding: str | None = None
    header: tuple[str, ...] | None = None
    likely: str | None = None


def text_form(
    sep: str | None,
    encoding: str | None,
    header: str | Sequence[str] | None,
    name: str = "header",
) -> TextForm:
    r"""A form as callers say it: `\t` may be spelt out, and names be joined by commas.

    Raises:
        DataError: A separator, encoding or header cannot be one.
    """
    if sep is not None:
        sep = sep.replace("\\t", "\t")
        if not 1 <= len(sep) <= 8 or set(sep) & set('"\r\n\0') or not sep.isascii():
            raise DataError(
                f"sep must be 1 to 8 ASCII characters without quotes and new lines, is {shown(sep)}"
            )
    if encoding is not None:
        try:
            "".encode(encoding).decode(encoding)
        except (LookupError, ValueError) as e:
            raise DataError(
                "encoding must be one that Python knows, such as utf-8, latin-1 or cp1252, is "
                f"{shown(encoding)}"
            ) from e
    names = None
    if header is not None:
        parts = header.split(",") if isinstance(header, str) else list(header)
        names = tuple(str(part).strip() for part in parts)
        if not names or not all(names) or len(set(names)) < len(names):
            raise DataError(f"{name} must name every column, each once, is {shown(header)}")
    return TextForm(sep, encoding, names)


@dataclass(frozen=True)
class Wanted:
    """The columns that are asked for.

    Attributes:
        columns: Those to read; None for all.
        needed: Those that must be there; by them a separator is recognised.
        as_text: Those whose type is not to be guessed.
        checked: Those whose values later checks judge one by one, as numbers or as text.
        numbers: Those that are compared with numbers: a row with anything else is lost.
    """

    columns: tuple[str, ...] | None
    needed: tuple[str, ...] = ()
    as_text: frozenset[str] = frozenset()
    checked: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()


@dataclass
class Lost:
    """Rows of a file that could not be read as rows.

    Attributes:
        counts: Rule -> rows that broke it.
        examples: The first of each rule.
        before: Rows of other files that were read before.
    """

    file: str
    before: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[BadRow] = field(default_factory=list)

    def add(self, row: int, column: str, rule: str, value: object) -> None:
        self.counts[rule] = self.counts.get(rule, 0) + 1
        if self.counts[rule] <= NUM_EXAMPLES:
            self.examples.append(BadRow(self.file, row, column, rule, shown(value)))

    def __len__(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class TextTable:
    """What was read of one file.

    Attributes:
        table: The rows that are rows, the wanted columns.
        rows: [n] 1-based data row in the file of each of them; None where none is missing.
        lost: The others.
        found: What the file itself told of its form.
    """

    table: pa.Table
    rows: NDArray[np.int64] | None
    lost: Lost
    found: tuple[str, ...]


class TextFile:
    """A file as UTF-8 text, unpacked.

    Attributes:
        head: Its first characters, without a byte order mark.
        found: What was found out about the encoding.
    """

    def __init__(self, path: Path, form: TextForm) -> None:
        self.path = path
        _check_unpacked(path)
        with unpacked(path) as stream:
            head = stream.read(_HEAD)
        wide = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        self.encoding = form.encoding or ("utf-16" if wide else "utf-8-sig")
        self.plain = codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")
        self.found: tuple[str, ...] = (
            ("the encoding is utf-16",) if wide and form.encoding is None else ()
        )
        # What is not UTF-8 is found row by row; other encodings are refused as a whole.
        errors = "replace" if self.plain else "strict"
        self.head = codecs.getincrementaldecoder(self.encoding)(errors).decode(head)
        self.head = self.head.removeprefix("\ufeff")
        if not self.head.strip():
            raise UnreadableError("it is empty")

    def open(self) -> pa.NativeFile:
        stream = unpacked(self.path)
        if self.plain:
            return stream
        return pa.transcoding_input_stream(stream, self.encoding, "utf-8")


def packing(file: Path) -> str | None:
    """How a file is compressed, by its first bytes."""
    with open(file, "rb") as raw:
        magic = raw.read(4)
    if magic[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if magic == b"\x28\xb5\x2f\xfd" else None


def unpacked(file: Path) -> pa.NativeFile:
    """The file's bytes, uncompressed."""
    raw = pa.OSFile(str(file))
    kind = packing(file)
    return raw if kind is None else pa.CompressedInputStream(raw, kind)


def _check_unpacked(file: Path) -> None:
    """Refuses a file of kilobytes that stands for gigabytes; gzip cannot go far beyond the bound.

    Raises:
        UnreadableError: It is one.
    """
    most = max(_LARGE, _EXPANSION * file.stat().st_size)
    if packing(file) != "zstd":
        return
    done = 0
    with unpacked(file) as stream:
        while piece := stream.read(1 << 20):
            done += len(piece)
            if done > most:
                raise UnreadableError(
                    f"its {file.stat().st_size:,} bytes stand for more than {most:,}, beyond what "
                    "is read; unpack it, if that is meant"
                )


def kind_of(file: Path) -> str | None:
    """ "parquet", "json" or "csv" by a file's content; None where it is none of these."""
    with open(file, "rb") as raw:
        if raw.read(4) == b"PAR1":
            return "parquet"
    with unpacked(file) as stream:
        head = stream.read(_HEAD)
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        head = head[2:].replace(b"\0", b"")
    if b"\0" in head:
        return None
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text[:1] in ("{", "["):
        return "json"
    line = text.partition("\n")[0]
    return "csv" if any(sep in line for sep in _SEPARATORS) else None


def read_csv(path: Path, wanted: Wanted, form: TextForm, usual: str) -> TextTable:
    """Reads a CSV file.

    Args:
        usual: The separator of files of such a name.

    Raises:
        DataError: A column is not there.
        UnreadableError, pa.ArrowException, OSError, UnicodeDecodeError: It cannot be read.
    """
    file = TextFile(path, form)
    blank = len(file.head) - len(file.head.lstrip("\r\n"))
    head, likely = file.head[blank:], form.likely or usual
    sep = form.sep or _separator(head, likely, wanted.needed, form.header)
    names = _column_names(path, head, sep, wanted, form)
    found = file.found
    if form.sep is None and sep not in (usual, form.likely):
        found += (f"columns are separated by {_NAMES.get(sep, repr(sep))}",)
    if form.header is None and len(head) < _HEAD // 8 and not set("\r\n") & set(head.rstrip()):
        columns = names if wanted.columns is None else wanted.columns  # and no row
        none = pa.table({name: pa.array([], pa.large_string()) for name in columns})
        return TextTable(none, None, Lost(str(path)), found)
    reader = _CsvReader(wanted, names, sep, blank, int(form.header is None))
    try:
        table = reader.whole(file.open())
    except pa.ArrowInvalid:
        table = None
    if table is None or any(is_text(table.schema.field(n).type) for n in wanted.numbers):
        return TextTable(*reader.by_row(file.open(), str(path)), found)
    return TextTable(table, None, Lost(str(path)), found)


def _separator(head: str, likely: str, needed: Sequence[str], header: Sequence[str] | None) -> str:
    """The first that gives the columns that are needed, or as many as are named; else `likely`."""
    candidates = list(dict.fromkeys([likely, *_SEPARATORS]))
    for sep in candidates:
        fields = _split(head, sep)
        if len(fields) == len(header) if header else set(needed) <= set(_plain_names(fields)):
            return sep
    return likely if likely in head else max(candidates, key=lambda sep: len(_split(head, sep)))


def _split(head: str, sep: str) -> list[str]:
    """The fields of the first line."""
    if len(sep) > 1:
        return head.partition("\n")[0].rstrip("\r").split(sep)
    try:
        return next(csv.reader(io.StringIO(head, newline=""), delimiter=sep))
    except csv.Error:
        return [head.partition("\n")[0]]


def _plain_names(fields: Sequence[str]) -> list[str]:
    """Column names as they are asked for: `user_id:token` is `user_id`."""
    names = [name.strip() for name in fields]
    if all(name.endswith(_TYPES) for name in names):
        return [name.rpartition(":")[0] for name in names]
    return names


def _column_names(path: Path, head: str, sep: str, wanted: Wanted, form: TextForm) -> list[str]:
    fields = _split(head, sep)
    if form.header is not None:
        if len(fields) != len(form.header):
            raise UnreadableError(
                f"its first row has {len(fields)} value(s), {shown(fields)}, but header names "
                f"{len(form.header)} column(s), {list(form.header)}"
            )
        names = list(form.header)
        refuse_columns(wanted.columns and wanted.needed, names, path)
        return names
    names = _plain_names(fields)
    if wanted.needed and not set(wanted.needed) & set(names):
        raise DataError(
            f"{path} has no column {wanted.needed[0]!r}; it has {shown(names)}. If that is its "
            "first row, name its columns: header=[...] (--header A,B,C, of the items "
            "--items-header); if it is one name, say what separates them: sep (--sep)"
        )
    refuse_columns(wanted.columns and wanted.needed, names, path)
    return names


class _CsvReader:
    """Both ways to read one file."""

    def __init__(
        self, wanted: Wanted, names: list[str], sep: str, blank: int, header_rows: int
    ) -> None:
        self.wanted, self.sep, self.header_rows = wanted, sep, header_rows
        self.columns = names if wanted.columns is None else list(wanted.columns)
        self.options: dict[str, Any] = {
            "block_size": BLOCK,
            "column_names": names,
            "skip_rows": blank,
            "skip_rows_after_names": header_rows,
        }

    def whole(self, stream: pa.NativeFile) -> pa.Table:
        types = {name: pa.large_string() for name in self.wanted.as_text}
        return pacsv.read_csv(
            self._fit(stream),
            pacsv.ReadOptions(**self.options),
            self._parse(None),
            pacsv.ConvertOptions(include_columns=self.columns, column_types=types),
        )

    def by_row(self, stream: pa.NativeFile, file: str) -> tuple[pa.Table, NDArray[np.int64], Lost]:
        lost = Lost(file)
        gaps: list[int] = []

        def ragged(row: pacsv.InvalidRow) -> str:
            gaps.append(row.number - self.header_rows)
            lost.add(gaps[-1], "", f"row without {row.expected_columns} values", row.text)
            return "skip"

        raw = pacsv.read_csv(
            self._fit(stream),
            pacsv.ReadOptions(**self.options, use_threads=False),  # which alone numbers rows
            self._parse(ragged),
            pacsv.ConvertOptions(
                include_columns=self.columns,
                column_types=dict.fromkeys(self.columns, pa.large_binary()),
            ),
        )
        rows = np.arange(1, raw.num_rows + len(gaps) + 1)
        return judged(raw, np.delete(rows, np.array(gaps, np.int64) - 1), lost, self.wanted)

    def _parse(self, handler: Any) -> pacsv.ParseOptions:
        several = len(self.sep) > 1
        return pacsv.ParseOptions(
            delimiter=_STAND_IN if several else self.sep,
            quote_char=False if several else '"',
            newlines_in_values=not several,
            invalid_row_handler=handler,
        )

    def _fit(self, stream: pa.NativeFile) -> pa.NativeFile:
        """The stream, with a separator that Arrow can have."""
        if len(self.sep) == 1:
            return stream
        text = stream.read()
        if _STAND_IN.encode() in text:
            raise UnreadableError("it holds the character 0x1f; separate columns by one character")
        return pa.BufferReader(text.replace(self.sep.encode(), _STAND_IN.encode()))


def judged(
    raw: pa.Table, rows: NDArray[np.int64], lost: Lost, wanted: Wanted
) -> tuple[pa.Table, NDArray[np.int64], Lost]:
    """Bytes made text and text what it is, where nobody else will judge it; bad rows to `lost`."""
    columns: dict[str, pa.Array] = {}
    bad = np.zeros(len(rows), bool)

    def lose(name: str, rule: str, offends: NDArray[np.bool_]) -> None:
        for at in np.flatnonzero(offends & ~bad).tolist():
            lost.add(int(rows[at]), name, rule, raw[name][at].as_py())
        bad[offends] = True

    for name in raw.column_names:
        columns[name] = values = combine(raw[name])
        if pa.types.is_large_binary(values.type):
            columns[name] = text = cast_or_null(values, pa.large_string())
            lose(
                name, "text is not UTF-8", to_numpy(pc.and_(pc.is_null(text), pc.is_valid(values)))
            )
    for name, values in columns.items():
        if not pa.types.is_large_string(values.type) or name in wanted.as_text - wanted.numbers:
            continue
        guessed = guess(values)
        if name in wanted.numbers and pa.types.is_large_string(guessed.type):
            guessed = numbers_of(values)
            told = pc.and_(pc.is_null(guessed), pc.not_equal(pc.fill_null(values, ""), ""))
            lose(name, "not a number", to_numpy(told))
        if name in wanted.numbers or name not in wanted.checked:
            columns[name] = guessed
    return pa.table(columns).filter(pa.array(~bad)), rows[~bad], lost


def refuse_columns(columns: Sequence[str] | None, names: list[str], name: object) -> None:
    """Raises a DataError where a column of `columns` is not among `names`, or more than once."""
    for column in names if columns is None else columns:
        if column not in names:
            raise DataError(f"{name} has no column {column!r}; it has {names}")
        if names.count(column) > 1:
            raise DataError(f"{name} has more than one column {column!r}")

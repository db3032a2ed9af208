"""Tables from files and from memory, with every row traceable to where it came from."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from userip_fast.core.errors import DataError
from userip_fast.data.arrow import combine, is_text, to_numpy
from userip_fast.data.filelist import File, TableLike, is_path, list_files, name_of
from userip_fast.data.jsonlines import read_json
from userip_fast.data.memory import as_arrow
from userip_fast.data.textfiles import (
    Lost,
    TextForm,
    TextTable,
    UnreadableError,
    Wanted,
    packing,
    read_csv,
    refuse_columns,
)

logger = logging.getLogger("userip_fast")

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # what prints back as it was written, and fits int64
_WHOLE_FLOAT = r"^-?[0-9]+\.0$"


class Part(NamedTuple):
    """Rows of a table that follow each other in a file.

    Attributes:
        start: Their first row in the table.
        row: Its 1-based data row in the file.
    """

    file: str
    start: int
    row: int


@dataclass(frozen=True)
class Source:
    """A table and where its rows came from.

    Attributes:
        name: What to call it in messages.
        table: All rows, the wanted columns.
        parts: In the order of the table's rows.
        typed: Whether the file itself says what type a column has; in CSV it is a guess.
        lost: Rows that could not be read as such, by file.
    """

    name: str
    table: pa.Table
    parts: tuple[Part, ...]
    typed: bool
    lost: tuple[Lost, ...] = ()

    def where(self, row: int) -> tuple[str, int]:
        """File and 1-based data row of a row of `table`."""
        part = self.parts[bisect_right(self.parts, row, key=lambda part: part.start) - 1]
        return part.file, part.row + row - part.start

    def require(self, *columns: str) -> None:
        """Raises a DataError that names a column which is not there, and those that are."""
        refuse_columns(columns, self.table.column_names, self.name)

    def repeats_header(self, *names: str) -> NDArray[np.bool_]:
        """[n] which rows of a CSV file are its header again, as where files were put together."""
        again = np.zeros(self.table.num_rows, bool)
        columns = [self.column(name) for name in names]
        if not self.typed and all(pa.types.is_large_string(c.type) for c in columns):
            again |= True
            for name, column in zip(names, columns):
                again &= to_numpy(pc.fill_null(pc.equal(column, name), False))
        return again

    def column(self, name: str) -> pa.Array:
        """A column in one piece."""
        return combine(self.table[name])

    def keys(self, name: str) -> pa.Array:
        """A key column as int64 or large_string; an empty string is null.

        In a CSV file keys are integers if every one is written as an integer is (no leading zeros
        or signs), else text.

        Raises:
            DataError: The column is of another type, or an integer does not fit int64.
        """
        array = self.column(name)
        if pa.types.is_integer(array.type):
            try:
                return array.cast(pa.int64())
            except pa.ArrowInvalid as e:
                raise DataError(f"{self.name}: key column {name!r} exceeds int64 ({e})") from e
        if pa.types.is_null(array.type):
            array = array.cast(pa.large_string())
        if not pa.types.is_large_string(array.type):
            floating = pa.types.is_floating(array.type)
            hint = f"; whole floats are not guessed to be integers: cast them{_GAPS}"
            raise DataError(
                f"{self.name}: key column {name!r} is {array.type}, "
                f"keys must be integers or strings{hint if floating else ''}"
            )
        array = pc.if_else(pc.equal(array, ""), pa.scalar(None, array.type), array)
        if self.typed:
            return array
        none = pc.or_(pc.equal(array, r"\N"), pc.equal(array, name))  # the header, in the middle
        known = pc.if_else(none, pa.scalar(None, array.type), array)
        if pc.all(pc.match_substring_regex(known, _INTEGER)).as_py():
            return known.cast(pa.int64())
        if (
            known.null_count < len(known)
            and pc.all(pc.match_substring_regex(known, _WHOLE_FLOAT)).as_py()
        ):
            first = known.drop_null()[0].as_py()
            logger.warning(
                "%s: keys in column %r are written %r, and kept so; integers are written without "
                "a point%s", self.name, name, first, _GAPS,
            )  # fmt: skip
        return known


_GAPS = (
    " (pandas makes integers floats where one is missing: frame[column].astype('Int64') keeps them)"
)


def read_source(
    source: TableLike,
    columns: Sequence[str] | None,
    *,
    what: str,
    as_text: Collection[str] = (),
    needed: Sequence[str] = (),
    checked: Collection[str] = (),
    numbers: Collection[str] = (),
    form: TextForm | None = None,
    skip: bool = False,
) -> Source:
    """Reads a table.

    Args:
        source: A file (CSV, JSON lines or Parquet, gzip or zstd around text); a folder of such
            files of one kind (for Parquet also with `key=value` folders), read in the order of
            their names; a sequence of files and folders; or a table in memory, see `as_arrow`.
        columns: Those to read; None for all.
        what: "interactions" or "items", for messages.
        as_text, needed, checked, numbers: See `userip_fast.data.textfiles.Wanted`.
        form: How text files are written.
        skip: Whether rows of text files that are none are left out, and `lost`, or refused.

    Raises:
        DataError: The file is missing, of an unknown kind, empty or unreadable, or lacks a column.
    """
    if not is_path(source):
        name = f"the {what} table"
        table = as_arrow(source, columns, name, frozenset(checked) | frozenset(numbers))
        return validated(Source(name, table, (Part(name, 0, 1),), True))
    wanted = Wanted(
        None if columns is None else tuple(columns),
        tuple(columns or needed),
        frozenset(as_text),
        frozenset(checked),
        frozenset(numbers),
    )
    files = list_files(source, what)
    tables: list[pa.Table] = []
    parts: list[Part] = []
    lost: list[Lost] = []
    found: dict[str, None] = {}
    rows = 0
    for file in files:
        try:
            read = _read_file(file, wanted, form or TextForm())
        except (UnreadableError, pa.ArrowException, OSError, UnicodeError) as e:
            raise DataError(f"{what}: {file.path} cannot be read: {e}") from e
        if read.lost and not skip:
            raise _refused(what, read.lost)
        name = str(file.path)
        parts.append(Part(name, rows, 1))
        if read.rows is not None and len(read.rows):
            starts = [0, *(np.flatnonzero(np.diff(read.rows) != 1) + 1).tolist()]
            parts[-1:] = [Part(name, rows + at, int(read.rows[at])) for at in starts]
        if read.lost:
            read.lost.before = rows
            lost.append(read.lost)
        found.update(dict.fromkeys(read.found))
        rows += read.table.num_rows
        tables.append(read.table)
    for said in found:
        logger.warning("%s: %s", name_of(source), said)
    tables = _of_one_kind(tables, wanted.checked)
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as e:
        raise DataError(f"{what}: the files in {name_of(source)} do not fit together: {e}") from e
    typed = files[0].kind != "csv"
    return validated(Source(name_of(source), table, tuple(parts), typed, tuple(lost)))


def _refused(what: str, lost: Lost) -> DataError:
    first = min(lost.examples, key=lambda row: row.row)
    column = f", column {first.column!r}" if first.column else ""
    hint = "correct it "
    if "UTF-8" in first.rule:
        hint = "name its encoding, for example encoding='latin-1' (--encoding latin-1), "
    return DataError(
        f"{what}: {lost.file} cannot be read: row {first.row}{column}: {first.rule} "
        f"({first.value}), of {len(lost):,} such row(s); {hint}or drop them with "
        'on_bad="skip" (--on-bad skip)'
    )


def _of_one_kind(tables: list[pa.Table], columns: Collection[str]) -> list[pa.Table]:
    """Columns that are text in some tables, for the sake of a bad value, made text in all."""
    for name in columns:
        kinds = [table.schema.field(name).type for table in tables]
        if len(set(kinds)) > 1 and any(map(is_text, kinds)):
            tables = [
                table.set_column(
                    table.column_names.index(name), name, table[name].cast(pa.large_string())
                )
                for table in tables
            ]
    return tables


def validated(source: Source) -> Source:
    """Refuses text that is not UTF-8, which only CSV and JSON readers check.

    Text as views, of which Arrow takes no rows, becomes plain text.
    """
    table = source.table
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as e:
        raise DataError(f"{source.name}: holds invalid values ({e})") from e
    plain = [
        pa.field(f.name, pa.large_string()) if pa.types.is_string_view(f.type) else f
        for f in table.schema
    ]
    if plain != list(table.schema):
        source = replace(source, table=table.cast(pa.schema(plain)))
    return source


def _read_file(file: File, wanted: Wanted, form: TextForm) -> TextTable:
    if file.kind == "parquet":
        if packing(file.path) is not None:
            raise UnreadableError("Parquet is compressed inside; unpack the file")
        return TextTable(_read_parquet(file, wanted.columns), None, Lost(str(file.path)), ())
    if file.kind == "json":
        read = read_json(file.path, wanted, form)
    else:
        read = read_csv(file.path, wanted, form, file.sep)
    if file.sniffed:
        said = "read as JSON lines" if file.kind == "json" else "read as CSV"
        read = replace(read, found=(said, *read.found))
    return read


_LARGE, _EXPANSION = 1 << 30, 1000


def check_expansion(file: Path, columns: Sequence[str] | None, batch_rows: int | None) -> None:
    """Refuses a Parquet file that is small and stands for very much, before it is decoded.

    A value that is written once, in a dictionary, may stand in any number of rows. What the columns
    can decode to at most must be below 1 GiB, or below 1,000 times the file's size; of a file that
    is read in batches, a batch must be below 1 GiB.

    Args:
        file: Of a log or of items.
        columns: Those that are read; None for all.
        batch_rows: Rows that are decoded at once; None for all.

    Raises:
        DataError: It is beyond that.
    """
    import pyarrow.parquet as pq

    about = pq.ParquetFile(file)
    text = [
        f.name
        for f in about.schema_arrow
        if (columns is None or f.name in columns)
        and (
            pa.types.is_string(f.type)
            or pa.types.is_large_string(f.type)
            or pa.types.is_dictionary(f.type)
        )
    ]
    opened = pq.ParquetFile(file, read_dictionary=text)
    total = 0
    for group in range(about.metadata.num_row_groups):
        rows = min(about.metadata.row_group(group).num_rows, batch_rows or 1 << 62)
        width = 8 * len(about.schema_arrow if columns is None else columns)
        if text:  # one row of it brings the dictionaries
            one = next(opened.iter_batches(1, [group], text, use_threads=False), None)
            for column in () if one is None else one.columns:
                values = column.dictionary if pa.types.is_dictionary(column.type) else column
                if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                    width += pc.max(pc.binary_length(values)).as_py() or 0
        total = max(total, rows * width) if batch_rows else total + rows * width
    if total > _LARGE and (batch_rows or total > _EXPANSION * file.stat().st_size):
        what = f"a batch of {batch_rows:,} rows" if batch_rows else "its columns"
        hint = "" if batch_rows else ", or stream it (--stream)"
        raise DataError(
            f"{file} has {file.stat().st_size:,} bytes, of which {what} may decode to "
            f"{total / _LARGE:,.1f} GiB, beyond what is read; shorten its values{hint}"
        )


def _read_parquet(file: File, columns: Sequence[str] | None) -> pa.Table:
    data = ds.dataset(str(file.path), partitioning="hive", partition_base_dir=str(file.root))
    refuse_columns(columns, data.schema.names, file.path)
    check_expansion(file.path, columns, None)
    return data.to_table(columns=None if columns is None else list(columns))

"""Tables from CSV, Parquet and JSON lines, with every row traceable to its file."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.json as pajson

from userip_fast.data.arrow import combine
from userip_fast.errors import DataError

_BLOCK = 16 << 20  # bytes; a JSON row may not be longer, and CSV types are guessed from one block

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # what prints back as it was written, and fits int64

TableLike: TypeAlias = "str | os.PathLike[str] | pa.Table"


@dataclass(frozen=True)
class Source:
    """A table and the files its rows came from.

    Attributes:
        name: What to call it in messages.
        table: All rows, the wanted columns.
        parts: (file, its first row in `table`) in order.
        typed: Whether the file itself says what type a column has; in CSV it is a guess.
    """

    name: str
    table: pa.Table
    parts: tuple[tuple[str, int], ...]
    typed: bool

    def where(self, row: int) -> tuple[str, int]:
        """File and 1-based data row of a row of `table`."""
        at = bisect_right(self.parts, row, key=lambda part: part[1]) - 1
        file, first = self.parts[at]
        return file, row - first + 1

    def require(self, *columns: str) -> None:
        """Raises a DataError that names a column which is not there, and those that are."""
        refuse_columns(columns, self.table.column_names, self.name)

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
            hint = "; whole floats are not guessed to be integers: cast them" if floating else ""
            raise DataError(
                f"{self.name}: key column {name!r} is {array.type}, "
                f"keys must be integers or strings{hint}"
            )
        array = pc.if_else(pc.equal(array, ""), pa.scalar(None, array.type), array)
        if not self.typed and pc.all(pc.match_substring_regex(array, _INTEGER)).as_py():
            return array.cast(pa.int64())
        return array


def read_source(
    source: TableLike,
    columns: Sequence[str] | None,
    *,
    what: str,
    as_text: Collection[str] = (),
) -> Source:
    """Reads a table.

    Args:
        source: An Arrow table; a .csv, .tsv, .parquet, .jsonl or .ndjson file; or a folder of such
            files of one kind (for Parquet also with `key=value` folders), read in the order of
            their names.
        columns: Those to read; None for all.
        what: "interactions" or "items", for messages.
        as_text: Columns that a CSV file is not to guess the type of.

    Raises:
        DataError: The file is missing, of an unknown kind, empty or unreadable, or lacks a column.
    """
    if isinstance(source, pa.Table):
        name = f"the {what} table"
        refuse_columns(columns, source.column_names, name)
        table = source if columns is None else source.select(columns)
        return validated(Source(name, table, ((name, 0),), True))
    path = Path(source)
    files = list_files(path, what)
    reader = _READERS[files[0].suffix.lower()]
    tables, parts, rows = [], [], 0
    for file in files:
        try:
            table = reader(file, path, columns, as_text)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            raise DataError(f"{what}: {file} cannot be read: {e}") from e
        parts.append((str(file), rows))
        rows += table.num_rows
        tables.append(table)
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as e:
        raise DataError(f"{what}: the files in {path} do not fit together: {e}") from e
    return validated(Source(str(path), table, tuple(parts), reader is not _read_csv))


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


def list_files(path: Path, what: str) -> list[Path]:
    """The file, or the files of a folder in the order of their names.

    Raises:
        DataError: See `read_source`.
    """
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(p[0] in "._" for p in file.relative_to(path).parts)
        )
        files = [file for file in files if file.suffix.lower() in _READERS]
        if not files:
            raise DataError(f"{what}: folder {path} holds no file of a known kind ({_KINDS})")
        if len({_READERS[file.suffix.lower()] for file in files}) > 1:
            raise DataError(f"{what}: folder {path} holds files of more than one kind")
        return files
    if not path.exists():
        raise DataError(f"{what}: {path} does not exist")
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{what}: {path} is of an unknown kind; known are {_KINDS}")
    return [path]


def refuse_columns(columns: Sequence[str] | None, names: list[str], name: object) -> None:
    """Raises a DataError where a column of `columns` is not among `names`, or more than once."""
    for column in names if columns is None else columns:
        if column not in names:
            raise DataError(f"{name} has no column {column!r}; it has {names}")
        if names.count(column) > 1:
            raise DataError(f"{name} has more than one column {column!r}")


def _read_csv(
    file: Path, _root: Path, columns: Sequence[str] | None, as_text: Collection[str]
) -> pa.Table:
    read = pacsv.ReadOptions(block_size=_BLOCK)
    parse = pacsv.ParseOptions(
        delimiter="\t" if file.suffix.lower() == ".tsv" else ",", newlines_in_values=True
    )
    with pacsv.open_csv(file, read, parse) as head:
        refuse_columns(columns, head.schema.names, file)
    convert = pacsv.ConvertOptions(
        include_columns=columns, column_types={name: pa.large_string() for name in as_text}
    )
    return pacsv.read_csv(file, read, parse, convert)


def _read_json(
    file: Path, _root: Path, columns: Sequence[str] | None, _as_text: Collection[str]
) -> pa.Table:
    table = pajson.read_json(file, pajson.ReadOptions(block_size=_BLOCK))
    refuse_columns(columns, table.column_names, file)
    return table if columns is None else table.select(columns)


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


def _read_parquet(
    file: Path, root: Path, columns: Sequence[str] | None, _as_text: Collection[str]
) -> pa.Table:
    base = str(root if root.is_dir() else root.parent)
    data = ds.dataset(str(file), partitioning="hive", partition_base_dir=base)
    refuse_columns(columns, data.schema.names, file)
    check_expansion(file, columns, None)
    return data.to_table(columns=columns)


_READERS: dict[str, Callable[[Path, Path, Sequence[str] | None, Collection[str]], pa.Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
}
_KINDS = ", ".join(_READERS)

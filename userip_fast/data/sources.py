"""Tables from files and from memory, with every row traceable to where it came from."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from userip_fast.data.arrow import combine, is_text, to_numpy
from userip_fast.data.textfiles import (
    Lost,
    TextForm,
    TextTable,
    UnreadableError,
    Wanted,
    kind_of,
    packing,
    read_csv,
    read_json,
    refuse_columns,
)
from userip_fast.errors import DataError

logger = logging.getLogger("userip_fast")

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"  # what prints back as it was written, and fits int64
_WHOLE_FLOAT = r"^-?[0-9]+\.0$"

# Anything tabular: paths, and whatever Arrow can read. The libraries behind the latter are no
# dependencies, so their types cannot be named.
TableLike: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Any"


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


def is_path(source: TableLike) -> bool:
    """Whether a table is one of files, or of a sequence of them."""
    if isinstance(source, list | tuple):
        return all(isinstance(entry, str | os.PathLike) for entry in source)
    return isinstance(source, str | os.PathLike)


def name_of(source: TableLike) -> str:
    """What to call files in messages."""
    if isinstance(source, list | tuple):
        return str(source[0]) + (f" and {len(source) - 1} more" if len(source) > 1 else "")
    return str(source)


def as_arrow(
    source: Any, columns: Sequence[str] | None, name: str, by_value: Collection[str] = ()
) -> pa.Table:
    """A table in memory as Arrow's, the wanted columns.

    Args:
        source: Arrow table, batch, reader or data set; a pandas frame; a Hugging Face data set; or
            whatever has Arrow's C stream interface, as frames of polars and relations of DuckDB.
        by_value: Columns of a pandas frame that become text where they mix kinds of values.

    Raises:
        DataError: It is none of these, lacks a column, or cannot be an Arrow table.
    """
    try:
        table = _arrow_of(source, columns, name, by_value)
    except DataError:
        raise
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
        raise DataError(f"{name} cannot be read by Arrow: {' '.join(str(e).split())}") from e
    if table is None:
        raise DataError(
            f"{name} must be files or a table (pandas, polars, DuckDB, Arrow, Hugging Face "
            f"datasets, or anything with __arrow_c_stream__), is {type(source).__name__}"
        )
    refuse_columns(columns, table.column_names, name)
    return table if columns is None else table.select(columns)


def _arrow_of(
    source: Any, columns: Sequence[str] | None, name: str, by_value: Collection[str]
) -> pa.Table | None:
    if isinstance(source, pa.Table):
        return source
    if isinstance(source, pa.RecordBatch):
        return pa.Table.from_batches([source])
    if isinstance(source, ds.Dataset):
        refuse_columns(columns, source.schema.names, name)
        return source.to_table(columns=columns)
    if hasattr(source, "iloc") and hasattr(source, "index"):
        return _arrow_of_pandas(source, columns, name, by_value)
    if type(source).__module__.startswith("polars.") and hasattr(source, "collect"):
        source = source.collect()  # of a lazy frame
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        refuse_columns(columns, list(source.column_names or columns or ()), name)
        rows = source if columns is None else source.select_columns(list(columns))
        return pa.concat_tables(list(rows.with_format("arrow").iter(1 << 16)))
    if hasattr(source, "__arrow_c_stream__"):
        with pa.RecordBatchReader.from_stream(source) as reader:
            refuse_columns(columns, reader.schema.names, name)
            wanted = reader.schema.names if columns is None else list(columns)
            schema = pa.schema([reader.schema.field(column) for column in wanted])
            return pa.Table.from_batches((batch.select(wanted) for batch in reader), schema)
    return None


def _arrow_of_pandas(
    frame: Any, columns: Sequence[str] | None, name: str, by_value: Collection[str]
) -> pa.Table:
    """Column by column: one that is not wanted may hold what Arrow cannot."""
    if set(columns or ()) & set(frame.index.names):
        frame = frame.reset_index()
    names = [str(column) for column in frame.columns]
    refuse_columns(columns, names, name)
    made = {}
    for column in names if columns is None else columns:
        values = frame.iloc[:, names.index(column)]
        try:
            made[column] = pa.Array.from_pandas(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
            if column not in by_value:
                raise DataError(
                    f"{name}: column {column!r} holds values of more than one kind, or such as no "
                    f"table has ({' '.join(str(e).split())})"
                ) from e
            text = [None if missing else str(v) for v, missing in zip(values, values.isna())]
            made[column] = pa.array(text, pa.large_string())
    return pa.table(made)


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


class File(NamedTuple):
    """A file of a table.

    Attributes:
        root: The folder that was named, below which names of folders may hold values; or its own.
        kind: "csv", "json" or "parquet".
        sep: The usual separator of files of its name.
        sniffed: Whether its content told the kind, and not its name.
    """

    path: Path
    root: Path
    kind: str
    sep: str = ","
    sniffed: bool = False


_KINDS = {
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
    ".parquet": ("parquet", ""),
    ".jsonl": ("json", ""),
    ".ndjson": ("json", ""),
    ".json": ("json", ""),
    ".inter": ("csv", "\t"),
    ".item": ("csv", "\t"),
    ".user": ("csv", "\t"),
}
_PACKED = (".gz", ".zst")
_NOT_OF = {"interactions": (".item", ".user"), "items": (".inter", ".user")}  # RecBole's folders
_KNOWN = f"{', '.join(_KINDS)}, text also with {' or '.join(_PACKED)}"


def list_files(source: TableLike, what: str) -> list[File]:
    """The files of a path or a sequence of paths; those of a folder in the order of their names.

    Raises:
        DataError: See `read_source`.
    """
    if isinstance(source, list | tuple):
        if not source:
            raise DataError(f"{what}: names no file")
        files = [file for path in source for file in list_files(path, what)]
    else:
        files = _files_of(Path(str(source)), what)
    if len({file.kind for file in files}) > 1:
        folder = isinstance(source, str | os.PathLike)
        where = f"folder {source}" if folder else name_of(source)
        raise DataError(f"{what}: {where} holds files of more than one kind")
    return files


def _files_of(path: Path, what: str) -> list[File]:
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(p[0] in "._" for p in file.relative_to(path).parts)
        )
        known = {file: suffix for file in found if (suffix := _suffix(file)) in _KINDS}
        known = {f: suffix for f, suffix in known.items() if suffix not in _NOT_OF.get(what, ())}
        if set(known.values()) > {".json"}:  # which only tell of the others, as tools leave them
            known = {file: suffix for file, suffix in known.items() if suffix != ".json"}
        files = [File(file, path, *_KINDS[suffix]) for file, suffix in known.items()]
        if not files:
            raise DataError(f"{what}: folder {path} holds no file of a known kind ({_KNOWN})")
        return files
    if not path.exists():
        raise DataError(f"{what}: {path} does not exist")
    if not path.is_file():  # a file is read more than once, first to see what it is
        raise DataError(f"{what}: {path} is no regular file; write what it gives to one")
    if (suffix := _suffix(path)) in _KINDS:
        return [File(path, path.parent, *_KINDS[suffix])]
    try:
        kind = kind_of(path)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{what}: {path} cannot be read: {e}") from e
    if kind is None:
        raise DataError(f"{what}: {path} is of an unknown kind; known are {_KNOWN}")
    return [File(path, path.parent, kind, sniffed=True)]


def _suffix(path: Path) -> str:
    """What a name says of the kind, whatever the file is packed in."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


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

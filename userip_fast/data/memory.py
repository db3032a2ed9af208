"""Tables in memory as Arrow's, of whatever library they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from userip_fast.core.errors import DataError
from userip_fast.data.textfiles import refuse_columns


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

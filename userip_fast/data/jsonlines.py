"""JSON lines, or one JSON list of objects, by the ways of `userip_fast.data.textfiles`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from userip_fast.core.errors import shown
from userip_fast.data.textfiles import (
    BLOCK,
    Lost,
    TextFile,
    TextForm,
    TextTable,
    UnreadableError,
    Wanted,
    judged,
    refuse_columns,
)


def read_json(path: Path, wanted: Wanted, form: TextForm) -> TextTable:
    """Reads JSON lines, or one JSON list of objects.

    Raises:
        As `read_csv`.
    """
    file = TextFile(path, form)
    if file.head.lstrip()[:1] != "[":
        try:
            table = pajson.read_json(file.open(), pajson.ReadOptions(block_size=BLOCK))
            table.validate(full=True)  # which finds what is not UTF-8
        except pa.ArrowException:
            pass
        else:
            refuse_columns(wanted.columns and wanted.needed, table.column_names, path)
            columns = table.column_names if wanted.columns is None else list(wanted.columns)
            return TextTable(table.select(columns), None, Lost(str(path)), file.found)
    lost = Lost(str(path))
    records: list[dict[str, Any]] = []
    rows: list[int] = []
    for row, (text, value) in enumerate(_json_values(file), 1):
        if isinstance(value, dict):
            records.append(value)
            rows.append(row)
        else:
            lost.add(row, "", "row is not a JSON object", text)
    if not records:
        first = f"; row 1 is {lost.examples[0].value}" if lost else ""
        raise UnreadableError(f"it holds no JSON object{first}")
    names = list(dict.fromkeys(name for record in records for name in record))
    refuse_columns(wanted.columns and wanted.needed, names, path)
    raw = {}
    for name in names if wanted.columns is None else wanted.columns:
        raw[name] = _json_column(name, [r.get(name) for r in records], name in wanted.as_text)
    return TextTable(*judged(pa.table(raw), np.array(rows), lost, wanted), file.found)


def _json_values(file: TextFile) -> Iterator[tuple[str, Any]]:
    """Each row's text and value, None where it is no JSON."""
    with file.open() as stream:
        if file.head.lstrip()[:1] == "[":
            try:
                values = json.loads(stream.read())
            except (ValueError, RecursionError) as e:
                raise UnreadableError(f"it is not JSON ({e})") from e
            yield from ((json.dumps(value), value) for value in values)
            return
        for line in io.BufferedReader(stream):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                yield line.decode("utf-8", "replace").strip(), value


def _json_column(name: str, values: list[Any], is_key_or_text: bool) -> pa.Array:
    """Values as their own type; mixed ones as text."""
    kinds = {type(value): value for value in reversed(values) if value is not None}
    if len(kinds) <= 1 or set(kinds) == {int, float}:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError) as e:
            if is_key_or_text:
                raise UnreadableError(f"column {name!r}: {e}") from e
    elif is_key_or_text:
        examples = " and ".join(shown(value) for value in list(kinds.values())[:2])
        raise UnreadableError(f"column {name!r} holds values of more than one kind, as {examples}")
    text = [v if isinstance(v, str | None) else json.dumps(v) for v in values]
    return pa.array(text, pa.large_string())

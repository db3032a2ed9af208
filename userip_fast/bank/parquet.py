"""The bank as one Parquet or CSV file, for tools that know nothing of banks; and back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from userip_fast.bank.checks import Field, check_fields, check_metadata, split_fields
from userip_fast.bank.layout import FORMAT, VERSION
from userip_fast.core.errors import ConfigError, FormatError
from userip_fast.core.files import atomic_file
from userip_fast.core.keys import hash_keys

if TYPE_CHECKING:
    from userip_fast.bank.feature_bank import FeatureBank

Best = Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[np.float32]]]
"""Of profiles [n, sum of K_j] the users' best items [n, N], keys, and their scores [n, N]: an event
table's answer, asked block by block as a bank is exported. A bank does not keep it: it would be as
large as N items a user, and old with the next item."""
BLOCK = 1 << 16
"""Users that are exported at once."""
_ALL = slice(None)
_SCHEMA_KEY = FORMAT.encode()


def write_parquet(
    bank: FeatureBank, path: str | os.PathLike[str], best: Best | None = None
) -> None:
    """See `FeatureBank.to_parquet`; the file's metadata holds fields, fingerprint and metadata."""
    write_tables(path, tables(bank, best))


def write_tables(path: str | os.PathLike[str], some: Iterable[pa.Table]) -> int:
    """Writes tables, at least one, as a Parquet file, whole or not at all; how many rows."""
    rows = 0
    with atomic_file(path) as tmp:
        writer: pq.ParquetWriter | None = None
        try:
            for table in some:
                writer = writer or pq.ParquetWriter(tmp, table.schema, compression="zstd")
                writer.write_table(table)
                rows += len(table)
        finally:
            if writer is not None:
                writer.close()
    return rows


def write_csv(bank: FeatureBank, path: str | os.PathLike[str], best: Best | None = None) -> None:
    """See `FeatureBank.to_csv`."""
    with atomic_file(path) as tmp:
        writer: pacsv.CSVWriter | None = None
        try:
            for table in map(_flat, tables(bank, best)):
                writer = writer or pacsv.CSVWriter(tmp, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def _flat(table: pa.Table) -> pa.Table:
    """Lists as a column for each place."""
    names: list[str] = []
    columns: list[Any] = []
    for name, column in zip(table.column_names, table.columns):
        if pa.types.is_fixed_size_list(column.type):
            values, n = column.combine_chunks().flatten(), column.type.list_size
            places = np.arange(0, len(values), n)
            names += [f"{name}_{i}" for i in range(n)]
            columns += [values.take(pa.array(places + i)) for i in range(n)]
        else:
            names.append(name)
            columns.append(column)
    if clash := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"fields: the column names {clash} are used twice; rename a field")
    return pa.table(columns, names=names)


def tables(bank: FeatureBank, best: Best | None = None) -> Iterator[pa.Table]:
    """See `FeatureBank.to_arrow`, block by block; at least one. The schema's metadata holds fields,
    fingerprint and metadata."""
    keys, codes = bank.keys(), bank.codes()
    # What it holds: probabilities that are in the profiles are not told twice.
    probabilities = bank.probabilities if bank.info()["probabilities"] else None
    profiles = bank.profiles
    sha256 = _digest(keys, codes, probabilities, profiles)
    about = _about(bank.fields, bank.model_fingerprint, bank.metadata, sha256)
    for a in range(0, max(len(bank), 1), BLOCK):
        rows = slice(a, a + BLOCK)
        columns = {"user_id": keys.slice(a, BLOCK)}
        columns |= code_columns(bank.fields, codes[rows])
        columns |= probability_columns(bank.fields, probabilities, profiles, rows)
        columns |= best_columns(bank, rows, best)
        yield pa.table(columns).replace_schema_metadata(about)


def best_columns(bank: FeatureBank, rows: slice, best: Best | None) -> dict[str, pa.Array]:
    """`top_items` and `top_scores` of a block of users, lists; none without `best`."""
    if best is None:
        return {}
    if clash := {"top_items", "top_scores"} & {field["name"] for field in bank.fields}:
        raise ConfigError(f"fields: {sorted(clash)} are columns of best items; rename the field")
    if (profiles := bank.profiles) is None:
        raise no_profiles(bank.path)
    items, scores = best(profiles[rows].astype(np.float32))
    return {"top_items": lists(items), "top_scores": lists(scores)}


def no_profiles(path: Path) -> ConfigError:
    """What is raised where a bank at `path` is asked for probabilities of all codes, or for what is
    made of them."""
    return ConfigError(
        f"profiles: the bank {path} holds none; fit or infer with profiles=True (--profiles)"
    )


def code_columns(fields: Sequence[Field], codes: NDArray[Any]) -> dict[str, pa.Array]:
    """`FIELD` [n]."""
    columns = (np.ascontiguousarray(k) for k in codes.T)
    return {field["name"]: pa.array(k) for field, k in zip(fields, columns)}


def probability_columns(
    fields: Sequence[Field],
    probabilities: NDArray[np.float32] | None,
    profiles: NDArray[np.float16] | None,
    rows: slice = _ALL,
) -> dict[str, pa.Array]:
    """`FIELD_probability` [n] of the codes, and `FIELD_p`, lists of all codes' [K_j]."""
    columns = {}
    if probabilities is not None:
        for field, p in zip(fields, probabilities[rows].T):
            columns[f"{field['name']}_probability"] = pa.array(np.ascontiguousarray(p))
    if profiles is not None:
        for field, every in zip(fields, split_fields(fields, profiles[rows])):
            columns[f"{field['name']}_p"] = lists(every.astype(np.float32))
    return columns


def lists(values: NDArray[Any]) -> pa.Array:
    """A list for each row of [n, m], m at least 1."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def bank_table(
    keys: pa.Array,
    codes: NDArray[Any],
    profiles: NDArray[np.float16] | None = None,
    *,
    fields: Sequence[Field],
    model_fingerprint: str,
    metadata: Mapping[str, Any],
) -> pa.Table:
    """Users of a bank as a table that `read_parquet` understands once it is written."""
    columns = {"user_id": keys, **code_columns(fields, codes)}
    columns |= probability_columns(fields, None, profiles)
    about = _about(fields, model_fingerprint, metadata, _digest(keys, codes, None, profiles))
    return pa.table(columns).replace_schema_metadata(about)


def _about(
    fields: Sequence[Field], model_fingerprint: str, metadata: Mapping[str, Any], sha256: str
) -> dict[bytes, str]:
    about = {
        "version": VERSION,
        "fields": fields,
        "model_fingerprint": model_fingerprint,
        "metadata": metadata,
        "sha256": sha256,
    }
    return {_SCHEMA_KEY: json.dumps(about)}


def read_parquet(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `FeatureBank.write`, from a file that `write_parquet` wrote.

    Raises:
        FormatError: Not such a file.
    """
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[_SCHEMA_KEY])
        if about["version"] != VERSION:
            raise FormatError(f"{path}: version {about['version']!r}, this release reads {VERSION}")
        names = [field["name"] for field in check_fields(about["fields"])]
        for name in names:
            if not pa.types.is_integer(table[name].type) or table[name].null_count:
                raise FormatError(
                    f"{path}: codes must be integers without nulls, {name!r} is "
                    f"{table[name].type} with {table[name].null_count} nulls"
                )
        codes = [table[name].cast(pa.uint32()).to_numpy() for name in names]
        p_names = [f"{name}_probability" for name in names]
        has_p = p_names[0] in table.column_names
        p = np.stack([table[n].to_numpy() for n in p_names], 1) if has_p else None
        profiles = _profiles(table, about["fields"])
        # Parquet has no checksums of its own; files of before there was one have none here either.
        if (
            about.get(
                "sha256", digest := _digest(table["user_id"], np.stack(codes, 1), p, profiles)
            )
            != digest
        ):
            raise FormatError(f"{path}: altered since it was written (SHA-256 differs)")
        return {
            "user_keys": table["user_id"],
            "code_ids": np.stack(codes, axis=1),
            "fields": about["fields"],
            "model_fingerprint": about["model_fingerprint"],
            "probabilities": p,
            "profiles": profiles,
            "metadata": check_metadata(about["metadata"]),
        }
    except FormatError:
        raise
    except (OSError, pa.ArrowException, LookupError, ArithmeticError, TypeError, ValueError) as e:
        raise FormatError(f"{path}: not a feature bank written by to_parquet ({e!r})") from e


def _profiles(table: pa.Table, fields: Sequence[Field]) -> NDArray[np.float16] | None:
    """[n, sum of K_j] of the lists `FIELD_p`; None where there are none."""
    parts = []
    for field in fields:
        if (name := f"{field['name']}_p") not in table.column_names:
            return None
        kind, size = table[name].type, field["codebook_size"]
        if not pa.types.is_fixed_size_list(kind) or kind.list_size != size:
            return None  # a field of that name
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        parts.append(flat.reshape(-1, size).astype("<f2"))
    return np.concatenate(parts, axis=1)


def _digest(
    keys: Any,
    codes: NDArray[Any],
    p: NDArray[np.float32] | None,
    profiles: NDArray[np.float16] | None,
) -> str:
    digest = hashlib.sha256(hash_keys(keys).tobytes())
    digest.update(codes.astype("<u4").tobytes())
    if p is not None:
        digest.update(p.astype("<f4").tobytes())
    if profiles is not None:
        digest.update(profiles.astype("<f2").tobytes())
    return digest.hexdigest()

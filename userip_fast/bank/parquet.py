"""The bank as one Parquet file, for tools that know nothing of banks; and back."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from userip_fast.bank.layout import FORMAT, VERSION, check_fields, check_metadata
from userip_fast.errors import FormatError, UserIPError
from userip_fast.files import atomic_file

if TYPE_CHECKING:
    from userip_fast.bank.feature_bank import FeatureBank

_SCHEMA_KEY = FORMAT.encode()


def write_parquet(bank: FeatureBank, path: str | os.PathLike[str]) -> None:
    """See `FeatureBank.to_parquet`; the file's metadata holds fields, fingerprint and metadata."""
    columns = {"user_id": bank.keys()}
    for j, field in enumerate(bank.fields):
        columns[field["name"]] = pa.array(np.ascontiguousarray(bank.codes()[:, j]))
    if bank.probabilities is not None:
        for j, field in enumerate(bank.fields):
            p = np.ascontiguousarray(bank.probabilities[:, j])
            columns[f"{field['name']}_probability"] = pa.array(p)
    about = {
        "version": VERSION,
        "fields": bank.fields,
        "model_fingerprint": bank.model_fingerprint,
        "metadata": bank.metadata,
    }
    table = pa.table(columns).replace_schema_metadata({_SCHEMA_KEY: json.dumps(about)})
    with atomic_file(path) as tmp:
        pq.write_table(table, tmp, compression="zstd")


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
        codes = [table[name].to_numpy() for name in names]
        p_names = [f"{name}_probability" for name in names]
        has_p = p_names[0] in table.column_names
        return {
            "user_keys": table["user_id"],
            "code_ids": np.stack(codes, axis=1),
            "fields": about["fields"],
            "model_fingerprint": about["model_fingerprint"],
            "probabilities": np.stack([table[n].to_numpy() for n in p_names], 1) if has_p else None,
            "metadata": check_metadata(about["metadata"]),
        }
    except FormatError:
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, UserIPError) as e:
        raise FormatError(f"{path}: not a feature bank written by to_parquet ({e!r})") from e

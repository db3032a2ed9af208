"""The bank as one Parquet or CSV file, for tools that know nothing of banks; and back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from userip_fast.bank.layout import FORMAT, VERSION, Field, check_fields, check_metadata
from userip_fast.core.errors import FormatError
from userip_fast.core.files import atomic_file
from userip_fast.core.keys import hash_keys

if TYPE_CHECKING:
    from userip_fast.bank.feature_bank import FeatureBank

_SCHEMA_KEY = FORMAT.encode()


def write_parquet(bank: FeatureBank, path: str | os.PathLike[str]) -> None:
    """See `FeatureBank.to_parquet`; the file's metadata holds fields, fingerprint and metadata."""
    with atomic_file(path) as tmp:
        pq.write_table(whole_table(bank), tmp, compression="zstd")


def write_csv(bank: FeatureBank, path: str | os.PathLike[str]) -> None:
    """See `FeatureBank.to_csv`."""
    with atomic_file(path) as tmp:
        pacsv.write_csv(whole_table(bank), tmp)


def whole_table(bank: FeatureBank) -> pa.Table:
    """See `FeatureBank.to_arrow`; the schema's metadata holds fields, fingerprint and metadata."""
    return bank_table(
        bank.keys(),
        bank.codes(),
        bank.probabilities,
        fields=bank.fields,
        model_fingerprint=bank.model_fingerprint,
        metadata=bank.metadata,
    )


def bank_table(
    keys: pa.Array,
    codes: NDArray[Any],
    probabilities: NDArray[np.float32] | None = None,
    *,
    fields: Sequence[Field],
    model_fingerprint: str,
    metadata: Mapping[str, Any],
) -> pa.Table:
    """Users of a bank as a table that `read_parquet` understands once it is written."""
    columns = {"user_id": keys}
    for j, field in enumerate(fields):
        columns[field["name"]] = pa.array(np.ascontiguousarray(codes[:, j]))
    if probabilities is not None:
        for j, field in enumerate(fields):
            p = np.ascontiguousarray(probabilities[:, j])
            columns[f"{field['name']}_probability"] = pa.array(p)
    about = {
        "version": VERSION,
        "fields": fields,
        "model_fingerprint": model_fingerprint,
        "metadata": metadata,
        "sha256": _digest(keys, codes, probabilities),
    }
    return pa.table(columns).replace_schema_metadata({_SCHEMA_KEY: json.dumps(about)})


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
        # Parquet has no checksums of its own; files of before there was one have none here either.
        if (
            about.get("sha256", digest := _digest(table["user_id"], np.stack(codes, 1), p))
            != digest
        ):
            raise FormatError(f"{path}: altered since it was written (SHA-256 differs)")
        return {
            "user_keys": table["user_id"],
            "code_ids": np.stack(codes, axis=1),
            "fields": about["fields"],
            "model_fingerprint": about["model_fingerprint"],
            "probabilities": p,
            "metadata": check_metadata(about["metadata"]),
        }
    except FormatError:
        raise
    except (OSError, pa.ArrowException, LookupError, ArithmeticError, TypeError, ValueError) as e:
        raise FormatError(f"{path}: not a feature bank written by to_parquet ({e!r})") from e


def _digest(keys: Any, codes: NDArray[Any], p: NDArray[np.float32] | None) -> str:
    digest = hashlib.sha256(hash_keys(keys).tobytes())
    digest.update(codes.astype("<u4").tobytes())
    if p is not None:
        digest.update(p.astype("<f4").tobytes())
    return digest.hexdigest()

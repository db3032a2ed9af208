"""The layout that Feast's file source reads: entity key, one int32 column per field, a time in UTC;
probabilities and best items where they are asked for.

    bank.to_feast("codes.parquet")     # then, in the feature repository, see examples/feast

Feast itself is not needed to write it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from userip_fast.bank.parquet import (
    BLOCK,
    Best,
    best_columns,
    probability_columns,
    write_tables,
)
from userip_fast.core.errors import ConfigError

if TYPE_CHECKING:
    from userip_fast.bank.feature_bank import FeatureBank

TIME = "event_timestamp"


def write_feast(
    bank: FeatureBank,
    path: str | os.PathLike[str],
    at: datetime | None = None,
    *,
    probabilities: bool = False,
    best: Best | None = None,
) -> None:
    """See `FeatureBank.to_feast`."""
    at = datetime.now(UTC) if at is None else at
    if at.tzinfo is None:
        raise ConfigError(f"at={at!r}: must have a time zone, for example tzinfo=UTC")
    names = [field["name"] for field in bank.fields]
    if clash := {TIME, "user_id", "model_fingerprint"} & set(names):
        raise ConfigError(
            f"fields: {sorted(clash)} are columns of Feast's layout; rename the field"
        )
    if probabilities and bank.probabilities is None:
        raise ConfigError(
            f"probabilities: the bank {bank.path} has none; infer or fit with profiles=True "
            "(--profiles) or probabilities=True"
        )
    told = (bank.probabilities, bank.profiles) if probabilities else (None, None)
    stamp = pa.scalar(at.astimezone(UTC), pa.timestamp("us", tz="UTC"))

    def block(start: int) -> pa.Table:
        keys, rows = bank.keys().slice(start, BLOCK), slice(start, start + BLOCK)
        columns = {"user_id": keys}
        for j, name in enumerate(names):
            columns[name] = pa.array(bank.codes()[rows, j].astype(np.int32))
        columns |= probability_columns(bank.fields, *told, rows)
        columns |= best_columns(bank, rows, best)
        fingerprint = pa.repeat(bank.model_fingerprint, len(keys)).dictionary_encode()
        return pa.table(
            {**columns, "model_fingerprint": fingerprint, TIME: pa.repeat(stamp, len(keys))}
        )

    write_tables(path, map(block, range(0, max(len(bank), 1), BLOCK)))

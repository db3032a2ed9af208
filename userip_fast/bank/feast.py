"""The layout that Feast's file source reads: entity key, one int32 column per field, a time in UTC.

    bank.to_feast("codes.parquet")     # then, in the feature repository, see examples/feast

Feast itself is not needed to write it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from userip_fast.core.errors import ConfigError
from userip_fast.core.files import atomic_file

if TYPE_CHECKING:
    from userip_fast.bank.feature_bank import FeatureBank

TIME = "event_timestamp"


def write_feast(
    bank: FeatureBank, path: str | os.PathLike[str], at: datetime | None = None
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
    columns = {"user_id": bank.keys()}
    for j, name in enumerate(names):
        columns[name] = pa.array(bank.codes()[:, j].astype(np.int32))
    stamp = pa.scalar(at.astimezone(UTC), pa.timestamp("us", tz="UTC"))
    columns["model_fingerprint"] = pa.repeat(bank.model_fingerprint, len(bank)).dictionary_encode()
    columns[TIME] = pa.repeat(stamp, len(bank))
    with atomic_file(path) as tmp:
        pq.write_table(pa.table(columns), tmp, compression="zstd")

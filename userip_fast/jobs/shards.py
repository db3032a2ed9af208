"""Bulk inference in shards: any scheduler runs them, in any order, as often as it likes.

Shard i of n is the users whose key hash lies in the i-th of n equal parts of the hash space, so it
depends on the keys alone. Each shard is one Parquet file, whole or absent; a shard that is there
and was made by the same model from the same data is not made again. Merged in order they are a
bank.

    userip infer --model RUN/model ... --shard 0/8 --out SHARDS        # ... 7/8, anywhere
    userip bank merge SHARDS BANK
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from userip_fast._version import __version__
from userip_fast.bank import BankWriter, FeatureBank
from userip_fast.bank.parquet import bank_table, read_parquet
from userip_fast.core.errors import ConfigError, DataError, FormatError, MismatchError
from userip_fast.core.files import atomic_file
from userip_fast.data import Data
from userip_fast.model.fitted import Model, all_probabilities
from userip_fast.model.learned import check_probabilities

_NAME = re.compile(r"shard-(\d{5})-of-(\d{5})\.parquet")


def parse_shard(text: str) -> tuple[int, int]:
    """ "3/8" as (3, 8).

    Raises:
        ConfigError: It is not I/N with 0 <= I < N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(match[1]), int(match[2])) if match else (1, 0)
    if index >= count or count > 99_999:
        raise ConfigError(
            f"shard={text!r}: must be I/N with 0 <= I < N <= 99999, for example 0/8 to 7/8"
        )
    return index, count


def hash_range(index: int, count: int) -> tuple[int, int]:
    """Lowest key hash of shard `index` of `count`, and that of the shard after it."""
    low, high = (-(-(i << 32) // count) << 32 for i in (index, index + 1))
    return low, high


def infer_shard(
    model: Model,
    data: Data,
    index: int,
    count: int,
    out: str | Path,
    *,
    on_bad: str | None = None,
    profiles: bool = False,
    show: bool = True,
) -> Path:
    """Infers one shard into `out/shard-IIIII-of-NNNNN.parquet`, unless it is there already.

    Finished blocks wait in `out/shard-... .part`, where the next try finds them.

    Args:
        profiles: Whether to keep the probabilities of all codes; see `Model.infer`. A shard without
            them is made again where they are wanted, and the other way round.

    Returns:
        The file.

    Raises:
        ConfigError, DataError: See `Model.infer`.
        StorageError: `out` cannot be written.
    """
    check_probabilities(model.config, profiles)
    source = model.source(data, on_bad)
    path = Path(out) / f"shard-{index:05d}-of-{count:05d}.parquet"
    about = {"userip_fast": __version__, "shard": [index, count], "data": source.content_key()}
    try:
        done = read_parquet(path)
        same = (done["model_fingerprint"], done["metadata"]) == (model.fingerprint, about)
        if same and (done["profiles"] is not None) == profiles:
            return path
    except FormatError:
        pass  # not there, or damaged
    users = source.users_between(*hash_range(index, count))
    if model.has_table:
        model.event_table(Path(f"{out}.events"))
    cache = model.block_cache(path.with_suffix(".part"))
    codes, keys, at = [], [source.keys_of(users[0], users[0])], users[0]
    every = [np.zeros((0, sum(map(len, model.codebooks))), np.float16)]
    for found in model.infer_blocks(source, users=users, cache=cache, show=show):
        assert found.code_ids is not None
        stop = at + len(found.nll)
        codes.append(found.code_ids.numpy().astype(np.uint32))
        if profiles:
            every.append(all_probabilities(found).astype(np.float16))
        keys.append(source.keys_of(at, stop))
        at = stop
    table = bank_table(
        pa.concat_arrays(keys),
        np.concatenate([np.zeros((0, len(model.codebooks)), np.uint32), *codes]),
        np.concatenate(every) if profiles else None,
        fields=model.bank_fields(),
        model_fingerprint=model.fingerprint,
        metadata=about,
    )
    with atomic_file(path) as tmp:
        pq.write_table(table, tmp, compression="zstd")
    if cache is not None:
        cache.clear()
    return path


def _said(about: dict[str, Any]) -> str:
    """ "3/8" of a shard's metadata; "none" of a file that is no shard."""
    match about.get("shard"):
        case [int(index), int(count)]:
            return f"{index}/{count}"
        case _:
            return "none"


def merge_shards(folder: str | Path, bank: str | Path, update: bool = False) -> FeatureBank:
    """One bank of all shards in `folder`.

    Args:
        update: Users of an existing bank who are in no shard stay as they are.

    Raises:
        DataError: Shards are missing, or there are shards of more than one partition.
        FormatError: A shard is damaged, or was made as another one than its name says.
        MismatchError: Shards were made by different models or from different data.
    """
    folder = Path(folder)
    found = {p: _NAME.fullmatch(p.name) for p in folder.iterdir()} if folder.is_dir() else {}
    shards = {(int(m[1]), int(m[2])): p for p, m in found.items() if m}
    counts = {n for _, n in shards}
    if len(counts) != 1:
        raise DataError(
            f"{folder}: must hold the shards of one partition, holds those of {sorted(counts)}"
        )
    (count,) = counts
    missing = [i for i in range(count) if (i, count) not in shards]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {count} shards are missing: "
            f"{', '.join(f'{i}/{count}' for i in missing[:10])}; infer them first"
        )
    first: dict[str, Any] | None = None
    writer: BankWriter | None = None
    try:
        for index in range(count):
            shard = read_parquet(shards[index, count])
            about = shard["metadata"]
            if about.get("shard") != [index, count]:
                raise FormatError(
                    f"{shards[index, count]}: says that it is shard {_said(about)}; a shard must "
                    "keep its name, so name it as it was, or infer this one"
                )
            if first is None:
                first = shard
                writer = BankWriter(
                    bank,
                    fields=shard["fields"],
                    model_fingerprint=shard["model_fingerprint"],
                    metadata={k: v for k, v in about.items() if k != "shard"},
                    keep_others=update,
                )
            assert writer is not None
            for what, a, b in (
                ("model", shard["model_fingerprint"], first["model_fingerprint"]),
                ("data", about.get("data"), first["metadata"].get("data")),
                ("fields", shard["fields"], first["fields"]),
                ("--profiles", shard["profiles"] is None, first["profiles"] is None),
            ):
                if a != b:
                    raise MismatchError(
                        f"{shards[index, count]}: made with another {what} than shard 0/{count}; "
                        "infer it again"
                    )
            writer.append(shard["user_keys"], shard["code_ids"], profiles=shard["profiles"])
        assert writer is not None
        writer.close()
    finally:
        if writer is not None:
            writer.abandon()
    return FeatureBank.open(bank)

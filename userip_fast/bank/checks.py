"""What users and fields of a bank must be: checked as they come, and again by `verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.core.errors import ConfigError, DataError, shown

_UNEVEN = 1e-3  # that 16 bits may leave of a sum of probabilities

Field = dict[str, Any]
"""`{"name": str, "codebook_size": int, "code_names": [str, ...] | None}`"""


def check_fields(fields: Any) -> list[Field]:
    """The fields, a sequence of mappings, as plain dicts.

    Raises:
        ConfigError: None at all or something else, a size or a list of names that does not fit, a
            name used twice.
    """
    if not fields:
        raise ConfigError("fields: a bank has at least one profile field, got none")
    if isinstance(fields, str) or not isinstance(fields, Sequence):
        raise ConfigError(f"fields: must be a list of mappings, is {shown(fields)}")
    checked: list[Field] = []
    for j, field in enumerate(fields):
        if not isinstance(field, Mapping):
            raise ConfigError(f"fields[{j}]: must be a mapping, is {shown(field)}")
        unknown = set(field) - {"name", "codebook_size", "code_names"}
        name, size = field.get("name"), field.get("codebook_size")
        names = field.get("code_names")
        if unknown:
            raise ConfigError(f"fields[{j}]: unknown entries {sorted(unknown)}")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"fields[{j}]: name must be a text that is not empty, got {name!r}")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**32:
            raise ConfigError(f"field {name!r}: codebook_size must be 1 .. 2**32 - 1, got {size!r}")
        if names is not None:
            if not isinstance(names, Sequence):
                raise ConfigError(f"field {name!r}: code_names must be a list, is {shown(names)}")
            names = list(names)
            if len(names) != size or not all(isinstance(n, str) for n in names):
                raise ConfigError(
                    f"field {name!r}: code_names must be {size} texts, one per code, "
                    f"got {len(names)}: {names[:3]!r}"
                )
        checked.append({"name": name, "codebook_size": size, "code_names": names})
    _check_columns(checked, "", "_probability")
    return checked


def _check_columns(fields: Sequence[Field], *ends: str) -> None:
    """Whether the columns of a Parquet file, named like the fields with these ends, differ."""
    columns = ["user_id", *(f"{field['name']}{end}" for field in fields for end in ends)]
    clash = sorted({c for c in columns if columns.count(c) > 1})
    if clash:
        raise ConfigError(f"fields: the column names {clash} are used twice; rename a field")


def code_dtype(fields: Sequence[Field]) -> np.dtype[Any]:
    """Smallest unsigned type that holds 0 .. K_j (K_j: unknown user) of every field."""
    return np.min_scalar_type(max(field["codebook_size"] for field in fields)).newbyteorder("<")


def check_codes(fields: Sequence[Field], keys: pa.Array, code_ids: Any) -> NDArray[Any]:
    """`code_ids` as a new [n, J] array of `code_dtype`.

    Raises:
        DataError: Wrong shape or dtype, or a code outside 0 .. K_j - 1.
    """
    codes = np.asarray(code_ids)
    shape = (len(keys), len(fields))
    if codes.shape != shape:
        raise DataError(f"code_ids: must be [users, fields] = {shape}, got {codes.shape}")
    if codes.dtype.kind not in "iu":
        raise DataError(f"code_ids: must be integers, got {codes.dtype}")
    sizes = np.array([field["codebook_size"] for field in fields])
    bad = (codes < 0) | (codes >= sizes)
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise DataError(
            f"code_ids: user {keys[int(i)].as_py()!r} has code {codes[i, j]} in field "
            f"{fields[j]['name']!r}, which has codes 0 .. {sizes[j] - 1} ({bad.sum()} such values)"
        )
    return codes.astype(code_dtype(fields))


def check_probabilities(shape: tuple[int, int], probabilities: Any) -> NDArray[np.float32]:
    """`probabilities` as a new float32 array of `shape`.

    Raises:
        DataError: Wrong shape, or a value that is not within 0 .. 1.
    """
    p = np.array(probabilities, dtype="<f4")
    if p.shape != shape:
        raise DataError(f"probabilities: must be [users, fields] = {shape}, got {p.shape}")
    bad = ~((p >= 0) & (p <= 1))
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise DataError(f"probabilities: must be within 0 .. 1, [{i}, {j}] is {p[i, j]}")
    return p


def check_profiles(fields: Sequence[Field], users: int, profiles: Any) -> NDArray[np.float16]:
    """`profiles` as a new float16 array [users, sum of K_j].

    Raises:
        ConfigError: Fields whose names clash with their columns in a Parquet file.
        DataError: Wrong shape, a value that is not within 0 .. 1, or a field's values that do not
            add up to one.
    """
    _check_columns(fields, "", "_probability", "_p")
    sizes = [field["codebook_size"] for field in fields]
    p = np.asarray(profiles)
    if p.shape != (users, sum(sizes)):
        raise DataError(
            f"profiles: must be [users, sum of codebook sizes] = {(users, sum(sizes))}, got "
            f"{p.shape}"
        )
    if (bad := ~((p >= 0) & (p <= 1))).any():
        i, k = np.argwhere(bad)[0]
        raise DataError(f"profiles: must be within 0 .. 1, [{i}, {k}] is {p[i, k]}")
    kept = p.astype("<f2")
    for field, part in zip(fields, split_fields(fields, kept)):
        total = part.sum(1, dtype=np.float64)
        if (bad := np.abs(total - 1) > _UNEVEN).any():
            raise DataError(
                f"profiles: those of field {field['name']!r} must add up to 1, row "
                f"{int(bad.argmax())} adds up to {total[bad][0]:.6g}"
            )
    return kept


def split_fields(fields: Sequence[Field], profiles: NDArray[Any]) -> list[NDArray[Any]]:
    """Per field [n, K_j] of profiles [n, sum of K_j]."""
    ends = np.cumsum([field["codebook_size"] for field in fields])
    return np.split(profiles, ends[:-1], axis=1)


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """`metadata` as it will be read back.

    Raises:
        ConfigError: It is not a mapping of JSON values.
    """
    try:
        checked = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as e:
        raise ConfigError(f"metadata: must be a mapping of JSON values ({e})") from e
    assert isinstance(checked, dict)
    return checked

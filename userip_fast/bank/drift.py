"""How far two banks of the same fields are apart: what a new log, or a new codebook, has moved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from userip_fast.core.errors import MismatchError

if TYPE_CHECKING:
    from userip_fast.bank.feature_bank import FeatureBank

_CHUNK = 1 << 20
_MOVES = 5


def drift(old: FeatureBank, new: FeatureBank) -> dict[str, Any]:
    """A drift report, as JSON values.

    `psi` is the population stability index of a field's code shares, the sum over codes of
    (new - old) ln(new / old) with half a user added to every code; by custom below 0.1 is stable,
    and above 0.25 has shifted. `changed` is among users of both banks. With two models the numbers
    mean the same only where the codebooks were fitted one like the other (`userip fit --like`).

    Raises:
        MismatchError: The banks have other fields, codebook sizes or key types.
    """
    shapes = [[(f["name"], f["codebook_size"]) for f in bank.fields] for bank in (old, new)]
    if shapes[0] != shapes[1]:
        raise MismatchError(f"the banks have other fields: {shapes[0]} and {shapes[1]}")
    if len(old) and len(new) and old.key_type != new.key_type:
        raise MismatchError(f"the banks have {old.key_type} and {new.key_type} keys")
    sizes = [size for _, size in shapes[0]]
    moves = [np.zeros((k, k), np.int64) for k in sizes]
    both = 0
    for start in range(0, len(new) if len(old) else 0, _CHUNK):
        rows = old.rows(new.keys().slice(start, _CHUNK))
        known = rows >= 0
        both += int(known.sum())
        before = old.codes()[rows[known]].astype(np.int64)
        after = new.codes()[start : start + _CHUNK][known].astype(np.int64)
        for j, k in enumerate(sizes):
            pairs = np.bincount(before[:, j] * k + after[:, j], minlength=k * k)
            moves[j] += pairs.reshape(k, k)
    fields = {}
    for j, (name, k) in enumerate(shapes[0]):
        counts = [np.bincount(b.codes()[:, j], minlength=k)[:k] for b in (old, new)]
        moved = moves[j].copy()
        np.fill_diagonal(moved, 0)
        top = [i for i in np.argsort(-moved.ravel(), kind="stable")[:_MOVES] if moved.flat[i]]
        fields[name] = {
            "psi": _psi(*counts),
            "changed": int(moved.sum()) / max(both, 1),
            "users_old": counts[0].tolist(),
            "users_new": counts[1].tolist(),
            "moves": [[int(i // k), int(i % k), int(moved.flat[i])] for i in top],
        }
    return {
        "same_model": old.model_fingerprint == new.model_fingerprint,
        "users": {"old": len(old), "new": len(new), "both": both},
        "fields": fields,
    }


def _psi(old: NDArray[np.int64], new: NDArray[np.int64]) -> float:
    a, b = ((x + 0.5) / (x.sum() + 0.5 * len(x)) for x in (old, new))
    return math.fsum(((b - a) * np.log(b / a)).tolist())

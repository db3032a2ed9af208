"""What codes are, beside what they give: spread, generosity, attributes, and how sure they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from userip_fast.ctr.protocols import Task
from userip_fast.ctr.vectors import Float64
from userip_fast.data.attributes import Attribute
from userip_fast.prompts.packing import Int64

_PERMUTATIONS = 20


def describe_codes(
    task: Task,
    codes: Int64,
    sizes: list[int],
    generosity: Float64,
    attributes: list[Attribute],
    probabilities: NDArray[np.float32] | None,
    again: Int64 | None,
) -> dict[str, Any]:
    """Measures of the codes of the test rows' view.

    Args:
        codes: [U, J] of the task's users; K_j where there is none.
        sizes: K_j.
        generosity: [U] mean excess of the profile's ratings over the items' own; of choices the
            mean log popularity.
        probabilities: [U, sum of K_j], or None.
        again: [U, J] codes of the same users by other events of theirs, -1 where there are none.

    Returns:
        Per field in lists: `perplexity`, `dead` codes, share of users in the `largest`,
        `generosity_share` (eta squared of `generosity` over codes); `bits`: attribute -> per field
        `shared` between code and attribute of later events of label 1, in bits per event, and
        `permuted`, the mean of the same with users exchanged. With probabilities,
        `largest_probability`, their mean; with `again`, `same_again`, the share of users whose
        code is the same by their other events: where probabilities tell the truth it is about as
        large.
    """
    random = np.random.default_rng(0)
    fields = range(len(sizes))
    known = np.all(codes < np.array(sizes), axis=1)
    counts = [np.bincount(codes[known, j], minlength=k)[:k] for j, k in enumerate(sizes)]
    out: dict[str, Any] = {
        "users": int(known.sum()),
        "perplexity": [_perplexity(c) for c in counts],
        "dead": [int((c == 0).sum()) for c in counts],
        "largest": [float(c.max() / max(c.sum(), 1)) for c in counts],
        "generosity_share": [_eta_squared(codes[known, j], generosity[known]) for j in fields],
        "bits": {},
    }
    rows = [task.train, task.valid, task.test]
    label, kind, user, item = (
        np.concatenate([getattr(r, f) for r in rows]) for f in ("label", "kind", "user", "item")
    )
    later = (label == 1) & (kind == 0) & known[user]
    for a in attributes:
        value = a.values[item[later]]
        who = np.repeat(user[later], value.shape[1])[value.ravel() > 0]
        value = value.ravel()[value.ravel() > 0]
        users = np.unique(who)
        found: dict[str, list[float]] = {"shared": [], "permuted": []}
        for j, k in enumerate(sizes):
            found["shared"].append(_bits(codes[who, j], value, k, a.size))
            permuted = []
            for _ in range(_PERMUTATIONS):
                other = codes[:, j].copy()
                other[users] = random.permutation(other[users])
                permuted.append(_bits(other[who], value, k, a.size))
            found["permuted"].append(float(np.mean(permuted)))
        out["bits"][a.name] = found
    if probabilities is not None:
        ends = np.cumsum(sizes)
        parts = [probabilities[known, e - k : e] for e, k in zip(ends, sizes)]
        out["largest_probability"] = [float(p.max(1).mean()) for p in parts]
    if again is not None and (there := known & np.all(again >= 0, axis=1)).any():
        out["same_again"] = [float((codes[there, j] == again[there, j]).mean()) for j in fields]
        out["same_again_users"] = int(there.sum())
    return out


def _perplexity(counts: Int64) -> float:
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(p * np.log(p)).sum()))


def _eta_squared(code: Int64, x: Float64) -> float:
    """Share of the variance of x that lies between codes."""
    if not len(x) or x.var() == 0:
        return 0.0
    n = np.bincount(code)
    mean = np.bincount(code, x) / np.maximum(n, 1)
    return float((n * (mean - x.mean()) ** 2).sum() / (len(x) * x.var()))


def _bits(code: Int64, value: Int64, codes: int, values: int) -> float:
    """Mutual information of code and value."""
    if not len(code):
        return 0.0
    p = np.bincount(code * values + value, minlength=codes * values).reshape(codes, values)
    p = p / p.sum()
    free = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    there = p > 0
    return float((p[there] * np.log2(p[there] / free[there])).sum())

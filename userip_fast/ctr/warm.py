"""Codes of warm users: left out unless held-out rows show that they help.

A recommender that has learned from twenty rows of a user's own, and knows his statistics and id,
has little to gain from a code, and columns that tell nothing cost a little. So users with
`warm_rows` training rows or more are scored by the recommender that has no codes, unless the one
with codes is better on training rows of such users: the 95 % interval of the difference in AUC,
users and seeds resampled, lies above 0. Each of these rows is scored by a recommender that was
trained without it, four times three quarters of them and all rows of others; no test row is looked
at.

Whoever owns a recommender can decide the same way: train it with and without codes, keep scores of
rows of such users that it was not trained on, and ask `judge_codes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userip_fast.core.errors import DataError
from userip_fast.ctr.config import CTRConfig
from userip_fast.ctr.protocols import Task
from userip_fast.ctr.statistics import Bootstrap, auc, paired
from userip_fast.prompts.packing import Int64

RULE = "interval above 0"
"""When codes of warm users are kept."""
CODED = ("ids", "ids_prob")
"""Features that are left out of warm users' scores where they do not help."""
_PARTS = 4

Scores = Sequence[NDArray[np.float32]]


def judge_codes(
    label: NDArray[np.floating[Any]],
    user: NDArray[np.integer[Any]],
    without: Scores,
    coded: Scores,
    *,
    resamplings: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether users who have rows of their own keep their codes.

    Args:
        label: [N] 0 or 1, of rows of such users that no recommender was trained on.
        user: [N] whose rows they are.
        without, coded: [N] scores of the same recommender without codes and with them, one for each
            seed of its training.
        resamplings: Of users and seeds, for the interval.
        seed: Of the resampling.

    Returns:
        `keep`: whether the interval of the difference lies above 0; `difference`, `ci95` and `p` of
        AUC with codes less that without, None where the rows have one label alone (then codes are
        not kept: nothing shows that they help); `rows` and `users`.

    Raises:
        DataError: Scores are not one for each row, or there are not as many with codes as without.
    """
    label = np.asarray(label, np.float32)
    lengths = {len(label), len(user), *(len(x) for x in (*without, *coded))}
    if len(lengths) > 1 or len(without) != len(coded) or not without:
        raise DataError(
            "judge_codes: label, user and every score must have a value for each row, and there "
            f"must be as many scores with codes as without; got lengths {sorted(lengths)}, "
            f"{len(without)} and {len(coded)} scores"
        )
    about = {"rows": len(label), "users": len(np.unique(user))}
    if not len(label) or label.min() == label.max():
        return {"keep": False, "difference": None, "ci95": None, "p": None, **about}
    found = compare(label, user, without, coded, resamplings, seed)
    return {"keep": found["ci95"][0] > 0, **found, **about}


def compare(
    label: NDArray[np.float32],
    user: NDArray[np.integer[Any]],
    without: Scores,
    coded: Scores,
    resamplings: int,
    seed: int = 0,
) -> dict[str, Any]:
    """`difference`, `ci95` and `p` of AUC with codes less that without; see `judge_codes`."""
    draw = Bootstrap.draw(np.asarray(user, np.int64), len(without), resamplings, seed)
    ours, theirs = (np.mean([auc(label, x)[0] for x in own]) for own in (coded, without))
    both = (draw.auc(label, list(own)) for own in (coded, without))
    return paired(next(both), next(both), float(ours - theirs))


def warm_rows(task: Task, ctr: CTRConfig) -> NDArray[np.bool_]:
    """[N] training rows of users who have `ctr.warm_rows` or more."""
    rows = np.zeros(task.data.num_users, np.int64)
    rows[task.data.user_index(task.pool.user_keys)] = task.pool.history_lengths
    return np.asarray(rows[task.train.user] >= ctr.warm_rows)


def held_out_parts(task: Task, ctr: CTRConfig) -> Iterator[tuple[Int64, Int64]]:
    """(training rows to train on, training rows to score) so that each of `warm_rows` is scored
    once, by what was trained without it."""
    warm = np.flatnonzero(warm_rows(task, ctr))
    part = np.random.default_rng(ctr.split_seed + 29).integers(0, _PARTS, len(warm))
    for p in range(_PARTS):
        if len(out := warm[part == p]):
            yield np.setdiff1d(np.arange(len(task.train)), out), out


def leave_out(
    task: Task,
    ctr: CTRConfig,
    scores: dict[str, dict[str, list[NDArray[np.float32]]]],
    judging: Mapping[str, Mapping[str, Scores]],
) -> dict[str, dict[str, Any]] | None:
    """Puts the scores without codes in the place of those with codes where held-out rows do not
    show that they help: these are then such users' scores.

    Args:
        scores: Feature -> backbone -> of each seed [test rows]; changed in place.
        judging: The same of `warm_rows`, each held out.

    Returns:
        By feature and backbone `rows_from`, the training rows from which a user is warm;
        `left_out`; `held_out`, see `judge_codes`; and `kept_in`, the difference on test rows if
        codes had stayed, which decides nothing. None for other protocols, or without `none`.
    """
    if ctr.protocol != "warm" or "none" not in scores:
        return None
    test, judge = task.test, task.train.take(warm_rows(task, ctr))
    counts = test.kind == 0
    out: dict[str, dict[str, Any]] = {}
    for feature in (f for f in CODED if f in scores):
        for backbone, own in scores[feature].items():
            plain = scores["none"][backbone]
            found = judge_codes(
                judge.label,
                judge.user,
                judging["none"][backbone],
                judging[feature][backbone],
                resamplings=ctr.bootstrap,
            )
            kept_in = compare(
                test.label[counts],
                test.user[counts],
                [s[counts] for s in plain],
                [s[counts] for s in own],
                ctr.bootstrap,
            )
            if left_out := not found.pop("keep"):
                scores[feature][backbone] = plain
            out.setdefault(feature, {})[backbone] = {
                "rows_from": ctr.warm_rows,
                "left_out": left_out,
                "held_out": found,
                "kept_in": kept_in,
            }
    return out

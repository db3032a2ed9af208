"""What scores are put beside: rows that stand apart, and features against one another, paired."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from userip_fast.ctr.config import CLUSTERS, CTRConfig
from userip_fast.ctr.protocols import MATCHED, REPEAT, Task
from userip_fast.ctr.statistics import Bootstrap, auc, paired

Scores = list[NDArray[np.float32]]
"""Of each seed [test rows]."""


def slices(task: Task, scores: Scores, seen: NDArray[np.bool_]) -> dict[str, dict[str, Any] | None]:
    """AUC of some test rows apart, mean over seeds; None where they have one label alone.

    `unseen`: items never met in training. Of choices also `repeats`: positives that the profile
    holds already, against the sampled items of all; `matched`: negatives as popular as the
    positive.
    """
    test = task.test
    counts = test.kind == 0
    masks = {"unseen": counts & ~seen}
    if task.choices:
        masks["repeats"] = (test.kind == REPEAT) | (counts & (test.label == 0))
        masks["matched"] = (test.kind == MATCHED) | (counts & (test.label == 1))
    out: dict[str, dict[str, Any] | None] = {}
    for name, mask in masks.items():
        label = test.label[mask]
        if not len(label) or label.min() == label.max():
            out[name] = None
            continue
        areas = [float(auc(label, s[mask])[0]) for s in scores]
        out[name] = {"mean": float(np.mean(areas)), "rows": int(mask.sum()),
                     "positives": int(label.sum())}  # fmt: skip
    return out


def unseen_pairs(
    task: Task, scores: dict[str, dict[str, Scores]], unseen: NDArray[np.bool_], ctr: CTRConfig
) -> dict[str, dict[str, Any]]:
    """By backbone, on rows of items never met in training: what the LM says of an item against what
    others say of it, and `all+ids` against `all`."""
    mask = unseen & (task.test.kind == 0)
    label, out = task.test.label[mask], {}
    if not len(label) or label.min() == label.max():
        return {}
    draw = Bootstrap.draw(task.test.user[mask], ctr.seeds, ctr.bootstrap)
    others = ("none", "text", "kmeans_attributes", "mixture", "mixture_words", "foldin")
    pairs = [(ours, f) for ours in ("affinity", "theta") for f in others]
    for b in ctr.backbones:
        own = {f: [s[mask] for s in by[b]] for f, by in scores.items() if b in by}
        asked = [p for p in [*pairs, ("all+ids", "all")] if p[0] in own and p[1] in own]
        resampled = {f: draw.auc(label, own[f]) for f in {f for p in asked for f in p}}
        mean = {f: np.mean([float(auc(label, s)[0]) for s in own[f]]) for f in resampled}
        out[b] = {
            f"{x} - {y}": paired(resampled[x], resampled[y], float(mean[x] - mean[y]))
            for x, y in asked
        }
    return out


def comparisons(
    resampled: dict[str, dict[str, Any]], mean: dict[str, dict[str, float]], ctr: CTRConfig
) -> dict[str, Any]:
    """By backbone: the IDs against every feature it reads, `best_cluster` the best of equal
    capacity; and `all+ids` against `all`."""
    out: dict[str, Any] = {}
    for b in ctr.backbones:
        found: dict[str, Any] = {}
        if "ids" in mean:
            clusters = [f for f in CLUSTERS if f in mean]
            found["best_cluster"] = max(clusters, key=lambda f: mean[f][b], default=None)
            found["against"] = {
                f: paired(resampled["ids"][b], resampled[f][b], mean["ids"][b] - mean[f][b])
                for f in mean
                if f != "ids" and b in mean[f]
            }
        for ours, theirs in (
            ("all+ids", "all"),
            ("ids_prob", "none"),
            *((f, g) for f in ("affinity", "ids_affinity") for g in ("mixture", "mixture_words")),
            ("all", "none"),
        ):
            if ours in mean and theirs in mean:
                difference = mean[ours][b] - mean[theirs][b]
                found[f"{ours} - {theirs}"] = paired(
                    resampled[ours][b], resampled[theirs][b], difference
                )
        if found:
            out[b] = found
    return out

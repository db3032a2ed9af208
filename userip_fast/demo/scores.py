"""How well two labellings of the same users agree."""

from __future__ import annotations

import numpy as np

from userip_fast.prompts.packing import Int64


def _table(a: Int64, b: Int64) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """[A, B] users by both labels."""
    _, i = np.unique(a, return_inverse=True)
    _, j = np.unique(b, return_inverse=True)
    table = np.zeros((i.max() + 1, j.max() + 1))
    np.add.at(table, (i, j), 1)
    return table


def normalized_mutual_information(a: Int64, b: Int64) -> float:
    """Mutual information over the mean of both entropies; 1 where there is none to be had.

    Args:
        a, b: [U] labels.
    """
    p = _table(a, b) / len(a)
    rows, columns = p.sum(1), p.sum(0)
    there = p > 0
    shared = (p[there] * np.log(p[there] / np.outer(rows, columns)[there])).sum()
    most = -(rows * np.log(rows)).sum() / 2 - (columns * np.log(columns)).sum() / 2
    return float(max(shared, 0.0) / most) if most > 0 else 1.0


def adjusted_rand_index(a: Int64, b: Int64) -> float:
    """Share of pairs of users that both labellings put together or apart, above chance; 1 at best.
    Source: Hubert and Arabie, "Comparing partitions", 1985.

    Args:
        a, b: [U] labels.
    """
    table = _table(a, b)
    both, of_a, of_b = (_pairs(x) for x in (table, table.sum(1), table.sum(0)))
    expected = of_a * of_b / max(_pairs(np.asarray([len(a)])), 1)
    most = (of_a + of_b) / 2
    return float((both - expected) / (most - expected)) if most != expected else 1.0


def _pairs(counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    return float((counts * (counts - 1) / 2).sum())

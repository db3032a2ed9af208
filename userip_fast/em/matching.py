"""Which code of one run is which code of another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.prompts.packing import Int64


def assignment(cost: npt.NDArray[np.float64]) -> Int64:
    """[K] column of each row of `cost` [K, K], each column once, with the least sum.

    The Hungarian method with potentials, row by row; O(K^3). Source: Kuhn, 1955; the shortest
    augmenting path form of Jonker and Volgenant, 1987.
    """
    k = len(cost)
    u, v = np.zeros(k), np.zeros(k)
    row_of = np.full(k, -1)  # of each column
    for i in range(k):
        least = np.full(k, np.inf)  # reduced cost of the best path to each free column
        before = np.full(k, -1)  # the column before it on that path
        done = np.zeros(k, np.bool_)
        row, at = i, -1
        path_rows, path_columns = [i], [-1]
        while True:
            reach = cost[row] - u[row] - v
            better = ~done & (reach < least)
            least[better], before[better] = reach[better], at
            at = int(np.where(done, np.inf, least).argmin())
            delta = least[at]
            u[path_rows] += delta
            v[path_columns[1:]] -= delta
            least[~done] -= delta
            done[at] = True
            if row_of[at] < 0:
                break
            row = int(row_of[at])
            path_rows.append(row)
            path_columns.append(at)
        while at >= 0:  # turn the path over
            row_of[at] = i if before[at] < 0 else row_of[before[at]]
            at = int(before[at])
    out = np.empty(k, np.int64)
    out[row_of] = np.arange(k)
    return out


def numbered_like(books: list[Codebook], old: list[Codebook]) -> list[Tensor]:
    """Per field [K_j] the code of `books` that is nearest to each code of `old`, all in all."""
    orders = []
    for new, was in zip(books, old, strict=True):
        distance = torch.cdist(was.codewords.double(), new.codewords.double()).square()
        orders.append(torch.from_numpy(assignment(distance.numpy())))
    return orders


def agreement(a: Int64, b: Int64, k: int) -> float:
    """Share of users with the same code [U] in two runs, once the codes are matched."""
    together = np.zeros((k, k))
    np.add.at(together, (a, b), 1.0)
    return float(together[np.arange(k), assignment(-together)].sum() / max(len(a), 1))

"""A small generated log with two tastes, and settings with which a fit takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GENRES = ("fantasy", "romance", "science", "comics")
USERS, ITEMS, EVENTS = 30, 24, 5

TINY = ("lm.embedded_tokens=6000", "lm.embedded_layers=1", "lm.embedded_hidden=32",
        "lm.embedded_vocab=320", "em.steps=2")  # fmt: skip
"""For `--set`."""


def tables() -> tuple[pa.Table, pa.Table]:
    """Interactions (user_id, item_id, rating, timestamp) and items (item_id, title, genres)."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(USERS), EVENTS)
    item = np.concatenate([random.permutation(ITEMS)[:EVENTS] for _ in range(USERS)])
    likes = item % 4 == user % 4
    rating = np.where(likes, 5, random.integers(1, 4, len(user)))
    log = pa.table(
        {
            "user_id": user,
            "item_id": item,
            "rating": rating,
            "timestamp": 1000 + np.arange(len(user)),
        }
    )
    items = pa.table(
        {
            "item_id": np.arange(ITEMS),
            "title": [f"book {i}" for i in range(ITEMS)],
            "genres": [GENRES[i % 4] for i in range(ITEMS)],
        }
    )
    return log, items


def write(folder: Path) -> tuple[str, str]:
    """interactions.parquet and items.parquet in `folder`."""
    paths = str(folder / "interactions.parquet"), str(folder / "items.parquet")
    for table, path in zip(tables(), paths):
        pq.write_table(table, path)
    return paths

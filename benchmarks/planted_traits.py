"""Traits that no code was told of: are they found?

    python benchmarks/planted_traits.py [--users 6000] [--nats 0.5] [--codes 16] [--seeds 3]

Users have one of two genders and one of three ages, which the log does not hold. They rate 20
drawn items, and like items of a genre that theirs likes better with a log probability that is
higher by --nats (gender and age each have their own genres); the rest is chance. Codes are fitted
as by default and compared with both traits on users that neither codes nor LM were learned from:
bits of mutual information, and how often there are as many when traits are shuffled (p). The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import userip_fast as uf
from userip_fast.jobs.explain import association

EVENTS, ITEMS, SHUFFLES = 20, 240, 999
GENRES = (
    "western", "romance", "horror", "comedy", "thriller", "musical", "war", "animation", "crime",
    "fantasy", "history", "sports",
)  # fmt: skip


def log(users: int, nats: float, seed: int) -> tuple[uf.Interactions, dict[str, NDArray[Any]]]:
    """The log, and the traits of users 0, 1, ..."""
    random = np.random.default_rng(seed)
    traits = {"gender": random.integers(2, size=users), "age": random.integers(3, size=users)}
    likes = np.zeros((users, len(GENRES)))
    for genre in range(len(GENRES)):
        # A half of the genres are liked better by a gender, the other half by an age.
        name, groups = ("gender", 2) if genre % 2 else ("age", 3)
        # Log odds of -nats and nats have log probabilities that are nats apart.
        likes[:, genre] = nats * (2 * (traits[name] == genre // 2 % groups) - 1)
    user = np.repeat(np.arange(users), EVENTS)
    item = random.integers(ITEMS, size=len(user))
    odds = likes[user, item % len(GENRES)] + random.normal(0, 0.3, ITEMS)[item]
    liked = random.random(len(user)) < 1 / (1 + np.exp(-odds))
    events = pa.table({"user_id": user, "item_id": item, "rating": np.where(liked, 5.0, 2.0)})
    titles = [f"a {GENRES[i % len(GENRES)]} film {i}" for i in range(ITEMS)]
    items = pa.table({"item_id": range(ITEMS), "title": titles})
    return uf.read_interactions(events, items, rating="rating", text="{title}"), traits


def found(users: int, nats: float, codes: int, seed: int) -> dict[str, dict[str, float]]:
    """Per trait what the codes say of it; see `association`."""
    data, traits = log(users, nats, seed)
    index = np.arange(data.num_users)
    new = index % 3 == 0
    field = uf.ProfileField("taste", "The viewer likes", codebook_size=codes)
    model = uf.fit(data.select_users(index[~new]), fields=[field], config={"em": {"seed": seed}})
    judged = data.select_users(index[new])
    code = model.infer(judged)[:, 0].astype(np.int64)
    random = np.random.default_rng(seed)
    keys = np.asarray(judged.user_keys.to_pylist())
    return {
        name: association(code, values[keys], SHUFFLES, random) for name, values in traits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=6000)
    parser.add_argument("--nats", type=float, default=0.5)
    parser.add_argument("--codes", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    result: dict[str, Any] = vars(args).copy()
    for seed in range(args.seeds):
        result[f"seed {seed}"] = found(args.users, args.nats, args.codes, seed)
        print(seed, result[f"seed {seed}"], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

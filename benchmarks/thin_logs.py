"""Do profiles help new users of a thin log, or does a small LM learn the few it has by heart?

    python benchmarks/thin_logs.py --data DATA --rating rating --time timestamp
    python benchmarks/thin_logs.py --data DATA ... --users 200 600 2000 --new 3000

Fits a model of 16 codes on so many users, and has it predict the later reactions of others, who are
known by their first ten events: nats per reaction under their profiles (`told`), under the prior
(`untold`) and by how the item alone fares, smoothed by ten events (`item`). The difference comes
with a 95 % interval over users. Prints a line per size, the last one all of them as JSON.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

import userip_fast as uf

FIRST = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of interactions and items")
    parser.add_argument("--rating", required=True)
    parser.add_argument("--time")
    parser.add_argument("--text", default="{title}")
    parser.add_argument("--users", type=int, nargs="+", default=[200, 600, 2000])
    parser.add_argument("--new", type=int, default=3000)
    parser.add_argument("--set", nargs="*", default=[], help="settings, as key=value")
    args = parser.parse_args()
    log = uf.read_interactions(
        f"{args.data}/interactions.parquet", f"{args.data}/items.parquet", rating=args.rating,
        time=args.time, text=args.text, on_bad="skip",
    )  # fmt: skip
    log = log.select_users(np.flatnonzero(log.history_lengths >= 4))
    new = log.select_users(np.arange(log.num_users)[-args.new :])
    found = []
    for users in args.users:
        if users + args.new > log.num_users:
            raise SystemExit(f"--users {users} and --new {args.new}: there are {log.num_users}")
        found.append(judged(log.head_users(users), new, dict(s.split("=", 1) for s in args.set)))
        print(found[-1], flush=True)
    print(json.dumps(found))


def judged(training: uf.Interactions, new: uf.Interactions, settings: dict[str, str]) -> dict:
    config = uf.Config.from_dict(
        {
            "data": {"behaviour_context": "independent"},
            "em": {"estep": "posterior", "rounds": 3},
            "lm": {"quantization": "none"},
            "fields": [{"name": "taste", "prompt": "", "codebook_size": 16}],
        }
    ).override({name: json.loads(value) for name, value in settings.items()})
    model = uf.fit(training, config=config)
    words = list(model.format.words)
    level = model.format.scale.level(new.rating)
    text = new.item_text.to_pylist()
    keys = new.item_keys.to_pylist()
    early, later, owner = [], [], []
    for u, (a, b) in enumerate(zip(new.offsets[:-1].tolist(), new.offsets[1:].tolist())):
        cut = min(a + FIRST, b - 1)
        early.append(range(a, cut))
        later += range(cut, b)
        owner += [u] * (b - cut)
    p = model.profile(
        [[keys[new.item_index[i]] for i in own] for own in early],
        [[words[level[i]] for i in own] for own in early],
        dict(zip(keys, text)),
    )[owner]
    texts = [text[new.item_index[i]] for i in later]
    table = model.event_table()
    rows = table.rows([(t, words[level[i]]) for t, i in zip(texts, later)])
    likely = np.exp(table.values.numpy()[rows])
    share = model.calibration.usual.log_shares(texts).numpy()
    item = -share[np.arange(len(later)), level[later]]
    told, untold = (-np.log((q * likely).sum(1)) for q in (p, table.grid.log_prior.exp().numpy()))
    per_user = np.bincount(owner, told - item) / np.bincount(owner)
    spread = 1.96 * per_user.std() / np.sqrt(len(per_user))
    return {
        "users": training.num_users,
        "events": training.num_events,
        "told": round(float(told.mean()), 4),
        "untold": round(float(untold.mean()), 4),
        "item": round(float(item.mean()), 4),
        "told - item": [round(float(per_user.mean() + x), 4) for x in (0, -spread, spread)],
    }


if __name__ == "__main__":
    main()

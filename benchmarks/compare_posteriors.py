"""The posterior E-step's ways to infer, compared on the demo's planted world.

    python benchmarks/compare_posteriors.py [--users N] [--purchases 8 3] [--seed S]

Codewords are the candidate words, all codes alike. Per way: passes through the LM per user; share
of users with the codes of `exact` without pruning; mean log probability of the planted trait per
field (none below log 1e-4), also that of the Bayes-optimal posterior; ELBO behind the log evidence;
`calibration_error`, per field how far the likeliest code's probability is from how often it is the
planted trait, mean over ten equal groups of users in order of that probability (the embedded LM saw
none of these users). The fewer purchases, the less certain the posterior.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

from userip_fast.codebook.books import Codebook
from userip_fast.data import Catalogue
from userip_fast.demo import CONFIG, _lm_that_knows_words, _read
from userip_fast.demo.world import make_world
from userip_fast.em import Block, EMState, PosteriorEStep
from userip_fast.em.starts import word_codewords
from userip_fast.lm import FrozenLM, PackedEngine
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import PromptTemplate

FLOOR = 1e-4
WAYS = {
    "exact": {"posterior": "exact", "prune_share": 0.0},
    "exact, pruned": {"posterior": "exact"},
    "ascent": {"posterior": "ascent"},
    "mean_field": {"posterior": "mean_field"},
}


def compare(lm: FrozenLM, users: int, purchases: int, seed: int) -> dict[str, dict[str, Any]]:
    """What the module says, per way, of `users` users with `purchases` purchases each."""
    engine = PackedEngine(lm, PromptTemplate(CONFIG.fields).layout(lm.tokenizer))
    world = make_world(users, seed=seed, purchases=purchases)
    data = _read(world)
    fmt = BehaviourFormat.fit(CONFIG.data, data, seed)
    source = BehaviourSource(fmt.events(data, Catalogue.from_interactions(data)), fmt)
    block = Block(source.block(lm.tokenizer, engine.layout, 0, users), source.hashes_of(0, users))
    books = [Codebook(word_codewords(lm, f)) for f in CONFIG.fields]
    found = {
        way: PosteriorEStep(engine, replace(CONFIG.em, **settings)).run(block, books, EMState())
        for way, settings in WAYS.items()
    }

    keys = data.user_keys.to_numpy()
    planted = [torch.from_numpy(trait[keys]) for trait in (world.hobby, world.level)]

    def log_score(log_p: list[torch.Tensor]) -> list[float]:
        at = [p.gather(1, z[:, None]).double().clamp_min(FLOOR) for p, z in zip(log_p, planted)]
        return [float(p.log().mean()) for p in at]

    def calibration_error(p: list[torch.Tensor]) -> list[float]:
        out = []
        for own, z in zip(p, planted):
            sure, code = own.double().max(1)
            groups = torch.sort(sure).indices.tensor_split(10)
            right = (code == z).double()
            apart = [(sure[g].mean() - right[g].mean()).abs() * len(g) for g in groups]
            out.append(float(sum(apart) / len(sure)))
        return out

    exact = found["exact"]
    rows = {
        way: {
            "passes": float(p.forward_equivalents.mean()),
            "same_codes": float((p.code_ids == exact.code_ids).all(1).double().mean()),
            "log_score": log_score([r.exp() for r in p.log_resp]),
            "calibration_error": calibration_error([r.exp() for r in p.log_resp]),
            "behind_evidence": float((exact.elbo - p.elbo).mean()),
        }
        for way, p in found.items()
    }
    best = [torch.from_numpy(p[keys]) for p in (world.hobby_posterior, world.level_posterior)]
    optimal = {"log_score": log_score(best), "calibration_error": calibration_error(best)}
    return {**rows, "bayes_optimal": optimal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--purchases", type=int, nargs="+", default=[8, 3])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lm = _lm_that_knows_words(CONFIG, args.seed, show=False)
    for purchases in args.purchases:
        result = compare(lm, args.users, purchases, args.seed)
        print(json.dumps({"purchases": purchases, **result}, indent=1))


if __name__ == "__main__":
    main()

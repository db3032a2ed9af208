"""Planted logs: codes that hold taste are worth what taste is worth, and generosity is no gain."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from userip_fast.core.config import Config
from userip_fast.ctr import CTRConfig, evaluate_ctr
from userip_fast.data import Catalogue, read_interactions
from userip_fast.model.prepare import load_lm
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.format import BehaviourFormat

GENRES = ("fantasy", "romance", "science", "comics")
CRITICS = ("harsh", "strict", "mild", "kind")


def planted(users: int, taste: bool, seed: int):
    """18 of 48 items each; liked by genre, everybody equally often, or by generosity alone."""
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), 18)
    item = np.concatenate([random.permutation(48)[:18] for _ in range(users)])
    kind = random.integers(0, 4, users)
    own = kind[user]
    p = np.where(item % 4 == own, 0.9, 0.1) if taste else np.array([0.1, 0.35, 0.65, 0.9])[own]
    table = {"user_id": user, "item_id": item, "time": np.arange(len(user)),
             "rating": np.where(random.random(len(user)) < p, 5, 1)}  # fmt: skip
    items = {"item_id": np.arange(48), "genres": [GENRES[i % 4] for i in range(48)]}
    data = read_interactions(
        pa.table(table), pa.table(items), rating="rating", time="time", text="{genres}"
    )
    return data, kind


@pytest.mark.parametrize("taste", [True, False])
def test_ids_are_worth_what_is_planted(taste, tmp_path, monkeypatch):
    pytest.importorskip("lightgbm")
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    words = GENRES if taste else CRITICS
    config = Config.from_dict(
        {
            "fields": [{"name": "trait", "prompt": "trait", "codebook_size": 4,
                        "candidates": list(words)}],
            "lm": {"embedded_tokens": 400_000, "embedded_layers": 1, "embedded_hidden": 32,
                   "embedded_vocab": 300, "quantization": "none"},
            "data": {"behaviour_context": "independent"},
            "em": {"estep": "posterior", "start": "words", "rounds": 1, "codeword_steps": 1},
        }
    )  # fmt: skip
    # An LM that knows the traits' words, from other users of whom they are told.
    others, kind = planted(200, taste, seed=1)
    fmt = BehaviourFormat.fit(config.data, others, 0)
    source = BehaviourSource(fmt.events(others, Catalogue.from_interactions(others)), fmt)

    def slot_ids(tokenizer):
        ids = [tokenizer(f" {w}", add_special_tokens=False).input_ids[0] for w in words]
        return np.array(ids)[kind[others.user_keys.to_numpy()]][:, None]

    lm = load_lm(source, config, slot_ids=slot_ids)
    data, _ = planted(300, taste, seed=0)
    ctr = CTRConfig(
        first=8, seeds=1, bootstrap=100, backbones=("lightgbm",),
        features=("none", "generosity", "ids", "ids_prob", "affinity"),
    )  # fmt: skip
    found = evaluate_ctr(
        data, ctr=ctr, config=replace(config, lm=replace(config.lm, path=lm.source))
    )
    area = {f: by["lightgbm"]["mean"] for f, by in found["auc"].items()}
    codes = found["codes"]["0"]
    if taste:
        assert area["ids"] > max(area["none"], area["generosity"]) + 0.15
        assert area["affinity"] > max(area["none"], area["generosity"]) + 0.15
        assert codes["generosity_share"][0] < 0.3
        assert codes["bits"]["genres"]["shared"][0] > codes["bits"]["genres"]["permuted"][0] + 0.1
    else:
        assert area["generosity"] > 0.7  # of which none has its share: the statistics
        assert area["none"] > 0.7
        assert area["ids"] - area["generosity"] < 0.01
        assert found["paired"]["lightgbm"]["against"]["none"]["ci95"][0] < 0.005
        assert codes["generosity_share"][0] > 0.6


def test_dead_codes_show():
    """One kind of user and eight codes: the table says how many nobody has."""
    pytest.importorskip("lightgbm")
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(60), 10)
    item = np.concatenate([random.permutation(12)[:10] for _ in range(60)])
    table = {"user_id": user, "item_id": item, "time": np.arange(600),
             "rating": np.where(random.random(600) < 0.5, 5, 1)}  # fmt: skip
    items = {"item_id": np.arange(12), "title": ["thing"] * 12}
    data = read_interactions(pa.table(table), pa.table(items), rating="rating", time="time")
    lm = {"embedded_tokens": 3000, "embedded_layers": 1, "embedded_hidden": 32,
          "embedded_vocab": 300, "quantization": "none"}  # fmt: skip
    found = evaluate_ctr(
        data,
        ctr=CTRConfig(first=3, seeds=1, bootstrap=10, backbones=("lightgbm",),
                      features=("none", "ids"), folds=2),
        config={"lm": lm, "em": {"rounds": 1, "start": "random", "start_spread": 0.01},
                "fields": [{"name": "trait", "prompt": "trait", "codebook_size": 8}]},
    )  # fmt: skip
    codes = found["codes"]["0"]
    counted = round(8 - codes["dead"][0])
    assert codes["dead"][0] >= 1
    assert codes["perplexity"][0] <= counted + 1e-9
    assert codes["largest"][0] >= 1 / counted

import json
from dataclasses import replace

import numpy as np
import pytest

import userip_fast as uf
from userip_fast import demo
from userip_fast.demo import scores
from userip_fast.demo.world import HOBBIES, LEVELS, make_world


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_labelling_is_good_but_not_perfect(seed):
    from sklearn.metrics import normalized_mutual_info_score as nmi

    world = make_world(demo.USERS, seed=seed)
    for truth, posterior in (
        (world.hobby, world.hobby_posterior),
        (world.level, world.level_posterior),
    ):
        assert 0.93 <= nmi(truth, posterior.argmax(1)) <= 0.99
        np.testing.assert_allclose(posterior.sum(1), 1.0)


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    random = np.random.default_rng(0)
    for n, a, b in ((1, 1, 1), (2, 2, 2), (97, 4, 5), (50, 1, 3), (50, 1, 1), (300, 40, 2)):
        x = random.integers(0, a, n)
        y = np.where(random.random(n) < 0.5, x, random.integers(0, b, n))
        expected = normalized_mutual_info_score(x, y)
        assert scores.normalized_mutual_information(x, y) == pytest.approx(expected, abs=1e-12)
        assert scores.adjusted_rand_index(x, y) == pytest.approx(
            adjusted_rand_score(x, y), abs=1e-12
        )


def test_trait_words_never_occur_in_purchases():
    words = {w for title in make_world(5, seed=0).items["title"].to_pylist() for w in title.split()}
    assert not words & {*HOBBIES, *LEVELS}


def test_posteriors_are_those_of_the_generator():
    """With the signal at its extremes the posterior is flat, or certain."""
    flat = make_world(20, seed=0, hobby_signal=0.0, level_signal=0.0)
    np.testing.assert_allclose(flat.hobby_posterior, 1 / 8)
    sure = make_world(20, seed=0, hobby_signal=1 - 1e-9, level_signal=1 - 1e-9)
    assert (sure.hobby_posterior.argmax(1) == sure.hobby).all()
    np.testing.assert_allclose(sure.level_posterior.max(1), 1.0, atol=1e-6)


def test_a_small_demo_writes_what_the_contract_says(tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "USERS", 48)
    monkeypatch.setattr(demo, "_LM_USERS", 200)
    small = replace(
        demo.CONFIG,
        lm=replace(demo.CONFIG.lm, embedded_tokens=6_000, embedded_layers=1, embedded_hidden=32),
        em=replace(demo.CONFIG.em, paper_epochs=1, steps=2),
    )
    monkeypatch.setattr(demo, "CONFIG", small)
    shown = demo.run_demo(tmp_path / "demo")
    written = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert shown == written
    assert written["users"] == 48
    assert written["seeds"] == [0]
    for name in ("hobby", "spending"):
        field = written["fields"][name]
        assert {"nmi", "ari", "forward_equivalents", "counts", "perplexity"} <= set(field)
        assert {"gradient", "posterior", "paper", "kmeans_states", "oracle"} <= set(field["nmi"])
        assert 0 < field["forward_equivalents"]["posterior"] <= 60
        assert field["nmi"]["oracle"] > 0.8
        assert field["forward_equivalents"]["gradient"] == 4.0
    model = uf.Model.load(tmp_path / "demo" / "model")
    bank = uf.FeatureBank.open(tmp_path / "demo" / "bank")
    assert len(bank) == 48
    assert bank.probabilities.shape == (48, 2)
    assert bank.model_fingerprint == model.fingerprint

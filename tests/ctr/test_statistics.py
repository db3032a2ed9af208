"""AUC against the pair count and scikit-learn; the bootstrap against what is known."""

import numpy as np
import pytest

from userip_fast.ctr.statistics import Bootstrap, auc, log_loss, paired


def test_auc_counts_pairs_and_ties_half():
    random = np.random.default_rng(0)
    for n in (2, 3, 50, 301):
        label = random.integers(0, 2, n).astype(np.float32)
        label[:2] = 0, 1
        score = (random.integers(0, max(2, n // 5), n) / 7).astype(np.float32)  # many ties
        weight = random.integers(0, 3, (4, n)).astype(np.float64)
        weight[0] = 1
        found = auc(label, score, weight)
        for w, area in zip(weight, found):
            p, q = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
            pair = w[p][:, None] * w[q][None]
            wins = (score[p][:, None] > score[q]) + 0.5 * (score[p][:, None] == score[q])
            expected = (pair * wins).sum() / pair.sum() if pair.sum() else 0.5
            assert area == pytest.approx(expected, abs=1e-12)


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    label = random.integers(0, 2, 500).astype(np.float32)
    score = random.random(500).astype(np.float32)
    assert auc(label, score)[0] == pytest.approx(metrics.roc_auc_score(label, score), abs=1e-12)
    assert log_loss(label, score) == pytest.approx(metrics.log_loss(label, score), rel=1e-6)


def test_paired_bootstrap_sees_a_difference_and_none():
    random = np.random.default_rng(2)
    user = np.repeat(np.arange(150), 20)
    label = random.integers(0, 2, len(user)).astype(np.float32)
    good = [(label + random.normal(0, 1.0, len(user))).astype(np.float32) for _ in range(3)]
    same = [g + np.float32(1e-7) for g in good]
    bad = [(label + random.normal(0, 1.6, len(user))).astype(np.float32) for _ in range(3)]
    draw = Bootstrap.draw(user, 3, 200)
    a, b = draw.auc(label, good), draw.auc(label, bad)
    measured = [np.mean([auc(label, s)[0] for s in scores]) for scores in (good, bad)]
    found = paired(a, b, measured[0] - measured[1])
    assert found["ci95"][0] > 0
    assert found["ci95"][0] < found["difference"] < found["ci95"][1]
    assert found["p"] < 0.02
    nothing = paired(a, draw.auc(label, same), 0.0)
    assert nothing["ci95"][0] <= 0 <= nothing["ci95"][1]
    assert nothing["p"] > 0.5


def test_the_bootstrap_draws_whole_users():
    draw = Bootstrap.draw(np.array([9, 9, 4, 4, 4, 7]), 2, 50)
    assert draw.weight.shape == (50, 3)
    np.testing.assert_array_equal(draw.weight.sum(1), 3)
    np.testing.assert_array_equal(draw.user, [2, 2, 0, 0, 0, 1])

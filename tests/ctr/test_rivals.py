"""Fold-in, mixture, text and ranking against plain computations; what codes are; time left."""

import numpy as np
import pyarrow as pa
import pytest
from test_protocols import log

from userip_fast.core.config import Config
from userip_fast.ctr.cells import Cells
from userip_fast.ctr.codes import describe_codes
from userip_fast.ctr.config import CTRConfig
from userip_fast.ctr.features import Profiles
from userip_fast.ctr.inputs import Inputs
from userip_fast.ctr.numbers import Numbers
from userip_fast.ctr.protocols import make_task
from userip_fast.ctr.ranking import choice_scores, rank_choices
from userip_fast.ctr.work import Work
from userip_fast.data import read_interactions
from userip_fast.data.attributes import item_attributes
from userip_fast.em import columns
from userip_fast.em.free import FreeMixture
from userip_fast.report.words import codes_in_words


@pytest.fixture(scope="module")
def choices():
    data = log(users=80, rated=False)
    return make_task(data, CTRConfig(first=4))


def test_folding_a_user_in_is_the_regression_of_the_paper(choices):
    """(V'V + V'(C - I)V + reg I)^-1 V'C p, confidence alpha for ones, by `implicit`'s item
    factors: "Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008."""
    pytest.importorskip("implicit")
    fit = Numbers(choices, []).fit(-1)
    model = fit.als[16]
    v = model.item_factors.astype(np.float64)
    matrix = fit.matrix(choices.views[0]).toarray()
    folded = fit.folded(model, 0)
    assert not folded[-1].any()  # nobody
    for u in range(5):
        c = model.alpha * matrix[u]
        gram = v.T @ v + (v.T * np.maximum(c - 1, 0)) @ v + model.regularization * np.eye(16)
        expected = np.linalg.solve(gram, v.T @ c)
        np.testing.assert_allclose(folded[u], expected, rtol=2e-3, atol=2e-4)
    # The score of a row is the product of its user and item.
    rows = choices.test.take(np.arange(50))
    score = fit.foldin(rows)["foldin_16"]
    at = choices.view_rows(0)[rows.user]
    np.testing.assert_allclose(score, (folded[at] * v[rows.item]).sum(1), rtol=1e-5)


def test_statistics_are_counts(choices):
    fit = Numbers(choices, []).fit(-1)
    known = np.concatenate([choices.learn.item_index, choices.pool.item_index])
    rows = choices.test.take(np.arange(30))
    base = fit.base(rows)
    np.testing.assert_allclose(base["item_count"], np.log1p((known[:, None] == rows.item).sum(0)))
    label, item = choices.train.label, choices.train.item
    mean = label.mean()
    for n in range(5):
        own = item == rows.item[n]
        expected = (label[own].sum() + 10 * mean) / (own.sum() + 10)
        assert base["item_rate"][n] == pytest.approx(expected)


def test_excess_is_over_the_items_own_rate():
    data = log()
    task = make_task(data, CTRConfig(first=4, label="rating>=4"))
    fit = Numbers(task, []).fit(-1)
    known_item = np.concatenate([task.learn.item_index, task.pool.item_index])
    hits = np.concatenate([task.learn.rating, task.pool.rating]) >= 4
    view, numbers = task.views[0], fit.user_numbers(0)
    for u in (0, 3, 7):
        own = slice(view.offsets[u], view.offsets[u + 1])
        rate = [
            (hits[known_item == i].sum() + 10 * hits.mean()) / ((known_item == i).sum() + 10)
            for i in view.item_index[own]
        ]
        excess = ((view.rating[own] >= 4) - np.array(rate)).sum() / 6
        assert numbers["user_excess"][u] == pytest.approx(excess)
    assert numbers["user_excess"][-1] == 0  # of nobody


def test_the_log_is_left_as_it_was(choices):
    """Sparse matrices that share its arrays sort them in place."""
    before = [d.item_index.copy() for d in (choices.learn, choices.pool, *choices.views)]
    numbers = Numbers(choices, item_attributes(choices.data.items, ("genres",)))
    for kind in ("base", "text", "attribute_affinity", "popularity"):
        numbers.columns(kind)
    numbers.fit(-1).matrix(choices.views[0])
    view = choices.views[0]
    FreeMixture(view.offsets, view.item_index, None, view.num_items, 3)
    for old, now in zip(before, (choices.learn, choices.pool, *choices.views)):
        np.testing.assert_array_equal(old, now.item_index)


def test_near_texts_are_those_of_the_same_genre(choices):
    numbers = Numbers(choices, item_attributes(choices.data.items, ("genres",)))
    text = numbers.columns("text")["test"]["text_near"]
    affinity = numbers.columns("attribute_affinity")["test"]["affinity_genres"]
    texts = numbers.texts.toarray()
    view = choices.views[0]
    at = choices.view_rows(0)[choices.test.user]
    for n in (0, 11, 99):
        profile = view.item_index[view.offsets[at[n]] : view.offsets[at[n] + 1]]
        cosine = np.sort(texts[profile] @ texts[choices.test.item[n]])
        assert text[n] == pytest.approx(cosine[-3:].mean(), abs=1e-6)
        same = np.isin(profile % 4, choices.test.item[n] % 4).mean()
        assert (affinity[n] > 0) == (same > 0) or choices.test.item[n] % 3 == 0  # "new"


@pytest.mark.parametrize("rated", [False, True])
def test_a_mixture_finds_planted_clusters(rated):
    """Four kinds of users, each with items of its own; codes find them, scores tell new items."""
    random = np.random.default_rng(0)
    users, events, items = 240, 12, 40
    kind = random.integers(0, 4, users)
    offsets = np.arange(users + 1) * events
    own = np.repeat(kind, events)
    likes = random.random(len(own)) < 0.9
    if rated:
        item = random.integers(0, items, len(own))
        level = np.where((item % 4 == own) == likes, 2, 0)
    else:
        item = np.where(likes, 4 * random.integers(0, items // 4, len(own)) + own,
                        random.integers(0, items, len(own)))  # fmt: skip
        level = None
    mixture = FreeMixture(offsets, item, level, items, 4, seed=0, words=3)
    p = mixture.posterior(offsets, item, level)
    np.testing.assert_allclose(p.sum(1), 1)
    code = p.argmax(1)
    counts = np.zeros((4, 4))
    np.add.at(counts, (kind, code), 1)
    assert counts.max(1).sum() / users > 0.95
    # By the formula, from the table.
    events_of = item * mixture.words + (level if rated else 0)
    joint = mixture.log_prior + mixture.power * np.array(
        [mixture.table[np.unique(events_of[a : a + events])].sum(0) for a in offsets[:3]]
    )
    expected = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
    np.testing.assert_allclose(p[:3], expected, atol=1e-9)
    every = np.tile(np.arange(items), users)
    score = mixture.score(np.repeat(p, items, axis=0), every)
    good = every % 4 == np.repeat(kind, items)
    assert score[good].mean() > score[~good].mean() + 1
    # Nobody is the prior.
    none = mixture.posterior(np.zeros(2, np.int64), item[:0], None if level is None else level[:0])
    np.testing.assert_allclose(none[0], np.exp(mixture.log_prior))


def test_ranking_against_a_plain_computation(choices):
    pytest.importorskip("implicit")
    fit = Numbers(choices, []).fit(-1)
    scores = choice_scores(fit, None, None, None, None)
    found = rank_choices(choices, scores)
    assert set(found) == {"popularity", "foldin", "item_item"}
    view, test = choices.views[0], choices.test
    good = (test.label == 1) & (test.kind == 0)
    recall, ndcg = [], []
    for u in np.unique(test.user[good]):
        at = choices.view_rows(0)[u]
        mine = set(view.item_index[view.offsets[at] : view.offsets[at + 1]].tolist())
        wanted = set(test.item[good & (test.user == u)].tolist())
        s = scores["item_item"](np.array([at]))[0]
        order = [i for i in np.argsort(-s, kind="stable").tolist() if i not in mine]
        recall.append(len(wanted & set(order[:20])) / min(20, len(wanted)))
        gain = sum(1 / np.log2(r + 2) for r, i in enumerate(order[:100]) if i in wanted)
        ndcg.append(gain / sum(1 / np.log2(r + 2) for r in range(len(wanted))))
    assert found["item_item"]["recall20"] == pytest.approx(np.mean(recall), abs=0.02)  # ties
    assert found["item_item"]["ndcg100"] == pytest.approx(np.mean(ndcg), abs=0.02)
    assert found["popularity"]["recall20"] > 0


def test_a_mixture_ranks_items_that_it_met():
    """Items 30 to 59 are bought by the row users alone: the teachers' mixture ranks them last."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(150), 10)
    log = {"user_id": user, "item_id": random.integers(0, 60, len(user)), "t": np.arange(len(user))}
    items = {"item_id": np.arange(60), "title": [f"thing {i}" for i in range(60)]}
    data = read_interactions(pa.table(log), pa.table(items), time="t")
    task = make_task(data, CTRConfig(first=4))
    learn = task.learn
    low = learn.item_index < 30
    mixture = FreeMixture(
        np.concatenate([[0], np.cumsum(low)])[learn.offsets], learn.item_index[low], None, 60, 3
    )
    p = mixture.probability()
    np.testing.assert_allclose(p.sum(0), 1)
    assert not p[30:].any()
    posterior = mixture.posterior(np.zeros(2, np.int64), learn.item_index[:0], None)
    scores = choice_scores(Numbers(task, []).fit(-1), mixture, posterior, None, None)
    assert set(np.argsort(-scores["mixture"](np.array([0]))[0])[:30]) == set(range(30))


def test_what_codes_are():
    """Codes that are the users' genre, two of six being dead; then codes of generosity alone."""
    data = log(users=200)
    task = make_task(data, CTRConfig(first=4, label="rating>=5"))
    users = task.data.user_keys.to_numpy()
    taste = (users % 4)[:, None]
    random = np.random.default_rng(0)
    excess = random.normal(size=len(users))
    attributes = item_attributes(task.data.items, ("genres",))
    sure = np.eye(6, dtype=np.float32)[taste[:, 0]]
    told = describe_codes(task, taste, [6], excess, attributes, sure, taste)
    assert told["dead"] == [2]
    assert told["perplexity"][0] == pytest.approx(4, abs=0.1)
    assert told["largest"][0] < 0.4
    assert told["generosity_share"][0] < 0.1
    bits = told["bits"]["genres"]
    assert bits["shared"][0] > bits["permuted"][0] + 0.3  # users rate their own genre 5
    assert told["largest_probability"] == [1.0]
    assert told["same_again"] == [1.0]
    generous = np.digitize(excess, np.quantile(excess, np.arange(1, 6) / 6))[:, None]
    told = describe_codes(task, generous, [6], excess, attributes, None, None)
    assert told["generosity_share"][0] > 0.8
    assert told["bits"]["genres"]["shared"][0] < told["bits"]["genres"]["permuted"][0] + 0.05
    assert "same_again" not in told
    assert "dead 0" in codes_in_words(told)


def test_time_left_holds_from_the_first_third_on(monkeypatch):
    """Jobs of two kinds, guessed four times too short and ten times too long."""
    now = [0.0]
    monkeypatch.setattr("userip_fast.ctr.work.time.monotonic", lambda: now[0])
    work = Work("x", {"EM": 3, "model": 60}, {"EM": 25.0, "model": 20.0}, show=False)
    total = 3 * 100.0 + 60 * 2.0
    for kind, cost, count in (("EM", 100.0, 3), ("model", 2.0, 60)):
        for _ in range(count):
            with work.job(kind, "a"):
                now[0] += cost
            if now[0] > total / 3 and work.seen["model"]:
                left = total - now[0]
                assert left / 2 - 1 <= work.seconds_left() <= 2 * left + 1
    assert work.seconds_left() == 0


def test_work_that_was_read_from_disk_tells_nothing(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("userip_fast.ctr.work.time.monotonic", lambda: now[0])
    work = Work("x", {"EM": 2}, {"EM": 50.0}, show=True)
    with work.job("EM", "a"):
        now[0] += 0.01
    assert work.seconds_left() == 50.0
    work.drop("EM")
    assert work.seconds_left() == 0
    assert capsys.readouterr().err == ""


def test_users_without_a_view_have_the_mean(choices):
    assert (choices.view_rows(0) >= 0).all()
    data = log(users=60, rated=False)
    warm = make_task(data, CTRConfig(protocol="warm", warm_rows=8))
    lacking = [(warm.view_rows(v) < 0).sum() for v in range(3)]
    assert lacking[2] == 0
    assert isinstance(data.item_keys, pa.Array)
    for name, x in Numbers(warm, []).fit(-1).base(warm.train).items():
        assert np.isfinite(x).all(), name


def test_affinity_of_listed_columns_is_the_models(tmp_path, monkeypatch):
    """Where not all combinations of codes are columns of the event table: scores of rows are what
    the model says of the users' columns, kept cells included."""
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "ALL", 1)
    monkeypatch.setattr(columns, "MOST", 7)
    config = Config.from_dict(
        {
            "fields": [{"name": "a", "prompt": "a", "codebook_size": 4},
                       {"name": "b", "prompt": "b", "codebook_size": 3}],
            "lm": {"embedded_tokens": 3000, "embedded_layers": 1, "embedded_hidden": 32,
                   "embedded_vocab": 300, "quantization": "none"},
            "data": {"behaviour_context": "independent"},
            "em": {"estep": "posterior", "rounds": 1},
        }
    )  # fmt: skip
    task = make_task(log(users=120), CTRConfig(first=3, seeds=1))
    for _ in range(2):  # the second time from disk
        profiles = Profiles(task.learn, config, folder=tmp_path / "cells")
        inputs = Inputs(task, CTRConfig(first=3, seeds=1), profiles, Cells(tmp_path / "cells"))
        table, codes = inputs.affinity_table(0)
        assert table.shape == (task.data.num_items, len(codes))
        assert len(codes) == 7 < 12
        found = inputs.affinities(0)["test"]["affinity"]
        model = profiles.model("ids", 0)
        np.testing.assert_array_equal(codes, model.event_table().grid.codes.numpy())
        view = task.views[0]
        read = profiles.read("ids", view, 0)["probabilities"]
        p = model.event_table().grid.joint(np.split(read, [4], axis=1))
        at = task.view_rows(0)
        texts = dict(zip(task.data.item_keys.to_pylist(), task.data.item_text.to_pylist()))
        every = model.affinity(p, list(texts), texts)
        for n in range(0, len(task.test), 97):
            own = every[at[task.test.user[n]], task.test.item[n]]
            assert found[n] == pytest.approx(np.log(own / (1 - own)), rel=1e-3, abs=1e-4)
        monkeypatch.setattr(Profiles, "affinity", None)

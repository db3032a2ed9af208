"""`Model.profile` and `Model.affinity`: users and items from the event table, without a bank."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_resume import read
from test_table import WHOLE

import userip_fast as uf
from userip_fast.core.config import LMConfig
from userip_fast.core.errors import ConfigError, DataError
from userip_fast.em.scorer import log_prior
from userip_fast.lm import PackedEngine
from userip_fast.prompts.packing import make_pack


@pytest.fixture(scope="module")
def lm():
    return tiny.frozen("llama")


@pytest.fixture(scope="module")
def model(lm):
    return uf.fit(read(60), lm, config=WHOLE)


@pytest.fixture(scope="module")
def choices(lm):
    data = replace(read(60), rating=None)
    return uf.fit(data, lm, config=WHOLE.override({"data.loss": "all", "data.negatives": 1}))


def events(data):
    """Per user item keys and ratings, oldest first."""
    keys = np.asarray(data.item_keys.to_pylist())
    ends = data.offsets[1:-1]
    return (
        [x.tolist() for x in np.split(keys[data.item_index], ends)],
        [x.tolist() for x in np.split(data.rating, ends)],
    )


def test_profiles_are_those_of_infer(model, tmp_path):
    data = read(60)
    items, ratings = events(data)
    p = model.profile(items, ratings)
    assert p.shape == (60, 12)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    grid = p.reshape(60, 4, 3)
    codes = np.stack([grid.sum(2).argmax(1), grid.sum(1).argmax(1)], axis=1)
    bank = model.infer(data, tmp_path / "bank", probabilities=True)
    assert np.array_equal(codes, bank.codes())
    sure = np.stack([grid.sum(2).max(1), grid.sum(1).max(1)], axis=1)
    np.testing.assert_allclose(sure, bank.probabilities, rtol=1e-4, atol=1e-5)
    scale = model.format.scale
    words = [[scale.words[k] for k in scale.level(np.asarray(own))] for own in ratings]
    assert np.array_equal(model.profile(items, words), p)
    assert np.array_equal(model.profile(items[7], ratings[7]), p[7])


def test_users_of_known_items_are_inferred_without_the_lm(model, monkeypatch):
    fresh = replace(model)
    codes = fresh.infer(read(60))
    monkeypatch.setattr(PackedEngine, "nll", None)
    assert np.array_equal(fresh.infer(read(60)), codes)


def test_a_loaded_model_knows_what_was_read(tmp_path, monkeypatch):
    config = replace(WHOLE, lm=LMConfig(path=str(tiny.save("llama", tmp_path / "lm"))))
    model = uf.fit(read(60), config=config)
    model.save(tmp_path / "model")
    loaded = uf.Model.load(tmp_path / "model")
    assert loaded.fingerprint == model.fingerprint
    items, ratings = events(read(60))
    want = model.profile(items, ratings)
    with monkeypatch.context() as patch:
        patch.setattr(PackedEngine, "nll", None)
        assert np.array_equal(loaded.profile(items, ratings), want)
        assert np.array_equal(loaded.infer(read(60)), model.infer(read(60)))
    assert loaded.profile([99], ["liked"], texts={99: "a new thing"}).shape == (12,)
    loaded.save(tmp_path / "again")
    again = uf.Model.load(tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(PackedEngine, "nll", None)
        assert again.profile([99], ["liked"], texts={99: "a new thing"}).shape == (12,)

    old = uf.Model.load(tmp_path / "model")
    old.codebooks = [b.reordered(torch.arange(len(b)).flip(0)) for b in old.codebooks]
    flipped = old.profile(items, ratings)  # another model: it must not use what was read before
    np.testing.assert_allclose(flipped, want[:, ::-1], rtol=1e-4, atol=1e-6)


def test_a_model_saved_before_anything_was_read(tmp_path):
    config = replace(WHOLE, lm=LMConfig(path=str(tiny.save("llama", tmp_path / "lm"))))
    model = uf.fit(read(60), config=config)
    fresh = replace(model, codebooks=list(model.codebooks))  # a table belongs to its codebooks
    assert not len(fresh.event_table().values)
    fresh.save(tmp_path / "model")
    loaded = uf.Model.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.profile([]), model.profile([]))
    items, ratings = events(read(60))
    np.testing.assert_allclose(
        loaded.profile(items, ratings), model.profile(items, ratings), rtol=1e-4, atol=1e-6
    )


def test_no_events_give_the_prior(model):
    prior = sum(np.ix_(*[log_prior(b).numpy() for b in model.codebooks]))
    np.testing.assert_allclose(model.profile([]), np.exp(prior).ravel(), rtol=1e-4)
    np.testing.assert_allclose(model.profile([[], []])[1], np.exp(prior).ravel(), rtol=1e-4)


def test_a_known_item_is_read_once_and_a_new_one_by_its_text(model, monkeypatch):
    fresh = replace(model)
    reads = []
    real = PackedEngine.nll
    monkeypatch.setattr(PackedEngine, "nll", lambda *a: reads.append(1) or real(*a))
    known = fresh.profile([0, 3], ["liked", "disliked"])
    assert len(reads) > 0
    reads.clear()
    assert np.array_equal(fresh.profile([0, 3], ["liked", "disliked"]), known)
    assert reads == []
    with pytest.raises(DataError, match="item 99 is not in the training data"):
        fresh.profile([99], ["liked"])
    new = fresh.profile([99], ["liked"], texts={99: tiny.TEXTS[3]})
    np.testing.assert_allclose(new, fresh.profile([3], ["liked"]), rtol=1e-6)
    assert np.array_equal(fresh.profile([99], ["liked"], texts={99: "a thing"}).shape, (12,))


@pytest.mark.parametrize("which", ["model", "choices"])
def test_affinity_is_the_words_share_under_each_code(which, request, lm):
    model = request.getfixturevalue(which)
    engine, words = model.ready_trainer().engine, model.format.words
    best = "chosen" if which == "choices" else "liked"
    table = model.event_table()
    p = np.eye(12, dtype=np.float32)  # sure of one combination each
    got = model.affinity(p, [0, 4])
    assert got.shape == (12, 2)
    # How often each word was told of each item, smoothed by ten events at the overall shares.
    counts = np.zeros((len(tiny.TEXTS), len(words)))
    if which == "model":
        data = read(60)
        level = model.format.scale.level(data.rating)
        at = [tiny.TEXTS.index(t) for t in data.item_text.to_pylist()]
        events = np.stack([data.users_of_events(), np.asarray(at)[data.item_index], level])
        _, item, level = np.unique(events.astype(np.int64), axis=1)  # of a user each once
        np.add.at(counts, (item, level), 1)
    total = counts.sum(0) + 1
    usual = counts + 10 * total / total.sum()
    usual = (usual / usual.sum(1, keepdims=True)).astype(np.float32)
    for i, item in enumerate((0, 4)):
        kinds = [(tiny.TEXTS[item], w) for w in words]
        told = model.format.kinds(lm.tokenizer, engine.layout, kinds)
        for z in (0, 5, 11):
            pack = make_pack(told, np.arange(len(words)), engine.layout, lm.device)
            with torch.no_grad():
                soft = table.grid.soft[z : z + 1].expand(len(words), -1, -1)
                said = -engine.nll(pack, soft)
                if which == "model":  # relative to what is usual of the item
                    neutral = model.start[None].expand(len(words), -1, -1)
                    said += engine.nll(pack, neutral) + torch.from_numpy(usual[item]).log()
                    if (counted := model.calibration.counted) is not None:
                        said += counted.log_of([tiny.TEXTS[item]])[:, z]
                share = said.softmax(0)
            assert got[z, i] == pytest.approx(float(share[words.index(best)]), rel=2e-4)
    mean = model.affinity(np.full(12, 1 / 12, np.float32), [0, 4])
    np.testing.assert_allclose(mean, got.mean(0), rtol=1e-5)


def test_what_cannot_be_asked(model, choices, lm):
    with pytest.raises(DataError, match="reaction 'loved' is not one of the model's"):
        model.profile([0], ["loved"])
    with pytest.raises(DataError, match="reaction None"):
        model.profile([0])
    with pytest.raises(DataError, match="reaction 5"):
        choices.profile([0], [5])
    with pytest.raises(DataError, match="user 1 has 2 items and 1 reactions"):
        model.profile([[0], [0, 1]], [["liked"], ["liked"]])
    sequence = uf.fit(read(20), lm, config=WHOLE.override({"data.behaviour_context": "sequence"}))
    with pytest.raises(ConfigError, match="an event table needs"):
        sequence.profile([0], ["liked"])
    told = uf.fit(read(20), lm, config=WHOLE.override({"data.loss": [1.0, 0.0]}))
    assert told.profile([0, 1], ["liked", "okay"]).shape == (12,)
    with pytest.raises(ConfigError, match="no loss on reactions"):
        told.affinity(told.profile([]), [0])

"""Words that texts share: who has them, factors that compete, a mixture that knows them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_calibrate import World

from userip_fast.core.errors import FormatError
from userip_fast.em.counted import Counted, WordFactors
from userip_fast.em.free import FreeMixture
from userip_fast.em.shared_words import SharedWords, words_of

TEXTS = [
    "The Red Fox", "the red, red hen (FARM)", "the grey fox", "the Hen", "the owl",
    "the ÉCOLE", "the école noire", "the 7", "the 8", "the 9", "the 10", "a thing",
]  # fmt: skip


def test_words_are_told_once_and_in_one_case():
    assert words_of("The red, RED hen (École-7)") == ["the", "red", "hen", "école", "7"]
    assert words_of("...") == []


def test_shared_are_words_of_some_texts():
    """No word of a single text, and not "the", which all but one have."""
    shared = SharedWords.among(TEXTS)
    assert shared.words == ["red", "fox", "hen", "école"]
    has = [[shared.words[i] for i in shared.of[a:b]]
           for a, b in zip(shared.offsets[:-1], shared.offsets[1:])]  # fmt: skip
    assert has == [["red", "fox"], ["red", "hen"], ["fox"], ["hen"], [], ["école"], ["école"],
                   [], [], [], [], []]  # fmt: skip
    there = np.zeros((len(TEXTS), 4))
    for t, words in enumerate(has):
        there[t, [shared.words.index(w) for w in words]] = 1
    x = np.random.default_rng(0).normal(size=(len(TEXTS), 3))
    np.testing.assert_allclose(shared.sums(x), there.T @ x)
    np.testing.assert_allclose(shared.spread(shared.sums(x)), there @ there.T @ x)


@pytest.mark.parametrize("texts", [[], [""], ["one", "two"], ["same words"] * 3])
def test_where_no_word_is_shared_there_is_nothing(texts):
    shared = SharedWords.among(texts)
    assert shared.words == []
    assert shared.sums(np.ones((len(texts), 2))).shape == (0, 2)
    np.testing.assert_array_equal(shared.spread(np.zeros((0, 2))), np.zeros((len(texts), 2)))


def test_the_most_frequent_words_are_kept(monkeypatch):
    monkeypatch.setattr("userip_fast.em.shared_words._WORDS", 2)
    assert SharedWords.among(["a b c", "a b c", "a b", "a", "", "", ""]).words == ["a", "b"]


def test_factors_of_words_that_come_together_compete():
    """Events are twice as many where "a" is; "b", which mostly comes with it, takes no credit."""
    texts = ["a b"] * 30 + ["a"] * 10 + ["b"] * 10 + [""] * 50
    shared = SharedWords.among(texts)
    base = np.full((100, 1), 1e4)
    truth = np.where(np.asarray([("a" in t) for t in texts])[:, None], 2.0, 1.0) * base
    log_factors = np.zeros((2, 1))
    for _ in range(60):
        expected = base * np.exp(shared.spread(log_factors))
        log_factors = shared.scaled(log_factors, truth, expected, 1.0)
    np.testing.assert_allclose(np.exp(log_factors).ravel(), [2.0, 1.0], rtol=0.01)
    # Few events leave a factor near one: of one event instead of none expected it is (1 + p) / p.
    one = np.zeros((100, 1))
    one[30] = 1
    few = shared.scaled(np.zeros((2, 1)), one, np.zeros((100, 1)), 100.0)
    np.testing.assert_allclose(few.ravel(), [0.5 * np.log(1.01), 0.0], atol=1e-12)


def planted(rated, seed=0, users=1500, items=400):
    """Two tastes for words of items each of which is too rare to tell of them alone."""
    random = np.random.default_rng(seed)
    events, words = 10, 8
    taste = random.integers(2, size=users)
    own = np.repeat(taste, events)
    texts = [f"w{i % words} item {i}" for i in range(items)]
    item = random.integers(items, size=len(own))
    likes = item % words % 2 == own
    if rated:
        level = (random.random(len(own)) < np.where(likes, 0.65, 0.35)).astype(np.int64)
    else:
        other = random.random(len(own)) < 0.35
        item, level = item - item % 2 + np.where(other, 1 - own, own), None
    return taste, np.arange(users + 1) * events, item, level, texts


def agree(taste, code):
    counts = np.zeros((2, 2))
    np.add.at(counts, (taste, code), 1)
    return counts.max(1).sum() / len(taste)


@pytest.mark.parametrize("rated", [False, True])
def test_a_mixture_of_words_finds_what_items_hide(rated):
    _, offsets, item, level, texts = planted(rated)
    new, new_offsets, *events, _ = planted(rated, seed=1)
    size = len(texts), 2, 0, 2
    alone = FreeMixture(offsets, item, level, *size)
    pooled = FreeMixture(offsets, item, level, *size, texts)
    assert alone.pooled is None
    assert pooled.pooled is not None
    found = [agree(new, m.posterior(new_offsets, *events).argmax(1)) for m in (alone, pooled)]
    assert found[1] > found[0] + 0.03
    # Probabilities add up to one, over reactions or over items.
    p = np.exp(pooled.table)
    total = p.reshape(len(texts), 2, 2).sum(1) if rated else pooled.probability().sum(0)
    np.testing.assert_allclose(total, np.ones_like(total), rtol=1e-9)
    again = FreeMixture(offsets, item, level, *size, texts)
    np.testing.assert_array_equal(pooled.table, again.table)


@pytest.mark.parametrize("rated", [False, True])
def test_words_tell_of_an_item_that_was_never_met(rated):
    taste, offsets, item, level, texts = planted(rated)
    new = [f"w{i} new" for i in range(8)]
    mixture = FreeMixture(offsets, item, level, len(texts) + 8, 2, 0, 2, texts + new)
    code = mixture.posterior(offsets, item, level).argmax(1)
    counts = np.zeros((2, 2))
    np.add.at(counts, (code, taste), 1)
    told = mixture.log_affinity(len(texts) + np.arange(8))
    for k, own in enumerate(counts.argmax(1)):
        likes = np.arange(8) % 2 == own
        assert told[likes, k].min() > told[~likes, k].max() + 0.3


@pytest.mark.parametrize("rated", [False, True])
def test_words_that_say_nothing_do_no_harm(rated):
    """The same log under texts drawn anew: held-out users keep them from doing harm."""
    taste, offsets, item, level, texts = planted(rated, users=1200, items=200)
    drawn = np.random.default_rng(1).permutation(texts).tolist()
    log = offsets, item, level
    mixtures = (FreeMixture(*log, len(texts), 2, 0, 2, t) for t in (None, drawn))
    found = [agree(taste, mixture.posterior(*log).argmax(1)) for mixture in mixtures]
    assert found[1] > found[0] - 0.02


@pytest.mark.parametrize("words", [(), ("bad", "good")])
def test_judges_choose_words_where_items_are_too_rare(words):
    """An LM that tells nothing, and groups whose taste is for one of two words."""
    random = np.random.default_rng(0)
    world = World(1000, 20, 600, words=words)
    world.texts = [f"w{i % 2} item {i}" for i in range(600)]
    item = random.integers(600, size=world.kinds.shape)
    likes = random.random(item.shape) < 0.7
    taste = world.taste[:, None]
    if words:
        world.kinds = 2 * item + ((item % 2 == taste) == likes)
    else:
        world.kinds = item - item % 2 + np.where(likes, taste, 1 - taste)
    names = [(t, w) for t in world.texts for w in words or ("",)]
    number = np.bincount(world.kinds.ravel(), minlength=len(names))
    world.counts = dict(zip(names, number.tolist()))
    world.events = torch.from_numpy(number).double()
    of_word = np.log([[0.7, 0.3], [0.3, 0.7]])
    truth = of_word[np.arange(600) % 2]
    if words:
        truth = np.stack([truth[:, ::-1], truth], 1).reshape(1200, 2)
    groups = torch.from_numpy(truth.copy()).float(), torch.tensor([0.5, 0.5]).double().log()
    how, _ = world.calibrate(torch.zeros(len(truth), 2), torch.zeros(1, 2), groups=groups)
    assert how.counted is not None
    assert how.counted.shared is not None
    # A new item is told by its word.
    told = how.counted.log_of(["w0 new", "w1 new", "other"]).view(3, -1, 2)[:, -1]
    assert float(told[0, 0] - told[0, 1]) > 0.5
    assert float(told[1, 1] - told[1, 0]) > 0.5
    assert not told[2].any()
    values = how.values(torch.zeros(len(truth), 2), world.texts, 1.0)
    assert np.corrcoef((values[:, 0] - values[:, 1]).numpy(), truth[:, 0] - truth[:, 1])[0, 1] > 0.9


def test_factors_of_words_are_kept_checked_and_renumbered():
    random = np.random.default_rng(0)
    factors = random.normal(size=(3, 2, 6)).astype(np.float16)
    words = WordFactors(["red", "fox", "hen"], factors)
    told = words.log_of(["a Red fox", "the hen, the hen", "nothing"]).view(3, 2, 6).numpy()
    f = factors.astype(np.float32)
    np.testing.assert_allclose(told, [f[0] + f[1], f[2], 0 * f[0]], atol=1e-6)
    assert words.log_of([]).shape == (0, 6)
    orders = [torch.tensor([1, 0]), torch.tensor([2, 0, 1])]
    grid = factors.reshape(3, 2, 2, 3)
    moved = words.reordered(orders).log_factors.reshape(3, 2, 2, 3)
    np.testing.assert_array_equal(moved, grid[:, :, orders[0]][:, :, :, orders[1]])
    again = WordFactors.from_arrow(words.to_arrow(), 2, 6)
    assert again.digest == words.digest
    # Beside the factors of a text.
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    counted = Counted.of(["red", "owl"], zeros + 3, zeros + 1, 2, 1.0, words)
    own = counted.log_of(["red", "owl", "hen"]).view(3, 2, 6).numpy()
    np.testing.assert_allclose(own, [np.log(2) + f[0], np.log(2) + 0 * f[0], f[2]], atol=2e-3)
    assert counted.digest != replace(counted, shared=None).digest
    reordered = counted.reordered(orders)
    np.testing.assert_array_equal(reordered.shared.log_factors, words.reordered(orders).log_factors)
    nan = pa.FixedSizeListArray.from_arrays(pa.array(np.full(36, np.nan, np.float32)), 12)
    with pytest.raises(FormatError):
        WordFactors.from_arrow(words.to_arrow().set_column(1, "log_factors", nan), 2, 6)
    with pytest.raises(FormatError):
        WordFactors.from_arrow(words.to_arrow(), 1, 6)


def test_neutral_is_needed_for_words():
    """Likelihoods, of which no usual part is known, are not counted."""
    world = World(200, 10, 12)
    world.texts = [f"w{i % 2} item {i}" for i in range(12)]
    how, _ = world.calibrate(torch.from_numpy(world.p))
    assert how.counted is None

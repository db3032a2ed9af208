"""Names of codes: what their users choose more often, found on one half and told by the other."""

import numpy as np
import pyarrow as pa
import pytest

from userip_fast.codebook.names import ItemCounts, Traits
from userip_fast.data import Events

GENRES = ("comedy", "horror", "war")
ITEMS = 60


def catalogue():
    genre = [GENRES[i % 3] for i in range(ITEMS)]
    items = pa.table({"genre": genre})
    texts = pa.array([f"{'Red' if i % 2 else 'Blue'} Tale {i}" for i in range(ITEMS)])
    return items, texts


def events_of(users, seed, liked=None):
    """Of code k, k = 0 .. 2, items of genre k twice as often as others; and how they went."""
    random = np.random.default_rng(seed)
    codes = random.integers(3, size=users)
    weight = np.stack([np.where(np.arange(ITEMS) % 3 == k, 2.0, 1.0) for k in range(3)])
    weight /= weight.sum(1, keepdims=True)
    item = np.concatenate([random.choice(ITEMS, 10, p=weight[k]) for k in codes])
    level = None
    if liked is not None:
        level = (random.random(len(item)) < np.repeat(liked[codes], 10)).astype(np.int8)
    _, texts = catalogue()
    events = Events(
        user_keys=pa.array(seed * 1_000_000 + np.arange(users)),
        offsets=np.arange(users + 1) * 10,
        item_index=item.astype(np.int32),
        item_keys=pa.array(np.arange(ITEMS)),
        item_text=texts,
        level=level,
        words=() if liked is None else ("disliked", "liked"),
    )
    return codes[:, None], events


def counted(traits, blocks, **settings):
    counts = ItemCounts([3], traits, **settings)
    for codes, events in blocks:
        counts.add(codes, events)
    return counts


def test_a_code_is_told_by_what_its_users_choose_more():
    items, texts = catalogue()
    traits = Traits.of(items, texts, np.arange(ITEMS))
    counts = counted(traits, [events_of(600, 1), events_of(600, 2)])
    for k, told in enumerate(counts.told(0)):
        assert told[0].what == f"genre: {GENRES[k]}"
        # Half of this code's choices, a quarter of the others': 1.5 of all.
        assert told[0].low < 1.5 < told[0].high
        assert told[0].low > 1.3
        assert not any(t.what in ('"red"', '"blue"') for t in told)


def test_figures_are_of_users_that_the_trait_was_not_found_on():
    """Where there is nothing to tell, little is told, and the other half does not bear it out."""
    items, texts = catalogue()
    traits = Traits.of(items, texts, np.arange(ITEMS))
    found = []
    for seed in range(20):
        codes, events = events_of(400, seed)
        random = np.random.default_rng(seed)
        told = counted(traits, [(random.permutation(codes), events)]).told(0)
        found += [t for own in told for t in own]
    assert len(found) < 10
    assert sum(t.low > 1 for t in found) <= 1


def test_counts_do_not_depend_on_blocks_and_tell_reactions():
    items, texts = catalogue()
    traits = Traits.of(items, texts, np.arange(ITEMS))
    liked = np.array([0.2, 0.5, 0.8])
    codes, events = events_of(300, 3, liked)
    words = ("disliked", "liked")
    whole = counted(traits, [(codes, events)], words=words)
    parts = [(codes[a : a + 100], events.users(a, a + 100)) for a in (0, 100, 200)]
    again = counted(traits, parts, words=words)
    for name in ("users", "items", "folds", "reactions"):
        assert np.array_equal(getattr(whole, name)[0], getattr(again, name)[0])
    share = whole.reactions[0][:, 1] / whole.reactions[0].sum(1)
    assert share == pytest.approx(liked, abs=0.06)
    kept = events.level == 1
    assert whole.folds[0][:, :, -1].sum() == kept.sum()
    # A genre's count is that of its items.
    horror = traits.names.index("genre: horror")
    own = events.item_index[kept] % 3 == 1
    assert whole.folds[0][:, :, horror].sum() == own.sum()


def test_words_of_few_items_and_values_are_no_traits():
    items = pa.table({"genre": ["war", "war", "war", "peace", "peace", "peace"] * 2})
    texts = pa.array([f"War story {'rare' if i < 2 else ''} x" for i in range(12)])
    traits = Traits.of(items, texts, np.ones(12, np.int64))
    told = [n for n, item in zip(traits.names, traits.is_item) if not item]
    assert told == ["genre: peace", "genre: war", '"story"']

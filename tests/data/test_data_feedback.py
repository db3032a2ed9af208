"""Feedback scales, catalogues and sampled negatives."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import userip_fast as uf
from userip_fast.core.errors import DataError, MismatchError
from userip_fast.data import Catalogue, FeedbackScale, Negatives, make_events

NUM_ITEMS = 40
ITEMS = pa.table({"item_id": range(NUM_ITEMS), "title": [f"t{i}" for i in range(NUM_ITEMS)]})


def read(user, item, **columns):
    table = pa.table({"user_id": user, "item_id": item, **columns})
    return uf.read_interactions(
        table, ITEMS, time="timestamp", rating=columns.get("rating") and "rating"
    )


def make(seed=0, users=50, events=500, items=NUM_ITEMS):
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.geometric(0.08, events) - 1, items - 1)
    return read(rng.integers(0, users, events), item, timestamp=np.arange(events))


def by_user(events):
    """User key -> list of (item key, word)."""
    items = events.item_keys.take(pa.array(events.item_index)).to_pylist()
    words = [events.words[level] for level in events.level]
    rows = list(zip(items, words, strict=True))
    bounds = events.offsets.tolist()
    keys = events.user_keys.to_pylist()
    return {k: rows[a:b] for k, a, b in zip(keys, bounds[:-1], bounds[1:], strict=True)}


def groups(events, n):
    """User key -> list of (chosen item, its negatives in order)."""
    result = {}
    for key, rows in by_user(events).items():
        result[key] = []
        for i in range(0, len(rows), n + 1):
            group = rows[i : i + n + 1]
            (chosen,) = [item for item, word in group if word == "chosen"]
            result[key].append((chosen, [item for item, word in group if word == "passed over"]))
    return result


# ------------------------------------------------------------------ ratings


@pytest.mark.parametrize(
    ("counts", "thresholds", "words"),
    [
        ({1: 10, 2: 10, 3: 10}, (2, 3), ("disliked", "okay", "liked")),
        ({1: 1, 2: 2, 3: 10, 4: 30, 5: 25}, (4, 5), ("disliked", "okay", "liked")),
        ({1: 90, 2: 5, 3: 5}, (2, 3), ("disliked", "okay", "liked")),
        ({1: 5, 2: 5, 3: 90}, (2, 3), ("disliked", "okay", "liked")),
        ({0.5: 4, 4.5: 6}, (4.5,), ("disliked", "liked")),
    ],
)
def test_fitted_thresholds(counts, thresholds, words):
    ratings = np.repeat(list(counts), list(counts.values())).astype(np.float32)
    scale = FeedbackScale.fit(ratings)
    assert (scale.thresholds, scale.words) == (thresholds, words)


@given(
    st.lists(st.integers(0, 12).map(lambda v: v / 2), min_size=2, max_size=60),
    st.integers(2, 5),
)
def test_fit_is_as_balanced_as_any_scale_can_be(ratings, n):
    distinct = sorted(set(ratings))
    words = tuple("abcde"[:n])
    if len(distinct) < 2:
        with pytest.raises(DataError, match="two distinct ratings"):
            FeedbackScale.fit(ratings, words)
        return
    scale = FeedbackScale.fit(ratings, words)
    assert len(scale.words) == min(n, len(distinct))
    assert (scale.words[0], scale.words[-1]) == (words[0], words[-1])
    counts = np.bincount(scale.level(ratings), minlength=len(scale.words))
    assert (counts > 0).all()

    best = min(
        sum(np.bincount(np.searchsorted(cut, ratings, side="right")) ** 2)
        for cut in itertools.combinations(distinct[1:], len(scale.words) - 1)
    )
    assert (counts**2).sum() == best


def test_continuous_ratings_give_terciles():
    ratings = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    counts = np.bincount(FeedbackScale.fit(ratings).level(ratings))
    assert counts.min() > 6_600
    assert counts.max() < 6_733


def test_level_is_the_word_from_its_threshold_on():
    scale = FeedbackScale(("no", "so", "yes"), (2.5, 4))
    assert scale.level([-9, 2.4, 2.5, 3.9, 4, 99]).tolist() == [0, 0, 1, 1, 2, 2]
    assert scale.level([]).dtype == np.int8
    ratings = np.float32([0.1, 0.2, 0.3])
    assert FeedbackScale.fit(ratings).level(ratings).tolist() == [0, 1, 2]


def test_scale_survives_json():
    scale = FeedbackScale.fit(np.float32([0.1, 0.2, 0.3, 0.7]))
    assert FeedbackScale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale


@pytest.mark.parametrize(
    ("words", "thresholds", "message"),
    [
        (("a", "b"), (), "2 words needs 1 thresholds, got 0"),
        (("a", "a"), (1.0,), "distinct and not empty"),
        (("a", " "), (1.0,), "distinct and not empty"),
        (("a", "b", "c"), (2.0, 2.0), "must be finite and ascend"),
        (("a", "b"), (float("nan"),), "must be finite and ascend"),
    ],
)
def test_malformed_scales_are_refused(words, thresholds, message):
    with pytest.raises(DataError, match=message):
        FeedbackScale(words, thresholds)


def test_fit_refuses_ratings_that_are_not_finite():
    with pytest.raises(DataError, match="ratings must be finite"):
        FeedbackScale.fit([1.0, float("nan")])


def test_events_of_ratings():
    data = read([1, 1, 2], [0, 1, 2], rating=[1.0, 5.0, 3.0], timestamp=[1, 2, 3])
    scale = FeedbackScale(("disliked", "okay", "liked"), (3, 4))
    events = make_events(data, scale)
    assert by_user(events) == {1: [(0, "disliked"), (1, "liked")], 2: [(2, "okay")]}
    assert events.level.dtype == np.int8
    plain = make_events(data)
    assert (plain.level, plain.words) == (None, ())
    assert (plain.num_users, plain.num_events) == (2, 3)


def test_a_fitted_scale_reads_a_log_of_one_rating():
    data = read([1, 1], [0, 1], rating=[5.0, 5.0], timestamp=[1, 2])
    assert data.rating is None
    events = make_events(data, FeedbackScale(("disliked", "liked"), (4,)))
    assert [word for _, word in by_user(events)[1]] == ["liked", "liked"]
    with pytest.raises(DataError, match="feedback needs ratings"):
        make_events(make(), FeedbackScale(("disliked", "liked"), (4,)))


# ---------------------------------------------------------------- negatives


def test_catalogue_counts_and_order_do_not_depend_on_the_file():
    data = make()
    catalogue = Catalogue.from_interactions(data)
    counts = dict(zip(catalogue.item_keys.to_pylist(), catalogue.counts.tolist(), strict=True))
    assert counts == {i: n for i, n in enumerate(np.bincount(data.item_index).tolist()) if n}
    rng = np.random.default_rng(1)
    user = data.user_keys.to_numpy()[data.users_of_events()]
    order = rng.permutation(data.num_events)
    table = pa.table({"user_id": user[order], "item_id": data.item_index[order]})
    again = Catalogue.from_interactions(
        uf.read_interactions(table, ITEMS.take(rng.permutation(40)))
    )
    assert again.to_table().equals(catalogue.to_table())


def test_catalogue_survives_a_table(tmp_path):
    catalogue = Catalogue.from_interactions(make())
    back = Catalogue.from_table(catalogue.to_table())
    assert back.to_table().equals(catalogue.to_table())
    with pytest.raises(DataError, match="columns item, text and count"):
        Catalogue.from_table(pa.table({"item": [1]}))
    with pytest.raises(DataError, match="counts must be positive"):
        Catalogue.from_table(pa.table({"item": [1], "text": ["a"], "count": [0]}))


@pytest.mark.parametrize("n", [1, 3])
def test_each_choice_meets_n_items_the_user_never_chose(n):
    data = make()
    events = make_events(data, Negatives(Catalogue.from_interactions(data), n=n))
    got = groups(events, n)
    assert list(got) == data.user_keys.to_pylist()
    for rows, a, b in zip(got.values(), data.offsets[:-1], data.offsets[1:], strict=True):
        chosen = data.item_keys.take(pa.array(data.item_index[a:b])).to_pylist()
        assert [item for item, _ in rows] == chosen
        seen = {item for item, _ in rows}
        for _, negatives in rows:
            assert len(negatives) == n
            assert not seen & set(negatives)
    assert events.num_events == (n + 1) * data.num_events


def test_the_chosen_item_has_no_fixed_place():
    data = make(events=2000, users=200)
    level = make_events(data, Negatives(Catalogue.from_interactions(data))).level.reshape(-1, 2)
    assert 0.45 < (level[:, 0] == 0).mean() < 0.55


def test_negatives_follow_popularity_to_the_power():
    rng = np.random.default_rng(0)
    num_users, counts = 20_000, np.array([1, 16, 81, 256, 625])
    keys = pa.array(range(5), pa.int64())
    catalogue = Catalogue(keys, keys.cast(pa.large_string()), counts)
    user = rng.permutation(num_users)
    data = read(user, [9] * num_users, timestamp=user)  # an item that the catalogue lacks
    for power in (0.75, 0.0, 1.0):
        events = make_events(data, Negatives(catalogue, power=power, seed=1))
        item = events.item_keys.take(pa.array(events.item_index[events.level == 1])).to_numpy()
        share = np.bincount(item, minlength=5) / num_users
        wanted = counts**power / (counts**power).sum()
        # five standard deviations
        assert (abs(share - wanted) < 5 * np.sqrt(wanted / num_users)).all()


def test_negatives_do_not_depend_on_other_users_or_on_the_catalogue_order():
    data = make()
    how = Negatives(Catalogue.from_interactions(data), n=2, seed=5)
    whole = by_user(make_events(data, how))
    for rows in ([0], [3, 10, 11], np.arange(20, data.num_users)):
        block = by_user(make_events(data.select_users(np.array(rows)), how))
        assert block == {key: whole[key] for key in block}
    assert by_user(make_events(data, Negatives(how.catalogue, n=2, seed=6))) != whole


def test_more_events_change_a_draw_only_where_it_fell_on_a_new_item():
    data = make(events=900)
    how = Negatives(Catalogue.from_interactions(data), n=2)
    later = groups(make_events(data, how), 2)
    kept = changed = 0
    for length in (1, 3, 8):
        part = data.first_events(length)
        new = {key: {item for item, _ in rows[length:]} for key, rows in later.items()}
        for key, rows in groups(make_events(part, how), 2).items():
            for (item, before), (item_then, after) in zip(rows, later[key], strict=False):
                assert item == item_then
                for a, b in zip(before, after, strict=True):
                    if a in new[key]:
                        assert b not in new[key]
                        changed += 1
                    else:
                        assert a == b
                        kept += 1
    assert kept > changed > 0


def test_the_future_is_never_looked_at():
    """Items chosen later are fair negatives: leaving them out would tell that they are chosen."""
    data = make(events=900)
    how = Negatives(Catalogue.from_interactions(data), n=2)
    past = groups(make_events(data.first_events(2), how), 2)
    whole = groups(make_events(data, how), 2)
    future = {key: {item for item, _ in rows[2:]} for key, rows in whole.items()}
    hits = sum(bool(future[key] & set(neg)) for key, rows in past.items() for _, neg in rows)
    assert hits > 0


def test_repeats_of_an_item_meet_different_negatives():
    items = [0] * 30
    data = read([1] * 30, items, timestamp=range(30))
    how = Negatives(Catalogue.from_interactions(make()))
    assert len({n for _, (n,) in groups(make_events(data, how), 1)[1]}) > 3


def test_a_log_of_other_items_uses_its_own_and_then_the_catalogue():
    catalogue = Catalogue.from_interactions(make(items=20))
    items = pa.table({"item_id": [3, 777], "title": ["three, renamed", "new"]})
    table = pa.table({"user_id": [1, 2], "item_id": [3, 777]})
    data = uf.read_interactions(table, items)
    events = make_events(data, Negatives(catalogue, n=8))
    keys, texts = events.item_keys.to_pylist(), events.item_text.to_pylist()
    assert keys[:2] == [3, 777]
    assert texts[:2] == ["three, renamed", "new"]
    assert len(set(keys)) == len(keys)
    assert set(keys[2:]) <= set(range(20)) - {3}
    assert texts[2:] == [f"t{key}" for key in keys[2:]]
    assert events.item_index.max() == len(keys) - 1


def test_users_who_saw_nearly_everything():
    everything = list(range(30))
    data = read([1] * 29 + [2] * 30, everything[:-1] + everything, timestamp=range(59))
    how = Negatives(Catalogue.from_interactions(data), n=2)
    events = by_user(make_events(data, how))
    assert [item for item, word in events[1] if word == "passed over"] == [29] * 58
    assert events[2] == [(item, "chosen") for item in everything]  # nothing is left to pass over


def test_bad_negatives_are_refused():
    catalogue = Catalogue.from_interactions(make())
    for options, message in (
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"power": -1.0}, "power must be finite and not negative"),
        ({"power": float("nan")}, "power must be finite"),
        ({"words": ("a", "a")}, "distinct"),
        ({"words": ("a", "b", "c")}, "two words"),
    ):
        with pytest.raises(DataError, match=message):
            Negatives(catalogue, **options)
    table = pa.table({"user_id": [1], "item_id": ["x"], "title": ["X"]})
    with pytest.raises(MismatchError, match="items are large_string here and int64"):
        make_events(uf.read_interactions(table), Negatives(catalogue))

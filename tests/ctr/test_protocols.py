"""Splits leak nothing: no profile changes when test events do, no row knows its own label."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import small_log

from userip_fast.config import Config
from userip_fast.ctr.cells import data_digest
from userip_fast.ctr.config import CTRConfig
from userip_fast.ctr.features import Profiles
from userip_fast.ctr.protocols import make_task
from userip_fast.data import read_interactions
from userip_fast.errors import ConfigError, DataError

GENRES = ("fantasy", "romance", "science", "comics")


def log(users=60, events=12, items=40, rated=True, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 2 * events, users)
    user = np.repeat(np.arange(users), lengths)
    item = np.concatenate([random.permutation(items)[:n] for n in lengths])
    columns = {"user_id": user, "item_id": item, "time": np.arange(len(user))}
    if rated:
        columns["rating"] = np.where(item % 4 == user % 4, 5, random.integers(1, 5, len(user)))
    table = pa.table(
        {
            "item_id": np.arange(items),
            "title": [f"{GENRES[i % 4]} book {i}" for i in range(items)],
            "genres": [GENRES[i % 4] + ("|new" if i % 3 == 0 else "") for i in range(items)],
        }
    )
    rating = "rating" if rated else None
    return read_interactions(pa.table(columns), table, time="time", rating=rating)


@pytest.mark.parametrize("rated", [True, False])
@pytest.mark.parametrize("protocol", ["new-users", "cold", "warm"])
def test_rows_and_what_their_profile_knows(protocol, rated):
    data = log(rated=rated)
    ctr = CTRConfig(protocol=protocol, first=3, warm_rows=8, rows_per_user=9)
    task = make_task(data, ctr)
    known = [set(), set(), set()]
    for v, view in enumerate(task.views):
        rows = task.data.user_index(view.user_keys)[view.users_of_events()]
        known[v] = set(zip(rows.tolist(), view.item_index.tolist()))
    learned = task.data.user_index(task.learn.user_keys)[task.learn.users_of_events()]
    learned = set(zip(learned.tolist(), task.learn.item_index.tolist()))
    test = {
        (u, i) for u, i, y in zip(task.test.user, task.test.item, task.test.label) if y or rated
    }
    assert not test & learned
    assert not any(test & seen for seen in known)
    for rows in (task.train, task.valid, task.test):
        assert len(rows)
        for u, i, v, y in zip(rows.user, rows.item, rows.view, rows.label):
            assert (u, i) not in known[v], "a row's own event must not be in its profile"
            if not rated and not y:  # sampled: never an item that training knows the user has
                assert (u, i) not in learned
    if protocol == "new-users":
        assert not set(task.test.user) & (set(task.train.user) | set(task.valid.user))
        assert set(np.diff(task.views[0].offsets)) == {3}
    else:
        trained = np.bincount(
            task.data.user_index(task.learn.user_keys)[task.learn.users_of_events()],
            minlength=task.data.num_users,
        )
        few = trained[np.unique(task.test.user)]
        assert few.max() <= 5 if protocol == "cold" else few.min() >= 8
        assert task.user_ids == (protocol == "warm")
    if not rated:
        assert task.test.label.mean() == pytest.approx(1 / 5, abs=0.02)


@pytest.mark.parametrize("protocol", ["new-users", "cold", "warm"])
def test_a_profile_does_not_change_when_test_events_do(protocol, tmp_path, monkeypatch):
    """Every item and rating of every test event is replaced: learned centres and codes stay."""
    data = log()
    ctr = CTRConfig(protocol=protocol, first=3, warm_rows=8)
    task = make_task(data, ctr)
    test = set(zip(task.test.user.tolist(), task.test.item.tolist()))
    rows = task.data.user_index(data.user_keys)[data.users_of_events()]
    later = np.array([(u, i) in test for u, i in zip(rows.tolist(), data.item_index.tolist())])
    assert later.any()
    item = data.item_index.copy()
    item[later] = (item[later] + 1) % data.num_items
    assert data.rating is not None
    rating = np.where(later, 6 - data.rating, data.rating).astype(np.float32)
    other = make_task(replace(data, item_index=item, rating=rating), ctr)
    assert not np.array_equal(other.test.item, task.test.item)
    np.testing.assert_array_equal(other.train.item, task.train.item)
    np.testing.assert_array_equal(other.train.label, task.train.label)
    # A feature is a function of what is learned from and of the view, and of nothing else.
    assert data_digest(task.learn) == data_digest(other.learn)
    assert [*map(data_digest, task.views)] == [*map(data_digest, other.views)]
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path))
    fields = [{"name": "taste", "prompt": "taste", "codebook_size": 3}]
    tiny = Config().override(dict(s.split("=") for s in small_log.TINY))
    config = Config.from_dict({**tiny.to_dict(), "fields": fields})
    features = ["random", "kmeans_attributes", "kmeans_tfidf", "mf_clusters"]
    if protocol == "new-users":
        features.append("ids")
    for feature in features:
        codes = [
            [p.codes(feature, view, 0) for view in t.views]
            for t in (task, other)
            for p in [Profiles(t.learn, config)]
        ]
        for a, b in zip(*codes):
            np.testing.assert_array_equal(a, b)


def test_learning_is_the_same_for_every_n_and_no_new_user_takes_part():
    data = log()
    tasks = [make_task(data, CTRConfig(first=n)) for n in (2, 5)]
    assert tasks[0].learn.user_keys.equals(tasks[1].learn.user_keys)
    for task in tasks:
        tested = task.data.user_keys.take(pa.array(np.unique(task.test.user)))
        assert not set(tested.to_pylist()) & set(task.learn.user_keys.to_pylist())


def test_labels():
    data = log()
    assert data.rating is not None
    assert make_task(data, CTRConfig(first=3)).label == "rating>=4"
    task = make_task(data, CTRConfig(first=3, label="rating>=5"))
    assert 0.2 < task.test.label.mean() < 0.45
    with pytest.raises(ConfigError, match="rating>=Q"):
        CTRConfig(label="price<3")
    with pytest.raises(DataError, match="needs ratings"):
        make_task(log(rated=False), CTRConfig(first=3, label="rating>=4"))
    with pytest.raises(DataError, match="both labels"):
        make_task(data, CTRConfig(first=3, label="rating>=9"))
    with pytest.raises(DataError, match="more than first=500 events"):
        make_task(data, CTRConfig(first=500))


@pytest.mark.parametrize("damage", ["drop:0.5", "noise:0.5", "shuffle"])
@pytest.mark.parametrize("protocol", ["new-users", "warm"])
def test_damage_reaches_test_profiles_only(protocol, damage):
    data = log()
    ctr = CTRConfig(protocol=protocol, first=6, warm_rows=8)
    clean, hurt = make_task(data, ctr), make_task(data, replace(ctr, damage=damage))
    np.testing.assert_array_equal(clean.test.item, hurt.test.item)
    assert clean.views[-1].num_users == hurt.views[-1].num_users  # a history keeps one event
    if protocol == "warm":
        for a, b in zip(clean.views[:2], hurt.views[:2]):
            np.testing.assert_array_equal(a.item_index, b.item_index)
    else:
        new = np.isin(np.arange(clean.data.num_users), clean.test.user)
        kept, other = (t.views[0].select_users(np.flatnonzero(~new)) for t in (clean, hurt))
        np.testing.assert_array_equal(kept.item_index, other.item_index)
    assert not np.array_equal(clean.views[-1].item_index, hurt.views[-1].item_index)
    if damage == "shuffle":
        a, b = (set(zip(t.views[-1].users_of_events(), t.views[-1].item_index, t.views[-1].rating))
                for t in (clean, hurt))  # fmt: skip
        assert a == b


def test_profiles_of_an_earlier_period():
    data = log(users=80)
    data = replace(data, time=np.arange(data.num_events) % 24 * 1_000_000)
    order = np.lexsort((data.time, data.users_of_events()))
    assert data.rating is not None
    data = replace(
        data, time=data.time[order], item_index=data.item_index[order], rating=data.rating[order]
    )
    task = make_task(data, CTRConfig(first=2, period="earlier"))
    assert task.learn.time is not None
    assert task.data.time is not None
    assert task.learn.time.max() < task.data.time.min()

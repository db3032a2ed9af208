"""Splits leak nothing: three sets of users, and no test event or own label changes a feature."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import small_log

from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError, DataError
from userip_fast.ctr.cells import Cells, data_digest
from userip_fast.ctr.config import CHOSEN, CTRConfig
from userip_fast.ctr.features import Profiles
from userip_fast.ctr.inputs import PARTS, SIDES, Inputs
from userip_fast.ctr.protocols import MATCHED, REPEAT, Task, make_task
from userip_fast.data import read_interactions

GENRES = ("fantasy", "romance", "science", "comics")


FIELDS = [{"name": "taste", "prompt": "taste", "codebook_size": 3}]


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


def keys(task: Task, users) -> set[int]:
    return set(task.data.user_keys.take(pa.array(np.unique(users))).to_pylist())


def pairs(task: Task, data) -> set[tuple[int, int]]:
    rows = task.data.user_index(data.user_keys)[data.users_of_events()]
    return set(zip(rows.tolist(), data.item_index.tolist()))


@pytest.mark.parametrize("label", ["ratings", "chosen", "unrated"])
@pytest.mark.parametrize("protocol", ["new-users", "cold", "warm"])
def test_rows_and_what_their_profile_knows(protocol, label):
    data = log(rated=label != "unrated")
    ctr = CTRConfig(
        protocol=protocol, first=3, warm_rows=8, rows_per_user=9,
        label="chosen" if label == "chosen" else None,
    )  # fmt: skip
    task = make_task(data, ctr)
    assert task.choices == (label != "ratings")
    known = [pairs(task, view) for view in task.views]
    test = {
        (u, i)
        for u, i, y in zip(task.test.user, task.test.item, task.test.label)
        if y or not task.choices
    }
    assert not any(test & seen for seen in known)
    assert not test & pairs(task, task.pool)
    for name in SIDES:
        rows = getattr(task, name)
        assert len(rows)
        for u, i, v, y in zip(rows.user, rows.item, rows.view, rows.label):
            assert (u, i) not in known[v], "a row's own event must not be in its profile"
            if task.choices and not y:  # sampled: never an item that training knows the user has
                assert (u, i) not in pairs(task, task.pool)
    # Three sets of users, disjoint by key.
    teach = set(task.learn.user_keys.to_pylist())
    train = keys(task, np.concatenate([task.train.user, task.valid.user]))
    tested = keys(task, task.test.user)
    assert not teach & (train | tested)
    assert not teach & set(task.pool.user_keys.to_pylist())
    if protocol == "new-users":
        assert not train & tested
        assert not tested & set(task.pool.user_keys.to_pylist())
        assert set(np.diff(task.views[0].offsets)) == {3}
        assert (task.fold[np.unique(task.test.user)] == -1).all()
    else:
        trained = np.bincount(
            task.data.user_index(task.pool.user_keys)[task.pool.users_of_events()],
            minlength=task.data.num_users,
        )
        few = trained[np.unique(task.test.user)]
        assert few.max() <= 5 if protocol == "cold" else few.min() >= 8
        assert task.user_ids == (protocol == "warm")
    # A user's fold is the same as a row and as a history.
    at = task.data.user_index(task.pool.user_keys)
    there = (at >= 0) & (task.fold[np.maximum(at, 0)] >= 0)
    np.testing.assert_array_equal(task.fold[at[there]], task.pool_fold[there])
    if task.choices:
        counts = task.test.kind == 0
        assert task.test.label[counts].mean() == pytest.approx(1 / 5, abs=0.03)


@pytest.mark.parametrize("label", ["ratings", "chosen"])
def test_items_held_out_are_known_to_test_rows_alone(label):
    ctr = CTRConfig(
        first=3, rows_per_user=9, hold_items=0.3, label=CHOSEN if label == "chosen" else None
    )
    data = log()
    task, whole = make_task(data, ctr), make_task(data, replace(ctr, hold_items=0.0))
    named = task.data.item_keys
    held = np.zeros(len(named), bool)
    held[np.unique(task.test.item)] = True
    for known in (task.learn, task.pool, *task.views):
        held[known.item_index] = False
    share = held.mean()
    assert 0.15 < share < 0.45
    for rows in (task.train, task.valid):
        assert not held[rows.item].any()
    own = task.test.kind == 0
    assert held[task.test.item[own & (task.test.label > 0)]].mean() == pytest.approx(share, abs=0.1)
    # Negatives are drawn by what is popular in truth: rarity does not give held-out items away.
    if label == CHOSEN:
        none = own & (task.test.label == 0)
        assert held[task.test.item[none]].mean() == pytest.approx(share, abs=0.1)
    chosen = [t.test.item[(t.test.kind == 0) & (t.test.label > 0)] for t in (task, whole)]
    np.testing.assert_array_equal(*map(np.sort, chosen))
    with pytest.raises(ConfigError, match="hold_items"):
        CTRConfig(protocol="cold", hold_items=0.2)


def test_repeats_and_matched_rows_stand_apart():
    """Everyone buys item 0 again and again; items 1 to 9 are bought often, the others seldom."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(80), 12)
    item = np.where(
        np.arange(len(user)) % 3 == 0, 0,
        np.where(random.random(len(user)) < 0.5, random.integers(1, 10, len(user)),
                 random.integers(10, 80, len(user))),
    )  # fmt: skip
    table = pa.table({"user_id": user, "item_id": item, "time": np.arange(len(user))})
    items = pa.table({"item_id": np.arange(80), "title": [f"thing {i}" for i in range(80)]})
    data = read_interactions(table, items, time="time")
    task = make_task(data, CTRConfig(first=5, negatives=2))
    assert not (task.train.item[task.train.label == 1] == 0).any()  # in every profile
    repeats = task.test.take(task.test.kind == REPEAT)
    assert (repeats.item == 0).mean() > 0.5
    assert repeats.label.all()
    matched = task.test.take(task.test.kind == MATCHED)
    assert not matched.label.any()
    seen = task.learn.item_counts() + task.pool.item_counts()
    once = task.test.take((task.test.kind == 0) & (task.test.label == 1))
    often = {kind: seen[rows.item].mean() for kind, rows in (("own", once), ("matched", matched))}
    assert often["matched"] == pytest.approx(often["own"], rel=0.35)
    assert len(matched) > 0.9 * len(once)


def inputs_of(task):
    tiny = Config().override(dict(s.split("=") for s in small_log.TINY)).to_dict()
    tiny["data"]["behaviour_context"] = "independent"
    tiny["em"] |= {"estep": "posterior", "rounds": 1, "codeword_steps": 1}
    config = Config.from_dict({**tiny, "fields": FIELDS})
    return Inputs(task, CTRConfig(), Profiles(task.learn, config), Cells(None))


def columns_of(task, features):
    inputs = inputs_of(task)
    parts = dict.fromkeys(p for f in features for p in ("base", *PARTS[f]))
    return {
        (part, side, c.name): c.values
        for part in parts
        for side, columns in inputs.part(part, 0).items()
        for c in columns
    }


WITHOUT_LM = (
    "none", "random", "generosity", "kmeans_attributes", "kmeans_tfidf", "mf_clusters", "mixture",
    "foldin", "history", "text", "all",
)  # fmt: skip


@pytest.mark.parametrize("label", [None, "chosen"])
@pytest.mark.parametrize("protocol", ["new-users", "cold", "warm"])
def test_a_feature_does_not_change_when_test_events_do(protocol, label, tmp_path, monkeypatch):
    """Every item and rating of every test event is replaced: what training rows see stays."""
    pytest.importorskip("implicit")
    data = log()
    ctr = CTRConfig(protocol=protocol, first=3, warm_rows=8, label=label)
    task = make_task(data, ctr)
    test = {
        (task.data.user_keys[int(u)].as_py(), int(i))
        for u, i in zip(task.test.user, task.test.item)
    }
    whose = np.array(data.user_keys.to_pylist())[data.users_of_events()].tolist()
    place = np.arange(data.num_events) - data.offsets[:-1][data.users_of_events()]
    later = np.array([(u, i) in test for u, i in zip(whose, data.item_index.tolist())]) & (
        place >= 3
    )
    assert later.any()
    item = data.item_index.copy()
    # Of items that occur elsewhere too: which items there are is no secret.
    item[later] = random_items(data, later)
    assert data.rating is not None
    rating = np.where(later, 6 - data.rating, data.rating).astype(np.float32)
    other = make_task(replace(data, item_index=item, rating=rating), ctr)
    assert not np.array_equal(other.test.item, task.test.item)
    for side in ("train", "valid"):
        for name in ("user", "item", "view", "label"):
            np.testing.assert_array_equal(
                getattr(getattr(task, side), name), getattr(getattr(other, side), name)
            )
    # Profiles are functions of what is learned from and of the view, and of nothing else.
    assert data_digest(task.learn) == data_digest(other.learn)
    assert [*map(data_digest, task.views)] == [*map(data_digest, other.views)]
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path))
    features = [
        *WITHOUT_LM,
        *(["ids", "ids_prob"] if (protocol, label) == ("new-users", None) else []),
    ]
    before, after = columns_of(task, features), columns_of(other, features)
    assert before.keys() == after.keys()
    for key, x in before.items():
        if key[1] != "test":
            np.testing.assert_array_equal(x, after[key], err_msg=str(key))


def random_items(data, later):
    rest = np.unique(data.item_index[~later])
    return np.random.default_rng(0).choice(rest, int(later.sum())).astype(np.int32)


@pytest.mark.parametrize("protocol", ["new-users", "warm"])
def test_a_training_users_labels_reach_none_of_its_own_features(protocol):
    """The ratings of its rows are turned round; its features stay, and others' may change."""
    pytest.importorskip("implicit")
    data = log()
    assert data.rating is not None
    ctr = CTRConfig(protocol=protocol, first=3, warm_rows=8, label="rating>=4")
    task = make_task(data, ctr)
    who = int(np.bincount(task.train.user).argmax())
    key = task.data.user_keys[who].as_py()
    row = int(data.user_index(pa.array([key]))[0])
    place = np.arange(data.num_events) - data.offsets[:-1][data.users_of_events()]
    mine = (data.users_of_events() == row) & (place >= (3 if protocol == "new-users" else 0))
    if protocol == "warm":  # of one parity: the others are its profile
        mine &= place % 2 == 0
    other = make_task(
        replace(data, rating=np.where(mine, 6 - data.rating, data.rating).astype(np.float32)), ctr
    )
    before, after = columns_of(task, WITHOUT_LM), columns_of(other, WITHOUT_LM)
    rows = task.train.user == who
    if protocol == "warm":
        rows &= task.train.view == 0  # what reads the odd places
    assert rows.any()
    assert (task.train.label[rows] != other.train.label[rows]).any()
    changed = False
    for name, x in before.items():
        if name[1] != "train":
            continue
        # Columns are scaled by all training rows together, so compare the raw order of numbers.
        if name[2].startswith(("code", "random", "generosity", "kmeans", "mf_", "history")):
            np.testing.assert_array_equal(x[rows], after[name][rows], err_msg=str(name))
        changed |= not np.array_equal(x[~rows], after[name][~rows])
    assert changed  # of the users in other folds
    raw, turned = inputs_of(task), inputs_of(other)
    for kind in ("base", "foldin", "text", "attribute_affinity", "popularity"):
        now = turned.number_part(kind)["train"]
        for name, x in raw.number_part(kind)["train"].items():
            np.testing.assert_array_equal(x[rows], now[name][rows], err_msg=name)


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
    with pytest.raises(ConfigError, match="must be below 1"):
        CTRConfig(new_fraction=0.5, rows_fraction=0.5)
    assert make_task(data, CTRConfig(first=3, label="chosen")).label.startswith("chosen, against 4")
    with pytest.raises(DataError, match="fewer than folds=40"):
        make_task(data, CTRConfig(first=3, folds=40))
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

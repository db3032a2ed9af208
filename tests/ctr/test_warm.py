"""Warm users keep their codes where these help, and are scored without them elsewhere."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_planted import GENRES

from userip_fast.core.errors import DataError
from userip_fast.ctr import CTRConfig, evaluate_ctr
from userip_fast.ctr.features import Profiles
from userip_fast.ctr.protocols import make_task
from userip_fast.ctr.results import UNHURT, run_plan, write_page
from userip_fast.ctr.warm import held_out_parts, judge_codes, warm_rows
from userip_fast.data import read_interactions
from userip_fast.report.words import left_out_in_words

ITEMS, KINDS, FEW, MANY = 48, 4, 2000, 200
MODES = "help", "hurt"


def log(mode, seed=0):
    """2,000 users of 6 events and 200 of 40, whose kind likes a genre; where codes hurt, of those
    with 40 all but this one: most rows, and so what is learned of codes, are of the others."""
    random = np.random.default_rng(seed)
    events = np.repeat([6, 40], [FEW, MANY])
    user = np.repeat(np.arange(FEW + MANY), events)
    item = np.concatenate([random.permutation(ITEMS)[:n] for n in events])
    kind = random.integers(0, KINDS, FEW + MANY)
    likes = item % 4 == kind[user]
    if mode == "hurt":
        likes ^= (events == 40)[user]
    p = np.where(likes, 0.8, 0.3) * np.linspace(0.6, 1.1, ITEMS)[item]
    table = {"user_id": user, "item_id": item, "time": np.arange(len(user)),
             "rating": np.where(random.random(len(user)) < p, 5, 1)}  # fmt: skip
    items = {"item_id": np.arange(ITEMS), "genres": [GENRES[i % 4] for i in range(ITEMS)]}
    data = read_interactions(
        pa.table(table), pa.table(items), rating="rating", time="time", text="{genres}"
    )
    return data, kind


def evaluated(mode, out=None, **ctr):
    """With codes that are the planted kinds."""
    data, kind = log(mode)

    def read(self, feature, view, seed):
        codes = kind[view.user_keys.to_numpy()][:, None]
        return {"codes": codes, "probabilities": np.eye(KINDS, dtype=np.float32)[codes[:, 0]]}

    config = {"fields": [{"name": "kind", "prompt": "kind", "codebook_size": KINDS}]}
    how = {"protocol": "warm", "seeds": 2, "bootstrap": 100, "backbones": ("lightgbm",),
           "features": ("none", "ids", "ids_prob"), "user_statistics": False, **ctr}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Profiles, "read", read)
        patch.setattr(Profiles, "lm_model", None)
        return evaluate_ctr(data, ctr=CTRConfig(**how), config=config, out=out, show=False)


@pytest.mark.parametrize("mode", MODES)
def test_codes_stay_where_they_help_and_go_where_they_hurt(mode, tmp_path):
    pytest.importorskip("lightgbm")
    result = evaluated(mode, tmp_path)
    area = {f: by["lightgbm"] for f, by in result["auc"].items()}
    for feature in ("ids", "ids_prob"):
        told = result["left_out"][feature]["lightgbm"]
        d = result["paired"]["lightgbm"].get(f"{feature} - none")
        d = d or result["paired"]["lightgbm"]["against"]["none"]
        assert told["rows_from"] == 20
        assert told["held_out"]["users"] == result["rows"]["test_users"]
        assert told["held_out"]["rows"] > 20 * told["held_out"]["users"]
        if mode == "help":
            assert not told["left_out"]
            assert told["held_out"]["ci95"][0] > 0.05
            assert d == told["kept_in"] or d["difference"] == pytest.approx(
                told["kept_in"]["difference"]
            )
            assert d["difference"] > 0.05
        else:
            assert told["left_out"]
            assert told["held_out"]["ci95"][1] < 0
            assert told["kept_in"]["ci95"][1] < 0  # what it would have cost
            assert area[feature] == area["none"]
            assert d["difference"] == 0
            assert d["ci95"] == [0, 0]
    lines = left_out_in_words(result["left_out"])
    assert len(lines) == 2
    verb = "stay in" if mode == "help" else "are left out of"
    assert (
        f"lightgbm, ids: codes {verb} the scores of users with 20 training rows or more" in lines[0]
    )
    assert ("kept in, it is -0." in lines[0]) == (mode == "hurt")
    # Its words are in every place that tells results; a file of before has none.
    found = {"made up": {"ratings": {"warm": result}}}
    write_page(tmp_path / "page.md", {"datasets": {"made up": {}}}, found, "command")
    page = (tmp_path / "page.md").read_text()
    assert lines[0] in page
    assert f"Of 1 pairs of warm users codes are left out in {int(mode == 'hurt')}" in page
    assert f"warm users not hurt by IDs (lower bound at least {UNHURT}) | 1 of 1" in page
    assert left_out_in_words(None) == []


def test_no_test_row_decides(monkeypatch):
    """With all labels of test rows turned round, the decision and what it rests on are the same."""
    pytest.importorskip("lightgbm")
    before = evaluated("hurt", seeds=1, features=("none", "ids"))["left_out"]["ids"]["lightgbm"]
    real = make_task

    def turned(data, ctr):
        task = real(data, ctr)
        return replace(task, test=replace(task.test, label=1 - task.test.label))

    monkeypatch.setattr("userip_fast.ctr.evaluate.make_task", turned)
    after = evaluated("hurt", seeds=1, features=("none", "ids"))["left_out"]["ids"]["lightgbm"]
    assert (before["left_out"], before["held_out"]) == (after["left_out"], after["held_out"])
    assert before["kept_in"]["difference"] == pytest.approx(-after["kept_in"]["difference"])


def test_rows_are_scored_once_by_what_was_trained_without_them():
    ctr = CTRConfig(protocol="warm")
    task = make_task(log("help")[0], ctr)
    mask = warm_rows(task, ctr)
    users, counts = np.unique(task.train.user[mask], return_counts=True)
    lengths = task.data.history_lengths[users]
    assert (lengths == 40).all()
    assert 0 < mask.sum() < len(mask)
    assert (counts >= 20).all()
    scored = []
    for rows, held in held_out_parts(task, ctr):
        assert not set(rows) & set(held)
        assert len(rows) + len(held) == len(task.train)
        assert mask[held].all()
        scored += held.tolist()
    assert sorted(scored) == np.flatnonzero(mask).tolist()


def test_who_owns_a_recommender_may_decide_alike():
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(200), 10)
    label = (random.random(2000) < 0.5).astype(int)
    good, bad = label + random.normal(0, 1, (2, 2000)), random.normal(0, 1, (2, 2000))
    kept = judge_codes(label, user, list(bad), list(good))
    assert kept["keep"]
    assert kept["ci95"][0] > 0.1
    assert (kept["rows"], kept["users"]) == (2000, 200)
    assert not judge_codes(label, user, list(good), list(bad))["keep"]
    same = judge_codes(label, user, list(good), list(good))
    assert not same["keep"]
    assert same["ci95"] == [0, 0]
    # Too few rows to tell: codes go.
    few = judge_codes(label[:60], user[:60], [good[0][:60]], [good[1][:60]])
    assert not few["keep"]
    one = judge_codes(np.ones(5), np.arange(5), [np.arange(5.0)], [np.arange(5.0)])
    assert not one["keep"]
    assert one["difference"] is None
    for args in (
        (label[1:], user, [good[0]], [good[1]]),
        (label, user, [good[0]], [good[1][1:]]),
        (label, user, list(good), [good[1]]),
        (label, user, [], []),
    ):
        with pytest.raises(DataError, match="judge_codes: label, user and every score"):
            judge_codes(*args)


def test_other_protocols_leave_nothing_out():
    pytest.importorskip("lightgbm")
    found = evaluated("hurt", protocol="new-users", first=3, seeds=1, features=("none", "ids"))
    assert found["left_out"] is None
    assert found["auc"]["ids"] != found["auc"]["none"]


def test_results_of_another_rule_are_measured_anew(tmp_path, monkeypatch):
    """What was measured before codes were left out stands on the page until then."""
    pq.write_table(log("help")[0].items, tmp_path / "items.parquet")
    pq.write_table(
        pa.table({"user_id": [1, 1], "item_id": [0, 1], "rating": [1, 5]}), tmp_path / "log.parquet"
    )
    plan = {
        "evaluations": {"warm": {"protocol": "warm"}, "new": {"protocol": "new-users"}},
        "datasets": {"made up": {"interactions": "log.parquet", "items": "items.parquet",
                                 "labels": ["ratings"],
                                 "data": {"rating": "rating", "text": "{genres}"}}},
    }  # fmt: skip
    ran = []

    def evaluate(data, *, ctr, **_):
        ran.append(ctr.protocol)
        return {"number": len(ran)}

    monkeypatch.setattr("userip_fast.ctr.results.evaluate_ctr", evaluate)

    def run(**how):
        found = run_plan(plan, tmp_path, tmp_path / "out", show=False, **how)
        return {e: r["number"] for e, r in found["made up"]["ratings"].items()}

    assert run() == run() == {"warm": 1, "new": 2}
    for name in ("warm", "new"):
        stamp = tmp_path / "out" / "made up" / "ratings" / name / "settings.json"
        said = json.loads(stamp.read_text())
        said.pop("codes_kept", None)  # as a release wrote it that kept them all
        stamp.write_text(json.dumps(said))
    assert run(seconds=0) == {"warm": 1, "new": 2}
    assert ran == ["warm", "new-users"]
    assert run() == {"warm": 3, "new": 2}

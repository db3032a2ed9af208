"""`evaluate_ctr` and `userip ctr` end to end on a generated log with planted tastes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
import torch
import yaml
from test_protocols import log
from typer.testing import CliRunner

from userip_fast import cli
from userip_fast.core.errors import DataError, UnavailableError
from userip_fast.ctr import BACKBONES, DEFAULT_FEATURES, CTRConfig, evaluate_ctr
from userip_fast.ctr.backbones import build, check_installed, train_and_predict
from userip_fast.ctr.cells import Cells
from userip_fast.ctr.inputs import Column, History, Number
from userip_fast.ctr.vectors import attribute_matrix
from userip_fast.data.attributes import item_attributes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import results_table

FIELDS = {"fields": [{"name": "taste", "prompt": "taste", "codebook_size": 4}]}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_learn_and_repeat(backbone):
    """Labels follow a product of two columns, or a number; the linear model tells the number."""
    pytest.importorskip("lightgbm" if backbone == "lightgbm" else "torch_rechub")
    random = np.random.default_rng(0)
    a, b, many = (random.integers(1, 4, (1600, w)) for w in (1, 1, 2))
    number = random.normal(size=1600).astype(np.float32)
    columns = [Column("a", 4, a[:, 0]), Column("b", 4, b[:, 0]), Column("m", 4, many),
               Number("x", number)]  # fmt: skip
    ctr = CTRConfig(batch=100, epochs=15, lr=0.03)
    state = torch.random.get_rng_state()
    for label, told in (((a == b)[:, 0], backbone != "lr"), (number > 0.3, True)):
        right, score, again = learned(backbone, columns, label, ctr)
        assert right > 0.93 if told else right < 0.8
    if backbone in ("dcn", "lightgbm"):
        np.testing.assert_array_equal(score, again)
    assert torch.equal(state, torch.random.get_rng_state())


def learned(backbone, columns, label, ctr):
    """Share of test rows told right, and the scores of two runs."""
    label = label.astype(np.float32)

    def rows(s):
        return [replace(c, values=c.values[s]) for c in columns]

    parts = [rows(s) for s in (slice(0, 1000), slice(1000, 1300), slice(1300, None))]
    score, again = (
        train_and_predict(
            backbone, parts[0], label[:1000], parts[1], label[1000:1300], parts[2], ctr, 0
        )
        for _ in range(2)
    )
    return ((score > 0.5) == (label[1300:] > 0.5)).mean(), score, again


def test_din_reads_the_history_and_the_numbers():
    """Label 1 where the item is of the same half as the profile's items, or the number is high."""
    pytest.importorskip("torch_rechub")
    random = np.random.default_rng(0)
    half, item = random.integers(0, 2, 1600), random.integers(0, 2, 1600)
    history = 1 + random.integers(0, 10, (1600, 5)) + 10 * half[:, None]
    history[:, 3:] = 0
    columns = [Column("item", 21, 1 + random.integers(0, 10, 1600) + 10 * item),
               History("history", "item", history)]  # fmt: skip
    ctr = CTRConfig(batch=100, epochs=15, lr=0.03)
    number = Number("x", random.normal(size=1600).astype(np.float32))
    assert learned("din", [*columns, number], half == item, ctr)[0] > 0.93
    assert learned("din", [*columns, number], number.values > 0.3, ctr)[0] > 0.93


def test_without_its_libraries_it_says_what_to_install(monkeypatch):
    for module, backbone in (("torch_rechub.basic.features", "dcn"), ("lightgbm", "lightgbm")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UnavailableError, match=r"\(extra ctr\): pip install"):
            check_installed((backbone,))
    with pytest.raises(UnavailableError, match=r"\(extra ctr\): pip install"):
        build("dcn", [Column("a", 2, np.zeros(1, np.int64))], CTRConfig())


def test_attributes():
    data = log()
    found = {a.name: a for a in item_attributes(data.items, None)}
    assert set(found) == {"genres"}  # 40 titles are names
    assert found["genres"].size == 6  # four genres, "new", and nothing
    share = attribute_matrix([found["genres"]])
    np.testing.assert_allclose(share.sum(1), 1)
    assert (np.sort(share, axis=1)[:, -2:] == [0.5, 0.5]).all(1).sum() == 14  # genre and "new"
    with pytest.raises(DataError, match="no column 'colour'"):
        evaluate_ctr(data, ctr=CTRConfig(attributes=("colour",)))


def test_a_column_of_300_tags_is_used():
    """300 tags on 900 items: kept are the 256 most frequent, and both readers get them."""
    data = log(items=40)
    tags = [f"{i % 4}|tag{i % 300}" for i in range(900)]
    items = pa.table({"item_id": np.arange(900), "title": ["x"] * 900, "tags": tags})
    data = replace(data, items=items, item_keys=pa.array(np.arange(900)),
                   item_text=pa.array(["x"] * 900, pa.large_string()))  # fmt: skip
    (tags,) = (a for a in item_attributes(data.items, None) if a.name == "tags")
    assert (tags.distinct, tags.size) == (304, 257)
    assert set(np.unique(tags.values)) == set(range(257))
    counts = np.bincount(tags.values.ravel())[1:]
    assert (np.diff(counts) <= 0).all()  # numbered by frequency


def test_codes_of_planted_tastes_lift_a_product_model(tmp_path):
    pytest.importorskip("torch_rechub")
    data = log(users=500, items=40)
    ctr = CTRConfig(
        first=8, seeds=1, bootstrap=50, backbones=("dcn",), label="rating>=5",
        epochs=20, features=("none", "random", "kmeans_attributes", "history"),
        attributes=("genres",),
        batch=128, lr=5e-3,
    )  # fmt: skip
    found = evaluate_ctr(data, ctr=ctr, config=FIELDS, out=tmp_path)
    assert set(found["auc"]["history"]) == {"din"}  # a feature with a backbone of its own
    assert set(found["auc"]["none"]) == {"dcn"}
    dcn = {f: by["dcn"]["mean"] for f, by in found["auc"].items() if f != "history"}
    assert dcn["kmeans_attributes"] > max(dcn["none"], dcn["random"]) + 0.1
    low, high = found["auc"]["none"]["dcn"]["ci95"]
    assert low < dcn["none"] < high
    assert found["relative_improvement"]["kmeans_attributes"]["dcn"] == (
        None if dcn["none"] <= 0.5 else (dcn["kmeans_attributes"] - 0.5) / (dcn["none"] - 0.5) - 1
    )
    # Resumed, nothing is trained anew and the result is the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("userip_fast.ctr.evaluate.train_and_predict", None)
        patch.setattr("userip_fast.ctr.features.Profiles.read", None)
        assert evaluate_ctr(data, ctr=ctr, config=FIELDS, out=tmp_path) == found


def test_a_torn_cell_is_made_again(tmp_path):
    cells = Cells(tmp_path)
    key = {"kind": "codes", "seed": 3}
    made = []

    def compute():
        made.append(1)
        return {"x": np.arange(5)}

    for _ in range(2):
        np.testing.assert_array_equal(cells.get(key, compute)["x"], np.arange(5))
    assert len(made) == 1
    path = cells.path(key, ".npz")
    path.write_bytes(path.read_bytes()[:40])
    np.testing.assert_array_equal(cells.get(key, compute)["x"], np.arange(5))
    assert len(made) == 2


def test_command_line(tmp_path):
    pytest.importorskip("torch_rechub")
    log_path, items = small_log.write(tmp_path)
    table = pq.read_table(items).drop(["genres"])
    pq.write_table(table.append_column("shelf", [[str(i) for i in range(len(table))]]), items)
    args = [
        "ctr", "--interactions", log_path, "--items", items, "--rating", "rating", "--text",
        "{title}", "--time", "timestamp", "--protocol", "new-users", "--first", "2", "--seeds", "1",
        "--field", "taste:Taste is:2", "--field", "critic:Critic is:3", "--backbones", "dcn",
        "--features", ",".join([*DEFAULT_FEATURES, "paper"]),
        "--out", str(tmp_path / "out"),
        "--attributes", "shelf", *(f"--set={s}" for s in small_log.TINY), "--set=em.paper_epochs=1",
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "ctr.json").read_text())
    assert set(found["auc"]) == {*DEFAULT_FEATURES, "paper"} == set(found["logloss"])
    for measure in ("auc", "logloss"):
        for feature, by in found[measure].items():
            backbone = "din" if feature == "history" else "dcn"
            assert set(by[backbone]) >= {"mean", "std", "seeds"}
            assert len(by[backbone]["seeds"]) == 1
    assert set(found["floor"]) == {"item_rate", "popularity"}
    assert set(found["unseen"]) == {"positives", "negatives"}
    assert set(found["codes"]) == {"0"}
    assert found["ranking"] is None  # of choices only
    assert found["attributes"] == {"shelf": {"values": 24, "kept": 24}}
    assert found["protocol"] == "new-users"
    assert found["first"] == 2
    assert found["label"].startswith("rating>=")
    assert found["rows"]["train"] > found["rows"]["test"] > 0
    assert found["sizes"] == [2, 3]
    assert "ids - " in done.stdout

    args[args.index("--attributes") + 1] = "nothing"
    refused = CliRunner().invoke(cli.app, args)
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--label", "rating>=9"], "do not have both labels"),
        (["--label", "price<3"], "must be 'rating>=Q'"),
        (["--attributes", "colour"], "no column 'colour'"),
        (["--first", "500"], "no user has more than first=500 events"),
        (["--max-users", "4"], "fewer than folds=5"),
        (["--features", "none,luck"], "must be some of"),
        (["--protocol", "warm", "--period", "earlier"], "goes with protocol new-users"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, says, tmp_path):
    log_path, items = small_log.write(tmp_path)
    args = ["ctr", "--interactions", log_path, "--items", items, "--rating", "rating", "--text",
            "{title}", "--first", "2", "--features", "none", "--backbones", "lightgbm", "-q",
            "--out", str(tmp_path / "out"), *flags]  # fmt: skip
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 2, done.output
    told = [line for line in done.output.splitlines() if line.strip()]
    assert len(told) == 1, done.output
    assert says in told[0]
    assert not (tmp_path / "out" / "ctr.json").exists()


def test_a_feature_the_data_cannot_have_is_null_with_its_reason(tmp_path):
    pytest.importorskip("torch_rechub")
    data = log(items=70)
    data = replace(data, items=data.items.select(["item_id", "title"]))
    ctr = CTRConfig(
        first=3, seeds=1, bootstrap=5, backbones=("lr",), features=("none", "kmeans_attributes")
    )
    found = evaluate_ctr(data, ctr=ctr, config=FIELDS, out=tmp_path)
    assert found["auc"]["kmeans_attributes"] is None
    assert "--attributes" in found["reasons"]["kmeans_attributes"]
    assert found["auc"]["none"]["lr"]["mean"] > 0


def test_the_results_command_resumes_and_tells_what_is_missing(tmp_path):
    """A plan of two evaluations on a generated log, as `--quick` in an even smaller form."""
    pytest.importorskip("torch_rechub")
    small_log.write(tmp_path)
    plan = {
        "ctr": {"seeds": 1, "backbones": ["lr"], "features": ["none", "kmeans_attributes", "ids"],
                "bootstrap": 20, "epochs": 3},
        "config": {"em": {"steps": 1, "rounds": 1, "kmeans_restarts": 1},
                   "lm": {"embedded_tokens": 3000, "embedded_layers": 1, "embedded_hidden": 32,
                          "embedded_vocab": 320}},
        "quick": {"ctr": {"epochs": 1}},
        "evaluations": {"new": {"protocol": "new-users", "first": 2}, "cold": {"protocol": "cold"},
                        "shuffled": {"protocol": "new-users", "damage": "shuffle", "first": 2}},
        "datasets": {
            "generated": {
                "about": "Made up.", "interactions": "interactions.parquet",
                "items": "items.parquet", "data": {"rating": "rating", "time": "timestamp"},
                "labels": ["ratings", "choices"],
                "fields": [{"name": "taste", "prompt": "taste", "codebook_size": 3}],
            }
        },
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    args = ["--plan", str(tmp_path / "plan.yaml"), "--data", str(tmp_path), "--quick",
            "--out", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")]  # fmt: skip
    assert results_table.main([*args, "--only", "new"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert page.count("Not run yet.") == 4
    assert results_table.main(args) == 0
    page = (tmp_path / "page.md").read_text()
    assert "Not run yet." not in page
    assert page.count("| ids - none |") == 6
    assert "of 2 |" in page  # damaged histories are no part of the verdict
    figures = json.loads((tmp_path / "page.json").read_text())
    assert set(figures["generated"]) == {"ratings", "choices"}
    assert "settings" not in figures["generated"]["ratings"]["new"]
    area = figures["generated"]["choices"]["cold"]["auc"]["ids"]["lr"]["mean"]
    assert f"{area:.4f}" in page
    assert set(figures["generated"]["choices"]["cold"]["ranking"]) >= {"popularity", "foldin"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("userip_fast.ctr.results.evaluate_ctr", None)
        assert results_table.main(args) == 0
    assert (tmp_path / "page.md").read_text() == page

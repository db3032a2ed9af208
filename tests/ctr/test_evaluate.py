"""`evaluate_ctr` and `userip ctr` end to end on a generated log with planted tastes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_log
import torch
import yaml
from test_protocols import log
from typer.testing import CliRunner

from userip_fast import cli
from userip_fast.ctr import BACKBONES, FEATURES, CTRConfig, evaluate_ctr
from userip_fast.ctr.backbones import Column, build, train_and_predict
from userip_fast.ctr.cells import Cells
from userip_fast.ctr.vectors import attribute_matrix, item_attributes
from userip_fast.errors import DataError, UnavailableError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import results_table

FIELDS = {"fields": [{"name": "taste", "prompt": "taste", "codebook_size": 4}]}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_learn_and_repeat(backbone):
    """Labels follow a product of two columns: all but the linear model can tell."""
    pytest.importorskip("torch_rechub")
    random = np.random.default_rng(0)
    a, b, many = (random.integers(1, 4, (1600, w)) for w in (1, 1, 2))
    columns = [Column("a", 4, a[:, 0]), Column("b", 4, b[:, 0]), Column("m", 4, many)]
    label = (a == b)[:, 0].astype(np.float32)
    ctr = CTRConfig(batch=100, epochs=15, lr=0.03)

    def run(seed):
        parts = [[Column(c.name, c.size, c.values[s]) for c in columns]
                 for s in (slice(0, 1000), slice(1000, 1300), slice(1300, None))]  # fmt: skip
        return train_and_predict(
            backbone, parts[0], label[:1000], parts[1], label[1000:1300], parts[2], ctr, seed
        )

    state = torch.random.get_rng_state()
    score = run(0)
    assert torch.equal(state, torch.random.get_rng_state())
    if backbone == "dcn":
        np.testing.assert_array_equal(score, run(0))
    right = ((score > 0.5) == (label[1300:] > 0.5)).mean()
    assert right > 0.95 if backbone != "lr" else right < 0.8


def test_without_torch_rechub_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_rechub.basic.features", None)
    with pytest.raises(UnavailableError, match=r"userip-fast\[ctr\]"):
        build("dcn", [Column("a", 2, np.zeros(1, np.int64))], CTRConfig())


def test_attributes():
    data = log()
    found = {a.name: a for a in item_attributes(data, None)}
    assert set(found) == {"genres", "title"}  # 40 titles are few values
    assert found["genres"].size == 6  # four genres, "new", and nothing
    share = attribute_matrix([found["genres"]])
    np.testing.assert_allclose(share.sum(1), 1)
    assert (np.sort(share, axis=1)[:, -2:] == [0.5, 0.5]).all(1).sum() == 14  # genre and "new"
    with pytest.raises(DataError, match="no column 'colour'"):
        evaluate_ctr(data, ctr=CTRConfig(attributes=("colour",)))


def test_codes_of_planted_tastes_lift_a_product_model(tmp_path):
    pytest.importorskip("torch_rechub")
    data = log(users=160, items=40)
    ctr = CTRConfig(
        first=8, seeds=1, bootstrap=50, backbones=("dcn",), label="rating>=5",
        epochs=8, features=("none", "random", "kmeans_attributes"),
        attributes=("genres",),
        batch=128, lr=5e-3,
    )  # fmt: skip
    found = evaluate_ctr(data, ctr=ctr, config=FIELDS, out=tmp_path)
    dcn = {f: by["dcn"]["mean"] for f, by in found["auc"].items()}
    assert dcn["kmeans_attributes"] > max(dcn["none"], dcn["random"]) + 0.1
    low, high = found["auc"]["none"]["dcn"]["ci95"]
    assert low < dcn["none"] < high
    assert found["relative_improvement"]["kmeans_attributes"]["dcn"] == (
        None if dcn["none"] <= 0.5 else (dcn["kmeans_attributes"] - 0.5) / (dcn["none"] - 0.5) - 1
    )
    # Resumed, nothing is trained anew and the result is the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("userip_fast.ctr.evaluate.train_and_predict", None)
        patch.setattr("userip_fast.ctr.features.Profiles.codes", None)
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
        "--out", str(tmp_path / "out"),
        "--attributes", "shelf", *(f"--set={s}" for s in small_log.TINY), "--set=em.paper_epochs=1",
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "ctr.json").read_text())
    assert set(found["auc"]) == set(FEATURES) == set(found["logloss"])
    for measure in ("auc", "logloss"):
        for by in found[measure].values():
            assert set(by["dcn"]) >= {"mean", "std", "seeds"}
            assert len(by["dcn"]["seeds"]) == 1
    assert found["protocol"] == "new-users"
    assert found["first"] == 2
    assert found["label"].startswith("rating>=")
    assert found["rows"]["train"] > found["rows"]["test"] > 0
    assert found["sizes"] == [2, 3]
    assert "ids - " in done.stdout

    args[args.index("--attributes") + 1] = "nothing"
    refused = CliRunner().invoke(cli.app, args)
    assert refused.exit_code == 2


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
                "fields": [{"name": "taste", "prompt": "taste", "codebook_size": 3}],
            }
        },
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    args = ["--plan", str(tmp_path / "plan.yaml"), "--data", str(tmp_path), "--quick",
            "--out", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")]  # fmt: skip
    assert results_table.main([*args, "--only", "new"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert page.count("Not run yet.") == 2
    assert results_table.main(args) == 0
    page = (tmp_path / "page.md").read_text()
    assert "Not run yet." not in page
    assert page.count("| ids - none |") == 3
    assert "| 2 |" in page or "of 2 |" in page  # damaged histories are no part of the verdict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("userip_fast.ctr.results.evaluate_ctr", None)
        assert results_table.main(args) == 0
    assert (tmp_path / "page.md").read_text() == page

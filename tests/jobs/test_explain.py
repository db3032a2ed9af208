"""Items, examples and associations of codes; and the report that shows them."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
import torch
from typer.testing import CliRunner

from userip_fast import cli
from userip_fast.bank import FeatureBank
from userip_fast.core.config import Config
from userip_fast.core.errors import DataError, FormatError, MismatchError
from userip_fast.data import read_interactions
from userip_fast.jobs.explain import association, explain
from userip_fast.jobs.fit import fit
from userip_fast.report.write import report_run


def test_association_finds_what_is_there_and_nothing_else():
    random = np.random.default_rng(0)
    codes = random.integers(0, 4, 400)
    trait = np.where(random.random(400) < 0.6, codes % 2, random.integers(0, 2, 400))
    found = association(codes, trait, 199, random)
    assert found["p"] == 1 / 200
    assert found["bits"] > found["chance_bits"] + 0.1
    ps = [
        association(codes, random.integers(0, 3, 400), 49, np.random.default_rng(i))["p"]
        for i in range(40)
    ]
    assert 0.3 < np.mean(ps) < 0.7  # uniform where there is nothing
    trait[::2] = -1
    assert association(codes, trait, 9, random)["users"] == 200


def test_bits_of_a_known_table():
    x = np.array([0, 0, 1, 1])
    assert association(x, x, 1, np.random.default_rng(0))["bits"] == pytest.approx(1.0)
    assert association(x, np.array([0, 1, 0, 1]), 1, np.random.default_rng(0))["bits"] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fitted run on the small log, with a users table: `twin` is a code, `coin` is not."""
    folder = tmp_path_factory.mktemp("explained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERIP_FAST_CACHE", str(folder / "cache"))
        log, items = small_log.write(folder)
        data = read_interactions(log, items, rating="rating", time="timestamp")
        sets = ("em.estep=gradient", *small_log.TINY)
        config = Config().override(dict(s.split("=") for s in sets))
        fields = [{"name": "taste", "prompt": "Taste is", "codebook_size": 3}]
        config = Config.from_dict({**config.to_dict(), "fields": fields})
        config = replace(config, data=replace(config.data, rating="rating", time="timestamp"))
        model = fit(data, config=config, out=folder / "run")
        yield folder, model, data, log, items


def test_explain(run):
    folder, model, data, _, _ = run
    users = data.user_keys.to_pylist()
    codes = model.infer(data)[:, 0]
    table = pa.table(
        {
            "user_id": [*users[::-1], 999],
            "twin": [f"t{c}" for c in codes[::-1]] + ["t0"],
            "same": ["x"] * (len(users) + 1),
        }
    )
    found = explain(model, data, table, permutations=50, out=folder / "run")
    assert set(found["associations"]["taste"]) == {"twin"}  # one value tells nothing
    assert found["associations"]["taste"]["twin"]["users"] == len(users)
    assert found["associations"]["taste"]["twin"]["p"] < 0.05
    told = found["fields"]["taste"]["codes"]
    assert sum(c["users"] for c in told) == len(users)
    for card in told:
        assert card["users"] == (codes == card["code"]).sum()
        for example in card["examples"]:
            assert codes[users.index(example["user"])] == card["code"]
            assert ": " in example["behaviour"]
            assert example["p"] is None  # a nearest codeword has no probability
        if card["users"]:
            assert card["typical"]
        assert not set(card["contrastive"]) & set(card["avoided"])
    assert json.loads((folder / "run" / "explain.json").read_text()) == json.loads(
        json.dumps(found)
    )
    em = replace(model.config.em, estep="posterior")
    sure = explain(replace(model, config=replace(model.config, em=em), trainer=None), data)
    for card in sure["fields"]["taste"]["codes"]:
        p = [example["p"] for example in card["examples"]]
        assert all(0.33 <= x <= 1 for x in p)  # of three codes, the likeliest
        assert p == sorted(p, reverse=True)
    with pytest.raises(DataError, match="none of the users"):
        explain(model, data, pa.table({"user_id": [12345], "a": ["x"]}))


def test_the_bank_is_read_and_nobody_is_inferred_again(run, monkeypatch):
    folder, model, data, _, _ = run
    users = data.user_keys.to_pylist()
    age = pa.table({"user_id": users, "age": np.arange(len(users)) * 1.5, "few": users})
    bank = FeatureBank.open(folder / "run" / "bank")
    inferred = explain(model, data, age, permutations=20)
    monkeypatch.setattr(type(model), "infer", None)
    found = explain(model, data, age, bank=bank, permutations=20)
    assert found == inferred
    # 30 ages are quartiles, so that chance alone does not tell 30 of them apart.
    assert found["associations"]["taste"]["age"]["chance_bits"] < 0.5
    other = replace(
        model, codebooks=[b.reordered(torch.tensor([2, 0, 1])) for b in model.codebooks]
    )
    with pytest.raises(MismatchError, match="another model"):
        explain(other, data, bank=bank)
    strangers = replace(data, user_keys=pa.array(np.arange(5000, 5000 + len(users))))
    with pytest.raises(DataError, match="none of the users"):
        explain(model, strangers, bank=bank)


def test_command_line_and_the_whole_report(run):
    folder, _, data, log, items = run
    pq.write_table(
        pa.table({"user_id": data.user_keys, "age": ["old", "young"] * (data.num_users // 2)}),
        folder / "users.parquet",
    )
    args = ["explain", str(folder / "run"), "--interactions", log, "--items", items,
            "--users", str(folder / "users.parquet"), "--permutations", "19", "-q"]  # fmt: skip
    done = CliRunner().invoke(cli.app, args)
    assert done.exit_code == 0, done.output
    assert "taste and age:" in done.stdout
    metric = {"mean": 0.7, "std": 0.01, "seeds": [0.7], "ci95": [0.69, 0.71]}
    against = {"none": {"difference": 0.02, "ci95": [0.01, 0.03], "p": 0.01}}
    ctr = {
        "auc": {"none": {"dcn": metric}, "kmeans_attributes": None, "ids": {"dcn": metric}},
        "reasons": {"kmeans_attributes": "no <column>"}, "protocol": "cold", "label": "rating>=4",
        "paired": {"dcn": {"best_cluster": None, "against": against}},
        "settings": {"features": ["none", "kmeans_attributes", "ids"], "backbones": ["dcn"]},
        "floor": {"item_rate": 0.61, "popularity": 0.6}, "warnings": ["mind the <gap>"],
        "codes": {"0": {"perplexity": [3.2], "dead": [1], "largest": [0.4], "bits": {},
                        "generosity_share": [0.75]}},
    }  # fmt: skip
    (folder / "run" / "cold").mkdir()
    (folder / "run" / "cold" / "ctr.json").write_text(json.dumps(ctr))
    truth = {"taste": {"traits": ["a", "b"], "counts": [[3, 0, 1], [0, 5, 0]]}}
    (folder / "run" / "confusion.json").write_text(json.dumps(truth))
    done = CliRunner().invoke(cli.app, ["report", str(folder / "run")])
    assert done.exit_code == 0, done.output
    page = (folder / "run" / "report.html").read_text()
    for text in ("Training of the LM", "EM: ", "users of each taste code", "codewords",
                 "planted trait and code", "shared bits", "Most met", "no &lt;column&gt;",
                 "item rate 0.6100", "mind the &lt;gap&gt;", "dead 1"):  # fmt: skip
        assert text in page, text
    assert not re.search("https?://", page)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no run folder"):
        report_run(tmp_path)

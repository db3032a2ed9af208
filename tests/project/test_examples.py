"""The four examples run on the real data sets, and their comments tell the counts that come out."""

import importlib.util
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
import tiny
from typer.testing import CliRunner

import userip_fast as uf
from userip_fast import cli
from userip_fast.data.read import read_interactions
from userip_fast.serve import Server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DATA = {
    "completejourney": "completejourney-sample",
    "goodbooks": "goodbooks-10k-sample",
    "movietweetings": "movietweetings-142k",
    "online_retail": "online-retail-ii",
}
USERS = 40


def commands(name, *args, tmp_path):
    """The argument lists with which the script would call `userip`."""
    stub = tmp_path / "stub.sh"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" END\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["sh", EXAMPLES / f"{name}.sh", *map(str, args)],
        env={"USERIP": str(stub), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [part.split("\n") for part in done.stdout.removesuffix("\nEND\n").split("\nEND\n")]


def run(args):
    result = CliRunner().invoke(cli.app, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_example_is_here():
    assert sorted(DATA) == sorted(path.stem for path in EXAMPLES.glob("*.sh"))


@pytest.mark.parametrize("name", DATA)
def test_example(name, shared_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    read = {}

    def read_once(*args, **kwargs):
        key = repr((args, kwargs))
        if key not in read:
            read[key] = read_interactions(*args, **kwargs)
        return read[key]

    monkeypatch.setattr("userip_fast.data.read_interactions", read_once)
    data, out = shared_dir / "data" / DATA[name], tmp_path / "run"
    tiny = [x for setting in small_log.TINY for x in ("--set", setting)] + ["--estep", "gradient"]
    fit, infer, lookup = commands(name, data, out, USERS, *tiny, tmp_path=tmp_path)
    assert (fit[0], infer[0], lookup[:2]) == ("fit", "infer", ["bank", "lookup"])

    script = (EXAMPLES / f"{name}.sh").read_text()
    told = dict(re.findall(r"^#   (\S.*?) ([\d,]+)$", script, re.MULTILINE))
    assert {"users", "events"} <= set(told)
    printed = run(fit)
    (interactions,) = read.values()
    for what in ("users", "items", "events"):
        if what in told:
            assert f"{getattr(interactions, f'num_{what}'):,}" == told.pop(what)
    for rule in told:
        assert re.search(rf"^{re.escape(rule)} +{told[rule]}$", printed, re.MULTILINE), rule
    codes = run(infer)
    assert len(read) == 1, "infer read with other columns or rules than fit"
    assert re.search(rf"users +│ {USERS} ", codes)
    bank = uf.FeatureBank.open(out / "inferred", verify=True)
    assert len(bank) == USERS
    assert (bank.codes() == uf.FeatureBank.open(out / "bank").codes()).all()
    keys = lookup[lookup.index("code") + 1 :]
    assert (interactions.user_index(bank.coerce_keys(keys)) >= 0).all()  # in the bank of all users
    table = run(lookup)
    assert all(f"│ {key} " in table for key in keys)


def test_features_of_a_bank_reach_both_recommenders(tmp_path, capsys):
    """Labels follow affinities of the users' codes, and are told so; strangers have features."""
    for module in ("lightgbm", "torch_rechub", "sklearn"):
        pytest.importorskip(module)
    spec = importlib.util.spec_from_file_location("features", EXAMPLES / "features.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    paths = small_log.write(tmp_path)
    data = read_interactions(*paths, rating="rating", time="timestamp")
    config = {
        "data": {"behaviour_context": "independent", "chunk_tokens": 64},
        "em": {"estep": "posterior", "rounds": 1, "start": "random"},
        "fields": [{"name": "taste", "prompt": "", "codebook_size": 4}],
    }
    run = tmp_path / "run"
    uf.fit(data, tiny.frozen("llama"), config=config, out=run, profiles=True)
    server = Server.open(run / "model", bank=run / "bank")
    random = np.random.default_rng(0)
    user, item = random.integers(0, small_log.USERS + 3, 2500), random.integers(0, 24, 2500)
    keys = np.arange(small_log.USERS + 3)
    p = server.lookup_profiles(keys, on_unknown="code")
    affinity = server.affinity(p, list(range(24)))[user, item]
    label = (affinity > np.median(affinity)).astype(int)
    rows = pa.table({"user_id": user, "item_id": item, "label": label})
    pq.write_table(rows, tmp_path / "rows.parquet")
    sparse, dense = example.features(server, rows)
    assert sparse["taste"][user >= small_log.USERS].tolist() == [4] * (user >= 30).sum()
    np.testing.assert_allclose(dense["affinity"], np.log(affinity), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sum(dense[f"p{k}"] for k in range(4)), 1, rtol=1e-3)
    example.main(run, tmp_path / "rows.parquet")
    told = dict(re.findall(r"(\w+): AUC ([\d.]+)", capsys.readouterr().out))
    assert float(told["LightGBM"]) > 0.95
    assert float(told["DCN"]) > 0.7

"""Profiles as a table: what `infer`, `profile` and `top_items` say, user by user."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_log
import tiny
from typer.testing import CliRunner

import userip_fast as uf
from userip_fast import cli
from userip_fast.core.config import Config, DataConfig, EMConfig
from userip_fast.core.errors import ConfigError, MismatchError
from userip_fast.jobs.profiles import export_profiles
from userip_fast.jobs.shards import infer_shard, merge_shards
from userip_fast.serve import Server

FIELDS = (uf.ProfileField("taste", "", 1, 3), uf.ProfileField("habit", "likes", 1, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    lm = tiny.frozen("llama")
    paths = small_log.write(folder)
    data = uf.read_interactions(*paths, rating="rating", time="timestamp")
    config = Config(
        data=DataConfig(behaviour_context="independent", chunk_tokens=64),
        em=EMConfig(rounds=1, start="random", block_users=7),
        fields=FIELDS,
    )
    model = uf.fit(data, lm, config=config, out=folder / "run", profiles=True)
    return model, data, folder, paths


def test_a_row_is_a_users_profile(made):
    model, data, folder, _ = made
    assert export_profiles(model, data, folder / "p.parquet", top=4) == data.num_users
    table = pq.read_table(folder / "p.parquet")
    names = ["user_id", "taste", "taste_p", "habit", "habit_p", "top_items", "top_scores"]
    assert table.column_names == names
    bank = uf.FeatureBank.open(folder / "run" / "bank")
    users = table["user_id"].to_pylist()
    codes = np.stack([table["taste"].to_numpy(), table["habit"].to_numpy()], axis=1)
    np.testing.assert_array_equal(bank.lookup(users), codes)
    p = [np.stack(table[f"{f.name}_p"].to_numpy(zero_copy_only=False)) for f in FIELDS]
    for own, k in zip(p, codes.T):
        np.testing.assert_allclose(own.sum(1), 1, rtol=1e-5)
        np.testing.assert_array_equal(own.argmax(1), k)
    joint = p[0][:, :, None] * p[1][:, None, :]
    items, scores = model.top_items(joint.reshape(len(users), -1), 4)
    assert table["top_items"].to_pylist() == items.tolist()
    np.testing.assert_allclose(np.stack(table["top_scores"].to_numpy()), scores, rtol=1e-5)


def test_the_command_line_writes_the_same(made):
    _, data, folder, paths = made
    told = ["--interactions", paths[0], "--items", paths[1], "--rating", "rating"]
    told += ["--time", "timestamp", "--out", folder / "cli.parquet", "--quiet"]
    asked = ["profiles", "--model", folder / "run" / "model", *told]
    done = CliRunner().invoke(cli.app, [str(a) for a in asked])
    assert done.exit_code == 0, done.output  # the LM is on no disk, and not needed
    assert f"profiles of {data.num_users} users" in done.output
    assert pq.read_table(folder / "cli.parquet").column_names[-1] == "habit_p"


def run(*args, code=0):
    done = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert done.exit_code == code, done.output
    return done.output


def test_a_bank_holds_the_profiles(made, tmp_path):
    """Of fit, infer and shards alike; exports and serving make of it what the model says."""
    model, data, folder, _ = made
    export_profiles(model, data, folder / "p.parquet", top=4)
    want = pq.read_table(folder / "p.parquet")
    users = want["user_id"].to_pylist()
    p = np.concatenate([np.stack(want[f"{f.name}_p"].to_numpy()) for f in FIELDS], axis=1)
    bank = uf.FeatureBank.open(folder / "run" / "bank", verify=True)
    np.testing.assert_allclose(bank.lookup_profiles(users), p, atol=3e-4)
    inferred = model.infer(data, tmp_path / "bank", profiles=True)
    assert inferred.digest == bank.digest
    for index in range(2):
        infer_shard(model, data, index, 2, tmp_path / "shards", profiles=True, show=False)
    assert merge_shards(tmp_path / "shards", tmp_path / "merged").digest == bank.digest
    path = infer_shard(model, data, 0, 2, tmp_path / "shards", show=False)  # made anew, without
    assert "taste_p" not in pq.read_table(path).column_names
    with pytest.raises(MismatchError, match="another --profiles than shard 0/2"):
        merge_shards(tmp_path / "shards", tmp_path / "merged")

    server = Server.open(folder / "run" / "model", bank=folder / "run" / "bank")
    joint = server.lookup_profiles(users)
    np.testing.assert_allclose(joint, np.einsum("ua,ub->uab", p[:, :3], p[:, 3:]).reshape(-1, 6),
                               atol=6e-4)  # fmt: skip
    stranger = server.lookup_profiles([10**9, users[0]], on_unknown="code")
    np.testing.assert_allclose(stranger[0], server.profile([], []), rtol=1e-5)
    np.testing.assert_allclose(stranger[1], joint[0], rtol=1e-6)
    items = want["top_items"][0].as_py()
    scores = server.affinity(joint[0], items)
    np.testing.assert_allclose(scores, want["top_scores"][0].as_py(), rtol=2e-3)

    model_, bank_ = folder / "run" / "model", folder / "run" / "bank"
    out = tmp_path / "b.parquet"
    told = run("bank", "export", bank_, out, "--model", model_, "--top", 4)
    assert f"{data.num_users} users" in told
    table = pq.read_table(out)
    assert table["user_id"].to_pylist() == users
    np.testing.assert_allclose(np.stack(table["top_scores"].to_numpy()),
                               np.stack(want["top_scores"].to_numpy()), rtol=2e-3)  # fmt: skip
    told = run("bank", "lookup", bank_, users[0], "--model", model_, "--top", 2)
    first = table["top_items"][0][0].as_py()
    assert f"{first} (" in told
    assert f"({p[0, :3].max():.0%}" in told
    assert "best items" not in run("bank", "lookup", bank_, users[0])
    assert "go together" in run("bank", "export", bank_, out, "--top", 4, code=2)
    assert "go together" in run("bank", "lookup", bank_, users[0], "--model", model_, code=2)
    codes = model.infer(data, tmp_path / "codes").path
    told = run(
        "bank", "export", codes, tmp_path / "c.parquet", "--model", model_, "--top", 4, code=2
    )
    assert "--profiles" in told
    assert not (tmp_path / "c.parquet").exists()


def test_an_update_keeps_what_the_bank_keeps(made, tmp_path):
    model, data, _, _ = made
    some, others = data.head_users(10), data.select_users(np.arange(10, data.num_users))
    model.infer(some, tmp_path / "bank", profiles=True)
    with pytest.raises(MismatchError, match=r"profiles: the bank .* has profiles"):
        model.infer(others, tmp_path / "bank", update=True)
    bank = model.infer(others, tmp_path / "bank", update=True, profiles=True)
    whole = model.infer(data, tmp_path / "whole", profiles=True)
    assert bank.digest == whole.digest


def test_what_cannot_be_told(made):
    model, data, folder, _ = made
    with pytest.raises(ConfigError, match="top=-1"):
        export_profiles(model, data, folder / "no.parquet", top=-1)
    em, how = EMConfig(estep="gradient", rounds=1, steps=1), DataConfig(chunk_tokens=64)
    gradient = Config(data=how, em=em, fields=FIELDS)
    other = uf.fit(data, tiny.frozen("llama"), config=gradient)
    with pytest.raises(ConfigError, match="posterior"):
        export_profiles(other, data, folder / "no.parquet")
    assert not (folder / "no.parquet").exists()
    with pytest.raises(ConfigError, match="a nearest codeword has none"):
        other.infer(data, folder / "none", profiles=True)
    with pytest.raises(ConfigError, match="a nearest codeword has none"):
        infer_shard(other, data, 0, 1, folder / "none", profiles=True)

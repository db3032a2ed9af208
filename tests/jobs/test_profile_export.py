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
from userip_fast.core.errors import ConfigError
from userip_fast.jobs.profiles import export_profiles

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
    return uf.fit(data, lm, config=config, out=folder / "run"), data, folder, paths


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

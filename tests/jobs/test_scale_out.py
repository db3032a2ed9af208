"""Streams, shards, several processes and Ray: everyone's codes, the same as in one process."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.distributed import Processes
from userip_fast.core.errors import ConfigError, DataError, MismatchError
from userip_fast.core.files import read_tensors
from userip_fast.data import sorting
from userip_fast.em import columns
from userip_fast.jobs import shards
from userip_fast.lm import PackedEngine
from userip_fast.prompts import stream as behaviour_stream

USERS = 60
FIELDS = (uf.ProfileField("taste", "The user's taste is", 1, 4), uf.ProfileField("b", "b", 1, 3))
EM = EMConfig(estep="gradient", steps=2, rounds=3, lr=0.2, block_users=7, codebook_update="ema")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(sorting, "_PART_ROWS", 50)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(USERS), 3)
    log = {
        "user_id": user,
        "item_id": random.integers(0, len(tiny.TEXTS), len(user)),
        "rating": random.integers(1, 6, len(user)),
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    items = pa.table({"item_id": range(len(tiny.TEXTS)), "title": tiny.TEXTS})
    pq.write_table(items, folder / "items.parquet")
    tiny.save("llama", folder / "lm")
    return folder


def config(files, **data):
    lm = LMConfig(path=str(files / "lm"), quantization="none")
    return Config(data=DataConfig(rating="rating", max_tokens=60, **data), lm=lm, em=EM,
                  fields=FIELDS)  # fmt: skip


def read(files, **how):
    return uf.read_interactions(files / "log.parquet", files / "items.parquet", **how)


def read_stream(files, work, **how):
    paths = files / "log.parquet", files / "items.parquet"
    return uf.stream_interactions(*paths, work=work, **how)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    uf.fit(read(files, rating="rating"), config=config(files), out=run)
    return run


def same_result(run, whole):
    a, b = (read_tensors(r / "model" / "codebooks.safetensors") for r in (run, whole))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name
    same_bank(uf.FeatureBank.open(run / "bank"), uf.FeatureBank.open(whole / "bank"))


def same_bank(a, b):
    assert a.keys().equals(b.keys())
    assert np.array_equal(a.codes(), b.codes())


@pytest.mark.parametrize("rated", [True, False])
def test_a_streamed_fit_is_the_fit_in_memory(files, whole, tmp_path, rated):
    if not rated:  # sampled negatives
        settings = replace(config(files), data=DataConfig(max_tokens=60))
        whole = tmp_path / "whole"
        uf.fit(read(files), config=settings, out=whole)
    else:
        settings = config(files)
    data = read_stream(files, tmp_path / "w", rating="rating" if rated else None)
    assert len(data._parts) > 2
    model = uf.fit(data, config=settings, out=tmp_path / "run")
    same_result(tmp_path / "run", whole)
    cards = (tmp_path / "run" / "model" / "codes.json").read_text()
    assert cards == (whole / "model" / "codes.json").read_text()
    same_bank(model.infer(data, tmp_path / "bank"), uf.FeatureBank.open(whole / "bank"))


def test_streamed_users_that_truncate_to_nothing_are_left_out(files, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(behaviour_stream, "_SURVEY_USERS", 16)
    settings = config(files)
    settings = replace(settings, data=replace(settings.data, max_tokens=11, chunk_tokens=11))
    with pytest.raises(DataError, match="truncates to nothing"):
        uf.fit(read_stream(files, tmp_path / "w", rating="rating"), config=settings)
    settings = replace(settings, data=replace(settings.data, on_bad="skip"))
    data = read_stream(files, tmp_path / "w", rating="rating")
    uf.fit(data, config=settings, out=tmp_path / "a")
    uf.fit(read(files, rating="rating"), config=settings, out=tmp_path / "b")
    same_result(tmp_path / "a", tmp_path / "b")
    left = len(uf.FeatureBank.open(tmp_path / "a" / "bank"))
    assert 4 <= left < USERS
    bounds = [data_range(uf.Model.load(tmp_path / "a" / "model"), data, i, 3) for i in range(3)]
    assert [b[0] for b in bounds[1:]] == [b[1] for b in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1]) == (0, left)


def data_range(model, data, i, n):
    return model.source(data, "skip").users_between(*shards.hash_range(i, n))


def test_shards_in_any_order_merge_into_the_same_bank(files, whole, tmp_path):
    model = uf.Model.load(whole / "model")
    data = read_stream(files, tmp_path / "w", rating="rating")
    paths = [shards.infer_shard(model, data, i, 5, tmp_path / "s") for i in (3, 0, 4, 1)]
    with pytest.raises(DataError, match="1 of 5 shards are missing: 2/5"):
        shards.merge_shards(tmp_path / "s", tmp_path / "bank")
    before = paths[0].stat().st_mtime_ns
    for i in range(5):
        shards.infer_shard(model, data, i, 5, tmp_path / "s")
    assert paths[0].stat().st_mtime_ns == before  # not made again
    bank = shards.merge_shards(tmp_path / "s", tmp_path / "bank")
    same_bank(bank, uf.FeatureBank.open(whole / "bank"))
    assert bank.model_fingerprint == model.fingerprint
    # Made again from other data, it does not belong to the rest.
    shards.infer_shard(model, data.head_users(40), 2, 5, tmp_path / "s")
    with pytest.raises(MismatchError, match="another data"):
        shards.merge_shards(tmp_path / "s", tmp_path / "bank")
    same_bank(uf.FeatureBank.open(tmp_path / "bank"), bank)


@pytest.mark.parametrize("text", ["", "3", "5/5", "-1/2", "1/0", "0/100000", "a/b"])
def test_a_shard_that_does_not_exist_is_refused(text):
    with pytest.raises(ConfigError, match="must be I/N"):
        shards.parse_shard(text)


def test_shards_cover_the_hash_space_once():
    for n in (1, 3, 7, 256, 1000):
        ranges = [shards.hash_range(i, n) for i in range(n)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == 1 << 64
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
    covered = [Processes(r, 3).owned_shards() for r in range(3)]
    assert covered == [(0, 85), (85, 170), (170, 256)]


def test_an_update_keeps_the_other_users(files, whole, tmp_path):
    model = uf.Model.load(whole / "model")
    data = read(files, rating="rating")
    first = data.head_users(40)
    model.infer(first, tmp_path / "bank")
    rest = data.select_users(np.arange(30, USERS))
    bank = model.infer(rest, tmp_path / "bank", update=True)
    same_bank(bank, uf.FeatureBank.open(whole / "bank"))
    assert bank.info()["generation"] == "gen-000002"


def torchrun_fit(files, out, *options, program=("-m", "userip_fast")):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        *program, "fit", "--interactions", files / "log.parquet",
        "--items", files / "items.parquet", "--rating", "rating", "--out", out,
        "--max-tokens", "60", "--lm", files / "lm", "--quantization", "none", "--quiet",
        "--field", "taste:The user's taste is:4", "--field", "b:b:3", *options,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(c) for c in command], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_torchrun_with_two_processes_gives_the_same_bits(files, whole, tmp_path):
    sets = [
        "estep=gradient",
        "rounds=3",
        "steps=2",
        "lr=0.2",
        "block_users=7",
        "codebook_update=ema",
    ]
    torchrun_fit(files, tmp_path / "run", *[x for s in sets for x in ("--set", f"em.{s}")])
    same_result(tmp_path / "run", whole)


def test_an_event_table_serves_streams_shards_and_processes_alike(files, tmp_path, monkeypatch):
    em = EMConfig(estep="posterior", rounds=2, gain=0.0, block_users=7)
    settings = replace(config(files, behaviour_context="independent"), em=em)
    whole = tmp_path / "whole"
    uf.fit(read(files, rating="rating"), config=settings, out=whole)
    data = read_stream(files, tmp_path / "w", rating="rating")
    uf.fit(data, config=settings, out=tmp_path / "stream")
    same_result(tmp_path / "stream", whole)
    loaded = uf.Model.load(whole / "model")
    monkeypatch.setattr(PackedEngine, "nll", None)  # all there is to read was read by the fit
    for i in (2, 0, 1):
        shards.infer_shard(loaded, data, i, 3, tmp_path / "s")
    bank = shards.merge_shards(tmp_path / "s", tmp_path / "bank")
    same_bank(bank, uf.FeatureBank.open(whole / "bank"))
    torchrun_fit(
        files, tmp_path / "run", "--estep", "posterior", "--behaviour-context", "independent",
        "--set", "em.rounds=2", "--set", "em.gain=0", "--set", "em.block_users=11",
    )  # fmt: skip
    same_result(tmp_path / "run", whole)


FEW_COLUMNS = """
from userip_fast import cli
from userip_fast.em import columns

columns.ALL, columns.MOST = 1, 8
if __name__ == "__main__":
    cli.app()
"""


def test_torchrun_chooses_the_columns_of_one_process(files, tmp_path, monkeypatch):
    """Where not all combinations of codes are columns of the event table: the same bytes."""
    monkeypatch.setattr(columns, "ALL", 1)
    monkeypatch.setattr(columns, "MOST", 8)
    em = EMConfig(estep="posterior", rounds=2, gain=0.0)
    settings = replace(config(files, behaviour_context="independent"), em=em)
    data = read(files, rating="rating")
    model = uf.fit(data, config=settings, out=tmp_path / "whole", profiles=True)
    assert len(model.calibration.columns) == 8 < 12
    (tmp_path / "few.py").write_text(FEW_COLUMNS)
    torchrun_fit(
        files, tmp_path / "run", "--estep", "posterior", "--behaviour-context", "independent",
        "--set", "em.rounds=2", "--set", "em.gain=0", "--profiles", program=[tmp_path / "few.py"],
    )  # fmt: skip
    same_result(tmp_path / "run", tmp_path / "whole")
    banks = [uf.FeatureBank.open(tmp_path / r / "bank") for r in ("run", "whole")]
    assert np.array_equal(*(bank.profiles for bank in banks))
    names = {p.name for p in (tmp_path / "whole" / "model").glob("*.parquet")}
    assert "columns.parquet" in names
    for name in {*names, "start.safetensors"}:
        ours, theirs = ((tmp_path / r / "model" / name).read_bytes() for r in ("run", "whole"))
        assert ours == theirs, name


# In a process of its own: Ray sets signal handlers and variables that it never puts back.
RAY_JOB = """
import sys
from pathlib import Path

import ray
from userip_fast.jobs.ray_job import infer_on_ray

whole, files, out = map(Path, sys.argv[1:])
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
paths = infer_on_ray(
    whole / "model", files / "log.parquet", files / "items.parquet",
    out=out / "s", work=out / "w", shards=3, rating="rating",
)
ray.shutdown()
print(*(p.name for p in paths))
"""


def test_a_ray_job_gives_the_same_ids(files, whole, tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'ray[data]'")
    command = [sys.executable, "-c", RAY_JOB, *map(str, (whole, files, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    names = [f"shard-0000{i}-of-00003.parquet" for i in range(3)]
    assert done.stdout.split()[-3:] == names
    same_bank(
        shards.merge_shards(tmp_path / "s", tmp_path / "bank"),
        uf.FeatureBank.open(whole / "bank"),
    )

"""Exports to Redis (a real server) and to Feast's layout."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from userip_fast.bank import FeatureBank
from userip_fast.bank.redis_export import RedisBank, connect, export_redis, redacted
from userip_fast.core.errors import (
    ConfigError,
    DataError,
    FormatError,
    MismatchError,
    UnavailableError,
    UserIPError,
)

try:
    import polars  # which sets an environment variable, so not in a test
except ImportError:
    polars = None

FIELDS = [
    {"name": "taste", "codebook_size": 300, "code_names": None},
    {"name": "habit", "codebook_size": 4, "code_names": None},
]


def bank(folder, keys, seed=0, model=None):
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, f["codebook_size"], len(keys)) for f in FIELDS], axis=1)
    model = f"m{seed}" if model is None else model
    made = FeatureBank.write(folder, keys, codes, fields=FIELDS, model_fingerprint=model)
    return made, codes


class Server:
    """A redis-server of our own, with a password."""

    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"redis://:secret@127.0.0.1:{port}/0"
        self.command = [
            "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "",
            "--appendonly", "no", "--dir", str(folder), "--requirepass", "secret",
        ]  # fmt: skip
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        for _ in range(100):
            try:
                connect(self.url)
                return
            except UnavailableError:
                time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def stop(self):
        self.process.kill()
        self.process.wait()


class NamedServer:
    """The one that the environment names, emptied."""

    def __init__(self, url):
        self.url = url
        connect(url).flushdb()


@pytest.fixture
def own_server(tmp_path):
    """One that may be stopped."""
    pytest.importorskip("redis", reason="needs the client: pip install redis")
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (apt-get install redis-server)")
    made = Server(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def server(request):
    if url := os.environ.get("USERIP_FAST_TEST_REDIS_URL"):
        pytest.importorskip("redis", reason="needs the client: pip install redis")
        return NamedServer(url)
    return request.getfixturevalue("own_server")


@pytest.mark.parametrize("strings", [False, True])
def test_redis_gives_what_the_bank_gives(server, tmp_path, strings):
    keys = [f"user:{i} é" for i in range(257)] if strings else np.arange(-50, 207)
    made, codes = bank(tmp_path / "bank", keys)
    version = export_redis(made, server.url, batch=100)
    online = RedisBank(server.url)
    assert np.array_equal(online.lookup(keys), codes)
    assert (online.version, online.model_fingerprint) == (version, "m0")
    unknown = ["nobody"] if strings else [10**12]
    with pytest.raises(DataError, match="1 of 1 are not in the bank"):
        online.lookup(unknown)
    assert online.lookup(unknown, on_unknown="code").tolist() == [[300, 4]]


@pytest.mark.parametrize("keys", [["a", "b", "ab"], [1, 2, 3]], ids=["string", "int64"])
def test_redis_is_as_strict_as_the_bank(server, tmp_path, keys):
    made, _ = bank(tmp_path / "bank", keys)
    export_redis(made, server.url)
    online = RedisBank(server.url)
    other = [1] if isinstance(keys[0], str) else ["1"]
    for asked in (
        keys, keys[2], keys[0], [], tuple(keys), np.array(keys), pa.array(keys), [keys[0]] * 3,
        ["nobody"] if isinstance(keys[0], str) else [99], other, other[0], [None], [1.5], [b"a"],
        [keys[0], *other], np.array([keys]),
    ):  # fmt: skip
        for on_unknown in ("error", "code", "codes", "", None):
            answers = []
            for reader in (made, online):
                try:
                    answers.append(reader.lookup(asked, on_unknown=on_unknown).tolist())
                except UserIPError as e:
                    text = str(e).replace(str(made.path), "BANK")
                    answers.append((type(e), text.replace(online._where, "BANK")))
            assert answers[0] == answers[1]


def test_a_value_that_is_none_is_refused(server, tmp_path):
    keys = np.arange(20)
    made, codes = bank(tmp_path / "bank", keys)
    version = export_redis(made, server.url)
    client, online = connect(server.url), RedisBank(server.url)
    name = f"userip:{version}:u:7"
    whole = client.get(name)
    for value in (
        b"",
        whole[:2],
        whole + b"\0\0",
        np.array([300, 1], "<u2").tobytes(),
        b"\xff" * 4,
    ):
        client.set(name, value)
        with pytest.raises(FormatError, match=r"user 7, must be .*; export the bank again"):
            online.lookup([6, 7, 8])
        assert np.array_equal(online.lookup([6, 8]), codes[[6, 8]])
    client.set(name, whole)
    assert np.array_equal(online.lookup(keys), codes)
    client.set(f"userip:{version}:about", b'{"fields": 3}')
    with pytest.raises(FormatError, match=f"version {version} is damaged"):
        online.lookup([1])


def test_a_reader_whose_version_is_gone_follows_its_model_or_says_so(server, tmp_path, monkeypatch):
    keys = np.arange(50)
    first, before = bank(tmp_path / "0", keys, 0, model="m")
    export_redis(first, server.url, version="v0")
    follows = RedisBank(server.url)
    for i in range(1, 4):
        made, codes = bank(tmp_path / f"{i}", keys, i, model="m")
        made.update(keys[:1], codes[:1]).update(keys[:1], codes[:1])  # its files are gone
        export_redis(made, server.url, version=f"v{i}")
        if i == 1:
            assert np.array_equal(follows.lookup(keys), before)  # one of the two that are kept
    assert np.array_equal(follows.lookup(keys), codes)
    assert follows.version == "v3"

    other, _ = bank(tmp_path / "other", keys, 5, model="n")
    stays = RedisBank(server.url)
    for i in range(4, 7):
        export_redis(other, server.url, version=f"v{i}")
    for _ in range(2):  # nor does it change over the second time
        with pytest.raises(MismatchError, match="version v3 is gone, and v6 is of another model"):
            stays.lookup(keys, on_unknown="code")
    stays.refresh()
    assert np.array_equal(stays.lookup(keys), other.lookup(keys))
    # A removal that was cut off removes too; and a name used again by another bank is not it.
    export_redis(first, server.url, version="v7")
    reader = RedisBank(server.url)
    monkeypatch.setattr("redis.Redis.unlink", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
    with pytest.raises(UnavailableError):
        export_redis(other, server.url, version="v8", keep=1)
    with pytest.raises(MismatchError, match="version v7 is gone"):
        reader.lookup(keys)
    monkeypatch.undo()
    export_redis(other, server.url, version="v7")
    with pytest.raises(MismatchError, match="version v7 is gone, and v7 is of another model"):
        reader.lookup(keys)


def test_a_redis_reader_goes_to_other_processes(server, tmp_path):
    keys = np.arange(50)
    made, codes = bank(tmp_path / "a", keys, 0)
    export_redis(made, server.url, version="v0")
    sent = pickle.dumps(RedisBank(server.url))
    export_redis(bank(tmp_path / "b", keys, 1)[0], server.url, version="v1")
    online = pickle.loads(sent)
    assert online.version == "v0"
    assert np.array_equal(online.lookup(keys), codes)


def test_a_new_version_replaces_the_old_one_and_older_ones_go(server, tmp_path):
    keys = np.arange(50)
    for seed in range(4):
        made, codes = bank(tmp_path / f"bank{seed}", keys, seed)
        export_redis(made, server.url, namespace="a.b", version=f"v{seed}")
    online = RedisBank(server.url, "a.b")
    assert online.version == "v3"
    assert np.array_equal(online.lookup(keys), codes)
    left = {k.decode().split(":")[1] for k in connect(server.url).scan_iter("a.b:*")}
    assert left == {"current", "versions", "v2", "v3"}
    with pytest.raises(FormatError, match="holds no bank named 'other'"):
        RedisBank(server.url, "other")


def test_a_name_that_is_used_again_holds_no_user_of_before(server, tmp_path, monkeypatch):
    """Complete or cut off, other users' keys of an earlier bank are gone; readers are kept."""
    old, _ = bank(tmp_path / "old", np.arange(0, 500), 0)
    new, codes = bank(tmp_path / "new", np.arange(400, 600), 1)
    export_redis(old, server.url, version="a")
    with pytest.raises(ConfigError, match="version='a': readers use a version of that name"):
        export_redis(new, server.url, version="a")
    assert export_redis(old, server.url, version="a") == "a"  # the same bank: written again
    assert RedisBank(server.url).model_fingerprint == "m0"

    export_redis(old, server.url, version="b")
    with monkeypatch.context() as patch:
        import redis

        patch.setattr(redis.Redis, "unlink", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
        with pytest.raises(UnavailableError):  # while "a" is cleared for the new bank
            export_redis(new, server.url, version="a")
    export_redis(new, server.url, version="a")
    online = RedisBank(server.url)
    assert (online.version, online.model_fingerprint) == ("a", "m1")
    assert np.array_equal(online.lookup(np.arange(400, 600)), codes)
    with pytest.raises(DataError, match="400 of 400 are not in the bank"):
        online.lookup(np.arange(400))
    stored = connect(server.url).scan_iter("userip:a:u:*", count=1000)
    assert len(list(stored)) == 200


def at_execution(monkeypatch, number, happens):
    """Something happens before the pipeline's n-th execution."""
    import redis

    done = 0
    real = redis.client.Pipeline.execute

    def execute(self, *args, **kwargs):
        nonlocal done
        done += 1
        if done == number:
            happens()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(redis.client.Pipeline, "execute", execute)


def test_a_redis_that_goes_away_keeps_the_version_before(own_server, tmp_path, monkeypatch):

    keys = np.arange(1000)
    first, _ = bank(tmp_path / "a", keys, 0)
    second, codes = bank(tmp_path / "b", keys, 1)
    export_redis(first, own_server.url)
    client = connect(own_server.url)
    at_execution(monkeypatch, 4, own_server.stop)
    with pytest.raises(UnavailableError, match="still see the version from before") as e:
        export_redis(second, own_server.url, batch=100)
    assert "secret" not in str(e.value)
    del client
    monkeypatch.undo()
    own_server.start()  # empty, as it keeps nothing on disk
    export_redis(second, own_server.url)
    assert np.array_equal(RedisBank(own_server.url).lookup(keys), codes)


def test_an_interrupted_export_leaves_the_pointer(server, tmp_path, monkeypatch):
    import redis

    keys = np.arange(1000)
    first, codes = bank(tmp_path / "a", keys, 0)
    second, _ = bank(tmp_path / "b", keys, 1)
    export_redis(first, server.url)

    def lost():
        raise redis.ConnectionError(f"lost {server.url}")

    at_execution(monkeypatch, 5, lost)
    with pytest.raises(UnavailableError) as e:
        export_redis(second, server.url, batch=100)
    assert "secret" not in f"{e.value} {e.value.__cause__}"
    monkeypatch.undo()
    assert np.array_equal(RedisBank(server.url).lookup(keys), codes)


@pytest.mark.parametrize(
    "url",
    ["", "http://host", "redis://", "file:///etc/passwd", "redis://h:99999", "unix://", "redis://[::"],
)  # fmt: skip
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(ConfigError, match="Redis URL"):
        connect(url)


def test_secrets_are_never_told():
    assert redacted("redis://me:pass@host:1/2?password=x#y") == "redis://host:1/2"
    pytest.importorskip("redis")
    with pytest.raises(UnavailableError) as e:
        connect("redis://me:hush@127.0.0.1:1/0", timeout_s=0.2)
    assert "hush" not in str(e.value)
    assert "127.0.0.1:1" in str(e.value)


@pytest.mark.parametrize(
    "url",
    [
        "me:hush@host:6379/0", ":hush@host", "redis:me:hush@host", "redis:/me:hush@host/0",
        "hush@host", "redis//me:hush@host", "rediss:///:hush@host", "redis://me:1/hush@host",
        "redis://me:12#hush@host", "redis://me:12?hush@host", "redis://me:hush@host:port",
        "redis://[me:hush@host", "http://me:hush@host", "redis://host/hush", "unix:me:hush@x",
        "redis://me:hush@", "unix://hush@", "REDIS:me:hush@host",
    ],
)  # fmt: skip
def test_no_part_of_a_url_that_may_be_secret_is_told(url):
    pytest.importorskip("redis")
    assert "hush" not in redacted(url)
    with pytest.raises((ConfigError, UnavailableError)) as e:
        connect(url, timeout_s=0.05)
    told = "".join(traceback.format_exception(e.value.__cause__ or e.value, chain=False))
    assert "hush" not in str(e.value)
    assert "12" not in redacted(url)
    assert "hush" not in told.replace(repr(url), "")


@pytest.mark.parametrize("name", ["", "a:b", "x" * 65, "a*"])
def test_namespaces_that_could_touch_other_keys_are_refused(name, tmp_path):
    made, _ = bank(tmp_path / "bank", np.arange(3))
    with pytest.raises(ConfigError, match="namespace="):
        export_redis(made, "redis://127.0.0.1:1", namespace=name)


def test_frames_hold_what_the_bank_holds(tmp_path, monkeypatch):
    opened, _ = bank(tmp_path / "b", [3, 1, 2])
    table = opened.to_arrow()
    opened.to_parquet(tmp_path / "b.parquet")
    assert table.equals(pq.read_table(tmp_path / "b.parquet"))
    assert table["user_id"].equals(pa.chunked_array([opened.keys()]))
    frame = pytest.importorskip("pandas").DataFrame(table.to_pydict())
    assert opened.to_pandas().to_dict() == frame.to_dict()
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(UnavailableError, match="to_polars: polars is not installed"):
        opened.to_polars()


@pytest.mark.skipif(polars is None, reason="polars is not installed")
def test_polars_frames(tmp_path):
    opened, _ = bank(tmp_path / "b", ["a", "b"])
    assert opened.to_polars().equals(polars.from_arrow(opened.to_arrow()))


def test_feast_layout(tmp_path):
    made, codes = bank(tmp_path / "bank", np.arange(9))
    made.to_feast(tmp_path / "f.parquet", datetime(2026, 1, 2, tzinfo=UTC))
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == [
        "user_id", "taste", "habit", "model_fingerprint", "event_timestamp",
    ]  # fmt: skip
    assert table.schema.field("taste").type == pa.int32()
    assert str(table.schema.field("event_timestamp").type) == "timestamp[us, tz=UTC]"
    rows = np.argsort(table["user_id"].to_numpy())
    assert np.array_equal(table["habit"].to_numpy()[rows], codes[:, 1])
    assert table["event_timestamp"][0].as_py() == datetime(2026, 1, 2, tzinfo=UTC)
    with pytest.raises(ConfigError, match="time zone"):
        made.to_feast(tmp_path / "g.parquet", datetime(2026, 1, 2))

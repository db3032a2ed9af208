"""A log sorted on disk: the same users, histories, checks and refusals as one read into memory."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import userip_fast as uf
from userip_fast.core.errors import DataError, FormatError
from userip_fast.core.keys import hash_keys
from userip_fast.data import sorting


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    """Several parts, batches and flushes even of small logs."""
    monkeypatch.setattr(sorting, "_BATCH_ROWS", 50)
    monkeypatch.setattr(sorting, "_PART_ROWS", 100)
    monkeypatch.setattr(sorting, "_WAITING_ROWS", 120)
    monkeypatch.setattr(sorting, "_WAITING_ROWS_PART", 1)


def write(folder, *, strings=False, bad=False, files=3, own_text=False, constant=False, unit=0):
    random = np.random.default_rng(0)
    user = random.integers(0, 90, 700)
    item = random.integers(0, 40, 700)
    log = {
        "user_id": [f"u{u}" for u in user] if strings else user,
        "item_id": item.astype(np.int64),
        "rating": np.full(700, 3.0) if constant else random.integers(1, 6, 700).astype(float),
        "time": random.integers(0, 50, 700) + 1_700_000_000 * unit,
        "kept": random.random(700) < 0.9,
    }
    if own_text:
        log["title"] = [None if random.random() < 0.5 else f"item {i}" for i in item]
    log = pa.table(log)
    if bad:
        item = log["item_id"].to_numpy().copy()
        item[[3, 400]] = 999
        log = log.set_column(1, "item_id", pa.array(item))
        rating = log["rating"].to_numpy().copy()
        rating[650] = np.nan
        log = log.set_column(2, "rating", pa.array(rating))
    (folder / "log").mkdir(parents=True)
    bounds = np.linspace(0, 700, files + 1).astype(int)
    for i in range(files):
        part = log.slice(bounds[i], bounds[i + 1] - bounds[i])
        pq.write_table(part, folder / "log" / f"{i}.parquet", row_group_size=64)
    pq.write_table(
        pa.table({"item_id": range(40), "title": [f"item {i}" for i in range(40)]}),
        folder / "items.parquet",
    )
    return folder / "log", None if own_text else folder / "items.parquet"


def same(a, b):
    assert a.user_keys.equals(b.user_keys)
    assert np.array_equal(a.offsets, b.offsets)
    assert a.item_keys.take(a.item_index).equals(b.item_keys.take(b.item_index))
    assert a.item_text.take(a.item_index).equals(b.item_text.take(b.item_index))
    for x, y in ((a.rating, b.rating), (a.time, b.time)):
        assert (x is None) == (y is None)
        assert x is None or np.array_equal(x, y)
    assert (a.ordered, a.constant_rating) == (b.ordered, b.constant_rating)


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        ({}, {"rating": "rating", "time": "time"}),
        ({"strings": True}, {"filter": "kept", "min_history": 4}),
        ({"bad": True}, {"rating": "rating", "on_bad": "skip", "seed": 3}),
        ({"own_text": True}, {"on_bad": "skip", "filter": "kept"}),
        ({"constant": True, "files": 1}, {"rating": "rating"}),
        ({"unit": 1000}, {"time": "time"}),
    ],
)
def test_a_stream_is_what_memory_would_hold(tmp_path, kinds, options):
    log, items = write(tmp_path, **kinds)
    whole = uf.read_interactions(log, items, **options)
    streamed = uf.stream_interactions(log, items, work=tmp_path / "work", **options)
    assert len(streamed._parts) > 4
    n = whole.num_users
    assert (streamed.num_users, streamed.num_events) == (n, whole.num_events)
    for a, b in ((0, n), (0, 1), (7, 60), (n - 1, n), (5, 5)):
        same(streamed.users(a, b), whole.users(a, b))
    assert streamed.read_as == streamed.users(0, 1).read_as == whole.read_as
    assert streamed.report.to_dict() | {"short_examples": 0} == whole.report.to_dict() | {
        "short_examples": 0
    }
    assert np.array_equal(streamed.item_counts(), whole.item_counts())
    for x, y in zip(streamed.rating_counts() or (), whole.rating_counts() or ()):
        assert np.array_equal(x, y)
    hashes = hash_keys(whole.user_keys)
    for h in (0, int(hashes[9]), int(hashes[9]) + 1, 1 << 63, 1 << 64):
        want = n if h >= 1 << 64 else int(np.searchsorted(hashes, np.uint64(h)))
        assert streamed.first_at(h) == want


def test_bad_rows_are_refused_with_file_and_row(tmp_path):
    log, items = write(tmp_path, bad=True)
    messages = []
    for read, more in ((uf.read_interactions, {}), (uf.stream_interactions, {"work": tmp_path})):
        with pytest.raises(DataError) as e:
            read(log, items, rating="rating", **more)
        messages.append(str(e.value))
    assert messages[0] == messages[1]
    assert "2 x unknown item" in messages[1]
    assert not (tmp_path / "histories").exists()


def test_the_sorted_log_is_reused_until_the_log_changes(tmp_path, monkeypatch):
    log, items = write(tmp_path)
    first = uf.stream_interactions(log, items, work=tmp_path / "w")
    manifest = (tmp_path / "w" / "histories" / "manifest.json").stat().st_mtime_ns
    again = uf.stream_interactions(log, items, work=tmp_path / "w")
    assert (tmp_path / "w" / "histories" / "manifest.json").stat().st_mtime_ns == manifest
    assert again.digest == first.digest
    assert uf.stream_interactions(log, items, work=tmp_path / "w", seed=1).digest != first.digest
    (log / "2.parquet").unlink()
    fewer = uf.stream_interactions(log, items, work=tmp_path / "w")
    assert fewer.num_events < first.num_events


@pytest.mark.parametrize("changed", ["log", "items"])
def test_a_changed_file_of_equal_size_and_time_is_sorted_anew(tmp_path, changed):
    log, items = write(tmp_path)
    file = items if changed == "items" else log / "1.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    table = pq.read_table(file)
    pq.write_table(table, file, **plain)
    before = file.stat()
    uf.stream_interactions(log, items, work=tmp_path / "w", rating="rating")
    name = "title" if changed == "items" else "rating"
    table = table.set_column(table.column_names.index(name), name, table[name][::-1])
    pq.write_table(table, file, **plain)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    whole = uf.read_interactions(log, items, rating="rating")
    streamed = uf.stream_interactions(log, items, work=tmp_path / "w", rating="rating")
    same(streamed.users(0, streamed.num_users), whole)


def test_the_same_content_elsewhere_and_later_is_not_sorted_again(tmp_path):
    log, items = write(tmp_path)
    uf.stream_interactions(log, items, work=tmp_path / "w")
    manifest = tmp_path / "w" / "histories" / "manifest.json"
    sorted_at = manifest.stat().st_mtime_ns
    moved = shutil.copytree(log, tmp_path / "moved")
    for file in moved.iterdir():
        os.utime(file)
    uf.stream_interactions(moved, items, work=tmp_path / "w")
    assert manifest.stat().st_mtime_ns == sorted_at


def test_a_folder_of_an_earlier_version_is_sorted_anew(tmp_path):
    log, items = write(tmp_path)
    first = uf.stream_interactions(log, items, work=tmp_path / "w")
    manifest = tmp_path / "w" / "histories" / "manifest.json"
    about = json.loads(manifest.read_text())
    del about["read_as"]
    manifest.write_text(json.dumps(about))
    assert uf.stream_interactions(log, items, work=tmp_path / "w").digest == first.digest


def test_a_damaged_part_is_refused(tmp_path):
    log, items = write(tmp_path)
    uf.stream_interactions(log, items, work=tmp_path / "w")
    part = tmp_path / "w" / "histories" / "part-0002.arrow"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    streamed = uf.stream_interactions(log, items, work=tmp_path / "w")
    with pytest.raises(FormatError, match=r"part-0002\.arrow: altered"):
        streamed.users(0, streamed.num_users)


def test_only_parquet_is_streamed(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(DataError, match="only Parquet is read as a stream"):
        uf.stream_interactions(tmp_path / "log.csv", work=tmp_path / "w")

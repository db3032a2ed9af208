"""Every format gives the same data; types, keys and columns that cannot be used are refused."""

import datetime as dt
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import userip_fast as uf
from userip_fast.core.errors import DataError, MismatchError
from userip_fast.core.keys import hash_keys

LOG = {
    "user_id": [3, 1, 2, 1, 3, 1],
    "item_id": ["x", "y", "x", "x", "z", "z"],
    "rating": [1.0, 2.0, 3.0, 4.0, 5.0, 4.0],
    "timestamp": [60, 50, 40, 30, 20, 10],
}
ITEMS = {"item_id": ["x", "y", "z", "w"], "title": ["Ex", "Why", "Zed", "Double"]}
ROLES = {"rating": "rating", "time": "timestamp"}


def write_jsonl(path, table):
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in table.to_pylist()))


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix in (".csv", ".tsv"):
        options = pacsv.WriteOptions(delimiter="," if path.suffix == ".csv" else "\t")
        pacsv.write_csv(table, path, options)
    else:
        write_jsonl(path, table)
    return path


def histories(data):
    """User key -> list of (item key, rating, time)."""
    item = data.item_keys.take(pa.array(data.item_index)).to_pylist()
    rating = data.rating.tolist() if data.rating is not None else [None] * data.num_events
    time = data.time.tolist() if data.time is not None else [None] * data.num_events
    rows = list(zip(item, rating, time, strict=True))
    bounds = data.offsets.tolist()
    keys = data.user_keys.to_pylist()
    return {k: rows[a:b] for k, a, b in zip(keys, bounds[:-1], bounds[1:], strict=True)}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl", ".ndjson"])
def test_every_format_gives_the_same_data(tmp_path, suffix):
    log = write(tmp_path / f"log{suffix}", pa.table(LOG))
    items = write(tmp_path / f"items{suffix}", pa.table(ITEMS))
    data = uf.read_interactions(log, str(items), **ROLES)
    assert histories(data) == {
        1: [("z", 4.0, 10_000_000), ("x", 4.0, 30_000_000), ("y", 2.0, 50_000_000)],
        2: [("x", 3.0, 40_000_000)],
        3: [("z", 5.0, 20_000_000), ("x", 1.0, 60_000_000)],
    }
    assert data.item_text.to_pylist() == ["Ex", "Why", "Zed", "Double"]
    assert data.items.column_names == ["item_id", "title"]
    assert data.ordered
    assert data.user_keys.type == pa.int64()
    assert (data.offsets.dtype, data.item_index.dtype) == (np.int64, np.int32)
    assert (data.rating.dtype, data.time.dtype) == (np.float32, np.int64)
    hashes = hash_keys(data.user_keys)
    assert (hashes[1:] > hashes[:-1]).all()
    assert repr(data) == "Interactions(3 users, 4 items, 6 events, rated, time-ordered)"


def test_a_folder_of_parts_is_one_log(tmp_path):
    table = pa.table(LOG)
    whole = uf.read_interactions(table, pa.table(ITEMS), **ROLES)
    for suffix in (".parquet", ".csv", ".jsonl"):
        folder = tmp_path / suffix[1:]
        write(folder / f"part-0{suffix}", table.slice(0, 2))
        write(folder / "more" / f"part-1{suffix}", table.slice(2))
        (folder / "_SUCCESS").touch()
        (folder / ".hidden.parquet").write_text("not a table")
        assert histories(uf.read_interactions(folder, pa.table(ITEMS), **ROLES)) == histories(whole)


def test_hive_folders_are_columns(tmp_path):
    table = pa.table(LOG)
    ds.write_dataset(table, tmp_path / "log", format="parquet", partitioning=["user_id"],
                     partitioning_flavor="hive")  # fmt: skip
    data = uf.read_interactions(tmp_path / "log", pa.table(ITEMS), **ROLES)
    assert histories(data) == histories(uf.read_interactions(table, pa.table(ITEMS), **ROLES))


def test_rows_are_traced_to_their_part(tmp_path):
    table = pa.table(LOG).set_column(1, "item_id", pa.array(["x", "y", "x", "x", "?", "!"]))
    write(tmp_path / "log" / "a.csv", table.slice(0, 4))
    write(tmp_path / "log" / "b.csv", table.slice(4))
    with pytest.raises(DataError, match=r"b\.csv, row 2, column 'item_id': unknown item \('!'\)"):
        uf.read_interactions(tmp_path / "log", pa.table(ITEMS))


def test_item_text_may_come_from_the_log():
    log = LOG | {"title": [None, "Why", "Ex 1", "Ex 2", "Zed", "Zed"]}
    data = uf.read_interactions(pa.table(log), time="timestamp")
    # the first text that is not empty
    assert dict(zip(data.item_keys.to_pylist(), data.item_text.to_pylist(), strict=True)) == {
        "x": "Ex 1",
        "y": "Why",
        "z": "Zed",
    }
    assert data.items["title"].to_pylist() == data.item_text.to_pylist()


def test_time_types_agree():
    seconds = [1_500_000_000 + 7 * i for i in range(6)]
    stamps = [dt.datetime.fromtimestamp(s, dt.UTC) for s in seconds]
    forms = [
        pa.array(seconds),
        pa.array(seconds, pa.uint32()),
        pa.array([float(s) for s in seconds]),
        pa.array([s.replace(tzinfo=None) for s in stamps], pa.timestamp("s")),
        pa.array(stamps, pa.timestamp("ns", tz="Europe/Paris")),
        pa.array([s.strftime("%Y-%m-%d %H:%M:%S") for s in stamps]),
    ]
    for form in forms:
        table = pa.table(LOG).set_column(3, "timestamp", form)
        data = uf.read_interactions(table, pa.table(ITEMS), time="timestamp")
        assert sorted(data.time.tolist()) == [s * 1_000_000 for s in seconds]
    days = pa.table(LOG).set_column(3, "timestamp", pa.array([dt.date(1970, 1, 2)] * 6))
    data = uf.read_interactions(days, pa.table(ITEMS), time="timestamp")
    assert set(data.time.tolist()) == {86_400_000_000}


def test_ties_in_time_keep_file_order():
    log = {"user_id": [1] * 5, "item_id": list("zyxyz"), "timestamp": [5, 5, 5, 1, 5]}
    data = uf.read_interactions(pa.table(log), pa.table(ITEMS), time="timestamp")
    assert [item for item, _, _ in histories(data)[1]] == list("yzyxz")


def test_without_time_the_order_is_seeded_and_independent_of_the_file():
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 40, 600), rng.integers(0, 30, 600)
    items = pa.table({"item_id": range(30), "title": [f"t{i}" for i in range(30)]})

    def read(rows, **kw):
        table = pa.table({"user_id": user[rows], "item_id": item[rows]})
        return uf.read_interactions(table, items, **kw)

    one = read(np.arange(600))
    assert not one.ordered
    assert one.time is None
    shuffled = read(rng.permutation(600))
    assert histories(one) == histories(shuffled)
    alone = read(np.flatnonzero(user == 7))
    assert histories(alone)[7] == histories(one)[7]
    assert histories(read(np.arange(600), seed=1)) != histories(one)
    assert [row[0] for row in histories(one)[7]] != sorted(row[0] for row in histories(one)[7])


def test_ratings_of_any_numeric_type():
    for form in (
        pa.array([1, 2, 3, 4, 5, 4], pa.int8()),
        pa.array([decimal.Decimal(v) for v in "123454"]),
        pa.array([1, 2, 3, 4, 5, 4], pa.float16()),
    ):
        table = pa.table(LOG).set_column(2, "rating", form)
        data = uf.read_interactions(table, pa.table(ITEMS), **ROLES)
        assert sorted(data.rating.tolist()) == [1, 2, 3, 4, 4, 5]


def test_a_constant_rating_counts_as_none():
    table = pa.table(LOG).set_column(2, "rating", pa.array([2.5] * 6))
    data = uf.read_interactions(table, pa.table(ITEMS), **ROLES)
    assert data.rating is None
    assert data.constant_rating == 2.5
    assert "every rating is 2.5" in data.rating_note
    assert uf.read_interactions(pa.table(LOG), pa.table(ITEMS), **ROLES).rating_note is None


def test_csv_keys_keep_what_was_written(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n007,1\n7,2\n")
    (tmp_path / "items.csv").write_text("item_id,title\n1,0042\n2,b\n3A,c\n")
    data = uf.read_interactions(tmp_path / "log.csv", tmp_path / "items.csv")
    assert sorted(data.user_keys.to_pylist()) == ["007", "7"]
    assert data.item_keys.to_pylist() == ["1", "2", "3A"]  # digits in the log, text in the items
    assert data.item_text.to_pylist() == ["0042", "b", "c"]


def test_quoted_csv_fields_may_hold_anything(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b'\xef\xbb\xbfuser_id,item_id,title\n1,2,"a, ""b""\nc"\n')
    assert uf.read_interactions(path).item_text.to_pylist() == ['a, "b" c']


def test_filter_columns_need_not_be_used_otherwise():
    table = pa.table(LOG).append_column("cancelled", [[True, False, None, False, False, False]])
    data = uf.read_interactions(table, pa.table(ITEMS), filter="not cancelled and timestamp > 10")
    assert histories(data).keys() == {1, 3}
    assert data.report.rows_filtered == 3
    assert data.report.short_examples == (2,)


def test_users_by_key():
    data = uf.read_interactions(pa.table(LOG), pa.table(ITEMS))
    rows = data.user_index([2, 99, 1])
    assert rows[1] == -1
    assert data.user_keys.take(pa.array(rows[[0, 2]])).to_pylist() == [2, 1]
    assert data.user_index([]).tolist() == []
    with pytest.raises(MismatchError, match="large_string"):
        data.user_index(["2"])


def test_selections():
    data = uf.read_interactions(pa.table(LOG), pa.table(ITEMS), **ROLES)
    whole = histories(data)
    for n in (1, 2, 9):
        assert histories(data.first_events(n)) == {k: v[:n] for k, v in whole.items()}
        assert histories(data.last_events(n)) == {k: v[-n:] for k, v in whole.items()}
    keys = data.user_keys.to_pylist()
    assert histories(data.select_users([2, 0])) == {k: whole[k] for k in (keys[0], keys[2])}
    assert data.head_users(2).user_keys.to_pylist() == keys[:2]
    assert data.head_users(99).num_users == 3
    assert data.history_lengths.tolist() == [len(whole[k]) for k in keys]
    assert data.users_of_events().tolist() == np.repeat([0, 1, 2], data.history_lengths).tolist()
    for bad, message in (([3], r"must be in \[0, 3\)"), ([0, 0], "given twice")):
        with pytest.raises(DataError, match=message):
            data.select_users(bad)
    with pytest.raises(DataError, match="n must be at least 1, got 0"):
        data.first_events(0)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", [1.0] * 6, r"key column 'user_id' is double.*cast them"),
        ("user_id", [True] * 6, "key column 'user_id' is bool"),
        ("user_id", np.full(6, 2**63, np.uint64), "key column 'user_id' exceeds int64"),
        ("item_id", [1] * 6, r"column 'item_id' is int64, but it is large_string"),
        ("rating", ["good"] * 6, "rating column 'rating' is large_string, not a number"),
        ("timestamp", ["soon"] * 6, "time column 'timestamp' of type large_string must hold"),
        ("timestamp", [True] * 6, "time column 'timestamp' is bool"),
        ("timestamp", [2**63 - 1] * 6, "6 x time is not valid"),
        ("timestamp", [1e300] * 6, "6 x time is not valid"),
    ],
)
def test_unusable_columns_are_refused(column, values, message):
    table = pa.table(LOG | {column: values})
    with pytest.raises(DataError, match=message):
        uf.read_interactions(table, pa.table(ITEMS), **ROLES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user": "uid"}, r"the interactions table has no column 'uid'; it has \['user_id'"),
        ({"rating": "stars"}, "no column 'stars'"),
        ({"time": "when"}, "no column 'when'"),
        ({"filter": "not returned"}, "no column 'returned'"),
        (
            {"text": "{name}"},
            r"'\{name\}': the items table has no column 'name'; it has \['item_id'",
        ),
        ({"on_bad": "ignore"}, "on_bad must be 'error' or 'skip', got 'ignore'"),
        ({"min_history": 0}, "min_history must be at least 1, got 0"),
        ({"min_history": 9}, "no user with behaviour is left"),
        ({"filter": "rating > 9"}, "no user with behaviour is left"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        uf.read_interactions(pa.table(LOG), pa.table(ITEMS), **options)


def test_items_need_the_key_column():
    with pytest.raises(DataError, match=r"the items table has no column 'item_id'; it has \['id'"):
        uf.read_interactions(pa.table(LOG), pa.table(ITEMS).rename_columns(["id", "title"]))


def test_unreadable_files_are_named(tmp_path):
    def refused(name, content, message):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            uf.read_interactions(path)
        assert name in str(caught.value)

    refused("log.xlsx", b"", r"unknown kind; known are \.csv, \.tsv, \.parquet")
    refused("log.parquet", b"PAR1 no", "cannot be read")
    refused("empty.csv", b"", "cannot be read")
    refused("ragged.csv", b"user_id,item_id,title\n1,2\n", "cannot be read")
    refused(
        "latin.csv", "user_id,item_id,title\n1,2,caf\u00e9\n".encode("latin1"), "cannot be read"
    )
    refused("log.jsonl", b'{"user_id": 1', "cannot be read")
    refused("short.csv", b"user_id,title\n1,x\n", r"has no column 'item_id'; it has \['user_id'")
    refused(
        "twice.csv", b"user_id,item_id,item_id,title\n1,1,1,x\n", "more than one column 'item_id'"
    )
    refused("header.csv", b"user_id,item_id,title\n", "no user with behaviour is left")
    with pytest.raises(DataError, match=r"nowhere\.csv does not exist"):
        uf.read_interactions(tmp_path / "nowhere.csv")


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no file of a known kind"):
        uf.read_interactions(tmp_path)
    (tmp_path / "a.csv").write_text("user_id,item_id,title\n1,1,x\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="more than one kind"):
        uf.read_interactions(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "c.csv").write_text("user_id,item_id\n1,1\n")
    with pytest.raises(DataError, match=r"c\.csv has no column 'title'"):
        uf.read_interactions(tmp_path)


def test_invalid_utf8_in_parquet_is_refused(tmp_path):
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    table = pa.table({"user_id": [1], "item_id": [1], "title": text})
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(DataError, match="holds invalid values"):
        uf.read_interactions(tmp_path / "log.parquet")


UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


def timed(values, **kwargs):
    table = pa.table(LOG).set_column(3, "timestamp", values)
    return uf.read_interactions(table, pa.table(ITEMS), time="timestamp", **kwargs)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.float64()])
def test_the_unit_of_times_is_found_and_said(unit, kind, caplog):
    seconds = np.array([1_700_000_005, 1_700_000_004, 1_600_000_003, 946_684_800, 0, 2**31])
    seconds[4] = 946_684_801
    want = timed(pa.array(seconds)).time
    caplog.clear()
    data = timed(pa.array(seconds * UNITS[unit]).cast(kind, safe=False))
    assert (data.time == want).all()
    said = f"column 'timestamp': times are read as {unit} since 1970"
    assert (said in caplog.text) is (unit != "seconds")


def test_nanoseconds_keep_their_microseconds_beside_nulls():
    base = 1_700_000_000_123_457
    values = pa.array([base * 1000 + 999, None, base * 1000, *[(base + 1) * 1000] * 3])
    data = timed(values, on_bad="skip")
    assert sorted(set(data.time.tolist())) == [base, base + 1]
    assert data.report.counts == {"time is not valid": 1}


@pytest.mark.parametrize("strange", [1_700_000_000, 0, -1, 1_700_000_000_000_000])
def test_a_mixture_of_units_is_refused_by_row(strange):
    values = pa.array([*(1_700_000_000_000 + i for i in range(5)), strange])
    with pytest.raises(DataError, match="1 x time is not in milliseconds, as most are") as found:
        timed(values)
    assert "row 6, column 'timestamp': time is not in mill" in str(found.value)
    assert f"({strange})" in str(found.value)
    assert len(timed(values, on_bad="skip").item_index) == 5


def test_times_that_only_count_are_seconds(caplog):
    assert (timed(pa.array(range(6))).time >= 0).all()
    assert not caplog.text


def test_data_tells_what_it_was_read_with():
    data = timed(pa.array(range(6)), text="a {title}", filter="timestamp > 0", min_history=1)
    read_as = uf.data.interactions.ReadAs(
        "user_id", "item_id", None, "timestamp", "a {title}", "timestamp > 0", 1
    )
    assert data.read_as == read_as
    assert data.head_users(1).read_as == read_as
    assert data.first_events(1).read_as == read_as


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Parquet files of kilobytes that stand for gigabytes."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, rows, length in (
        ("text", 4000, 1 << 20), ("dictionary", 4000, 1 << 20), ("rows", 60_000_000, 4),
    ):  # fmt: skip
        text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["x" * length])
        keys = pa.array(np.zeros(rows, np.int8))
        table = pa.table({"user_id": keys, "item_id": keys, "title": text})
        as_read = name == "dictionary"  # else what Arrow reads is plain text
        file = folder / f"{name}.parquet"
        pq.write_table(table, file, compression="zstd", store_schema=as_read)
    return folder


@pytest.mark.parametrize("name", ["text", "dictionary", "rows"])
def test_small_files_that_stand_for_gigabytes_are_refused_unread(bombs, name):
    file = bombs / f"{name}.parquet"
    assert file.stat().st_size < 1 << 20
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"may decode to [0-9.]+ GiB.*--stream"):
        uf.read_interactions(file)
    with pytest.raises(DataError, match="may decode to"):
        uf.read_interactions(pa.table(LOG), file)
    assert pa.total_allocated_bytes() - before < 1 << 26


def test_a_batch_of_a_stream_is_bounded_too(bombs, tmp_path):
    with pytest.raises(DataError, match=r"a batch of 65,536 rows may decode to 3\.9 GiB"):
        uf.stream_interactions(bombs / "text.parquet", work=tmp_path)


def test_an_ordinary_file_of_few_distinct_values_is_read(tmp_path):
    text = pa.array(["a title of some length"] * 100_000)
    keys = pa.array(np.arange(100_000) % 7)
    table = pa.table({"user_id": keys, "item_id": keys, "title": text})
    pq.write_table(table, tmp_path / "log.parquet")
    assert uf.read_interactions(tmp_path / "log.parquet").num_users == 7

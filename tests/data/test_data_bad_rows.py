"""Every rule for bad rows: refused with file, row, column and value, or dropped and reported."""

import json

import pyarrow as pa
import pytest

import userip_fast as uf
from userip_fast.core.errors import DataError

GOOD = {"user_id": 1, "item_id": 10, "rating": 3.0, "timestamp": 5}
ITEMS = pa.table({"item_id": [10, 11, 12], "title": ["Ten", " ", "Twelve"]})


def log(*changes):
    rows = [GOOD, *(GOOD | change for change in changes), GOOD | {"rating": 4.0}]
    schema = pa.schema(
        {
            "user_id": pa.int64(),
            "item_id": pa.int64(),
            "rating": pa.float64(),
            "timestamp": pa.float64(),
        }
    )
    return pa.Table.from_pylist(rows, schema)


def read(table, items=ITEMS, **options):
    return uf.read_interactions(table, items, rating="rating", time="timestamp", **options)


RULES = [
    ({"user_id": None}, "null key", "user_id", "None"),
    ({"item_id": None}, "null key", "item_id", "None"),
    ({"item_id": 99}, "unknown item", "item_id", "99"),
    ({"item_id": 11}, "empty text", "item_id", "11"),
    ({"rating": None}, "rating is not a number", "rating", "None"),
    ({"rating": float("nan")}, "rating is not a number", "rating", "nan"),
    ({"rating": float("inf")}, "rating is not a number", "rating", "inf"),
    ({"timestamp": None}, "time is not valid", "timestamp", "None"),
    ({"timestamp": float("nan")}, "time is not valid", "timestamp", "nan"),
]


@pytest.mark.parametrize(("change", "rule", "column", "value"), RULES)
def test_one_bad_row(change, rule, column, value):
    with pytest.raises(DataError) as caught:
        read(log(change))
    message = str(caught.value)
    assert f"1 x {rule}" in message
    assert f"the interactions table, row 2, column {column!r}: {rule} ({value})" in message
    assert 'on_bad="skip"' in message

    data = read(log(change), on_bad="skip")
    assert data.report.counts == {rule: 1}
    assert (data.num_events, data.num_users, data.num_items) == (2, 1, 2)
    assert data.item_text.to_pylist() == ["Ten", "Twelve"]
    example = data.report.examples[0]
    assert (example.row, example.column, example.value) == (2, column, value)


def test_a_row_counts_for_its_first_rule_only():
    data = read(log({"user_id": None, "item_id": 99, "rating": None}), on_bad="skip")
    assert data.report.counts == {"null key": 1}
    assert data.report.rows_bad == 1


def test_an_empty_string_is_a_null_key():
    table = pa.table({"user_id": ["a", ""], "item_id": [10, 10]})
    data = uf.read_interactions(table, ITEMS, on_bad="skip")
    assert data.report.counts == {"null key": 1}
    assert data.user_keys.to_pylist() == ["a"]


def test_duplicate_and_null_items_keep_the_first():
    items = pa.table(
        {"item_id": [10, 10, None, 12], "title": ["first", "second", "none", "Twelve"]}
    )
    with pytest.raises(
        DataError, match=r"the items table, row 2, column 'item_id': duplicate item"
    ):
        read(log(), items)
    data = read(log(), items, on_bad="skip")
    assert data.item_text.to_pylist() == ["first", "Twelve"]
    assert data.report.counts == {"null key": 1, "duplicate item": 1}


def test_items_nobody_met_may_have_no_text():
    data = read(log())
    assert data.item_keys.to_pylist() == [10, 12]
    assert data.report.counts == {}


def test_filtered_rows_are_not_checked():
    data = read(log({"item_id": 99, "user_id": 7}), filter="item_id < 50")
    assert data.report.counts == {}
    assert data.report.rows_filtered == 1
    assert data.report.short_examples == (7,)


def test_the_first_ten_offenders_are_listed_in_file_order():
    changes = [{"rating": None}, *[{"item_id": 99}] * 12, {"user_id": None}]
    with pytest.raises(DataError) as caught:
        read(log(*changes))
    lines = str(caught.value).splitlines()
    assert lines[0] == "14 bad row(s):"
    assert set(lines[1:4]) == {
        "  1 x null key",
        "  12 x unknown item",
        "  1 x rating is not a number",
    }
    assert [int(line.split("row ")[1].split(",")[0]) for line in lines[5:-1]] == list(range(2, 12))


def test_users_left_without_enough_events_are_listed():
    table = log({"user_id": 2}, {"user_id": 3, "item_id": 99}, {"user_id": 2})
    data = read(table, on_bad="skip")
    assert sorted(data.user_keys.to_pylist()) == [1, 2]
    assert data.report.short_examples == (3,)
    data = read(log({"user_id": 2}), min_history=2)
    assert data.user_keys.to_pylist() == [1]
    assert (data.report.short_users, data.report.short_examples) == (1, (2,))


def test_report_prints_and_saves():
    report = read(log({"item_id": 99, "user_id": 5}), on_bad="skip").report
    table = report.table()
    for part in ("rows read", "unknown item", "row 2", "users without enough events: 5"):
        assert part in table
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["rows_read"] == 3
    assert saved["rows_bad"] == 1
    assert saved["counts"] == {"unknown item": 1}
    assert saved["examples"][0]["row"] == 2
    assert saved["short_examples"] == [5]


def test_all_rows_bad_leaves_nobody():
    table = pa.table({"user_id": [1], "item_id": [99]})
    with pytest.raises(DataError, match=r"(?s)no user with behaviour is left.*unknown item"):
        uf.read_interactions(table, ITEMS, on_bad="skip")

"""The NETE/PEPLER layout, and what a pickle may not do."""

import contextlib
import datetime as dt
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import userip_fast as uf
from userip_fast.core.errors import DataError
from userip_fast.data import read_nete
from userip_fast.data.nete import load_plain_pickle

REVIEWS = [
    ("u1", "a", 5, "pool"),
    ("u1", "b", 2, "staff"),
    ("u2", "a", 4, "rooms"),
    ("u2", "c", 3, "bar"),
    ("u3", "a", 1, "pool"),
    ("u3", "b", 4, "bar"),
]


def record(user, item, rating, feature, **more):
    template = (feature, "nice", f"the {feature} is nice", 1)
    return {"user": user, "item": item, "rating": rating, "template": template, **more}


def write(folder, records, protocol=pickle.DEFAULT_PROTOCOL):
    folder.mkdir(exist_ok=True)
    (folder / "reviews.pickle").write_bytes(pickle.dumps(records, protocol))
    return folder


def texts(data):
    return dict(zip(data.item_keys.to_pylist(), data.item_text.to_pylist(), strict=True))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reviews_of_every_protocol(tmp_path, protocol):
    folder = write(tmp_path / "trip", [record(*review) for review in REVIEWS], protocol)
    for path in (folder, folder / "reviews.pickle", str(folder)):
        data = uf.read_interactions(path)
        assert (data.num_users, data.num_items, data.num_events) == (3, 3, 6)
        assert sorted(data.rating.tolist()) == [1, 2, 3, 4, 4, 5]
        assert not data.ordered
        # the features named most often, ties alphabetical
        assert texts(data) == {"a": "pool, rooms", "b": "bar, staff", "c": "bar"}


def test_a_fold_reads_its_part_and_describes_items_from_train(tmp_path):
    folder = write(tmp_path / "trip", [record(*review) for review in REVIEWS])
    (folder / "1").mkdir()
    (folder / "1" / "train.index").write_text("0 1 2 3\n")
    (folder / "1" / "test.index").write_text("5 4")
    train = read_nete(folder, fold=1)
    assert sorted(train.user_keys.to_pylist()) == ["u1", "u2"]
    assert texts(train) == {"a": "pool, rooms", "b": "staff", "c": "bar"}
    test = read_nete(folder, fold=1, split="test")
    assert test.user_keys.to_pylist() == ["u3"]
    assert texts(test) == {"a": "pool, rooms", "b": "staff"}
    assert test.report.rows_read == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "positions must be in"),
        ("0 6", r"positions must be in \[0, 6\), as reviews.pickle has 6 records"),
        ("-1", "positions must be in"),
        ("0 0", "given twice"),
        ("0 x", "cannot be read as whole numbers"),
        (None, "cannot be read"),
    ],
)
def test_bad_indexes_are_refused(tmp_path, text, message):
    folder = write(tmp_path / "trip", [record(*review) for review in REVIEWS])
    (folder / "1").mkdir()
    if text is not None:
        (folder / "1" / "train.index").write_text(text)
    with pytest.raises(DataError, match=message):
        read_nete(folder, fold=1)


def test_other_columns_and_item_tables(tmp_path):
    records = [record(*r, brand=r[1].upper(), price=i) for i, r in enumerate(REVIEWS)]
    del records[1]["brand"]
    folder = write(tmp_path / "trip", records)
    data = uf.read_interactions(folder, text="{brand}[[ at {price}]]", filter="price < 4")
    assert texts(data) == {"a": "A at 0", "b": "at 1", "c": "C at 3"}
    (tmp_path / "items.csv").write_text("item,title\na,Grand\nb,Plaza\nc,Inn\n")
    data = uf.read_interactions(folder, tmp_path / "items.csv")
    assert texts(data) == {"a": "Grand", "b": "Plaza", "c": "Inn"}
    with pytest.raises(DataError, match="no time; got time='when'"):
        uf.read_interactions(folder, time="when")
    with pytest.raises(DataError, match="got user='who'"):
        uf.read_interactions(folder, user="who")


def test_bad_rows_are_counted_by_position(tmp_path):
    records = [record(*review) for review in REVIEWS]
    records[3]["rating"] = None
    folder = write(tmp_path / "trip", records)
    with pytest.raises(DataError, match=r"reviews.pickle, row 4, column 'rating': rating is not a"):
        uf.read_interactions(folder)
    assert uf.read_interactions(folder, on_bad="skip").num_events == 5


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"user": 1}, "must hold a list of dicts"),
        ([1], "must hold a list of dicts"),
        ([], "no record has 'user'"),
        ([{"user": 1, "item": 2}], "no record has 'rating'"),
        ([{"user": 1, "item": 2, "rating": 3, "template": "x"}], "row 1: template must be"),
        ([{"user": 1, "item": 2, "rating": 3, "brand": ["x"]}], "'brand' must be text or a number"),
        (
            [{"user": 1, "item": 2, "rating": 3}, {"user": "a", "item": 2, "rating": 3}],
            "mixes types",
        ),
    ],
)
def test_other_contents_are_refused(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        uf.read_interactions(write(tmp_path / "trip", records), text="{brand}")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_pickle_is_called(tmp_path, protocol):
    trap = tmp_path / "trap"
    folder = write(tmp_path / "trip", [record("u", Touch(str(trap)), 5, "pool")], protocol)
    with pytest.raises(DataError, match=r"asks for the class \w+\.mkdir"):
        uf.read_interactions(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.complex128(3), "a numpy scalar of type 'c16'"),
        (np.datetime64("2020-01-01"), "a numpy scalar of type 'M8'"),
        (np.zeros(2), "0x96"),
        (dt.date(2020, 1, 1), "datetime.date"),
        ({1, 2}, "0x8f"),
        (b"bytes", "it holds bytes"),
        (bytearray(b"x"), "0x96"),
    ],
)
def test_values_that_are_not_plain_are_refused(tmp_path, value, name):
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps([value], 5))
    with pytest.raises(DataError, match=rf"only lists, tuples, dicts.*{name}"):
        load_plain_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_scalars_of_numpy_are_plain(tmp_path, protocol):
    kinds = (np.int8, np.int64, np.uint16, np.float32, np.float64, np.bool_)
    values = [*(kind(1) for kind in kinds), np.float64(-2.5), np.str_("Caf\u00e9"), np.int64(-7)]
    values.append(np.dtype(">i4").type(9))
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps(values, protocol))
    found = load_plain_pickle(path)
    assert found == [value.item() for value in values]
    assert {type(value) for value in found} == {int, float, bool, str}
    reviews = [record("u", 1, np.float64(4), "pool"), record("u", np.int64(2), 5, "bar")]
    data = uf.read_interactions(write(tmp_path / "trip", reviews, protocol))
    assert sorted(data.rating.tolist()) == [4, 5]


def stacked(module, name, rest):
    """A pickle that finds a class by names on its stack."""
    names = b"".join(b"\x8c" + bytes([len(n)]) + n for n in (module, name))
    return b"\x80\x04" + names + b"\x93" + rest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (stacked(b"os", b"system", b"\x8c\x02id\x85R."), "asks for the class os.system"),
        (b"cos\nsystem\n(S'id'\ntR.", "asks for the class os.system"),
        (b"(S'id'\nios\nsystem\n.", "opcode 0x69"),
        (stacked(b"numpy", b"dtype", b"\x8c\x01O\x85R."), "numpy scalar of type 'O'"),
        (stacked(b"numpy", b"dtype", b"\x8c\x09U99999999\x85R."), "numpy scalar of type 'U9"),
        (stacked(b"numpy", b"dtype", b"\x8c\x02i8\x85RK\x01b."), "garbles the type"),
        (stacked(b"numpy", b"dtype", b"."), "it holds type"),
        (stacked(b"numpy.core.multiarray", b"scalar", b"K\x01K\x02\x86R."), "garbles a numpy"),
        (stacked(b"_codecs", b"encode", b"\x8c\x01a\x8c\x03hex\x86R."), "encodes text otherwise"),
        (b"]]R.", "only lists|not a pickle"),
        (b"]}b.", "only lists|not a pickle"),
        (b"", "ends too early"),
        (b"\x80\x04]", "ends too early"),
        (b"]r\xff\xff\xff\x7f.", "memo index exceeds"),
        (b"]p99999999999\n.", "memo index exceeds"),
        (b"]px\n.", "not a pickle of plain values"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "ends too early"),
        (b"\x80\x04X\xff\xff\xff\xff.", "ends too early"),
        (b"\x82\x01.", "opcode 0x82"),
        (b"P1\n.", "opcode 0x50"),
        (b"h\x00.", "only lists|not a pickle"),
        (b"u.", "only lists|not a pickle"),
        (b"]]}s.", "only lists|not a pickle"),
        (b"\x80\x09].", "not a pickle"),
        (b"L12x\n.", "not a pickle"),
        (b"X\x01\x00\x00\x00\xff.", "not a pickle"),
        (b"hello world", "memo index exceeds"),
    ],
)
def test_torn_and_hostile_pickles_are_refused(tmp_path, data, message):
    path = tmp_path / "x.pickle"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_plain_pickle(path)


def test_deep_nesting_is_survived(tmp_path):
    path = tmp_path / "x.pickle"
    path.write_bytes(b"]" * 200_000 + b"a" * 199_999 + b".")
    with pytest.raises(DataError, match="must hold a list of dicts"):
        read_nete(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_back(tmp_path_factory, value, protocol):
    path = tmp_path_factory.mktemp("plain") / "x.pickle"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_plain_pickle(path) == value


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_altered_pickles_never_crash(tmp_path_factory, data):
    blob = bytearray(pickle.dumps([record(*review) for review in REVIEWS], 4))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("altered") / "x.pickle"
    path.write_bytes(blob)
    with contextlib.suppress(DataError):
        load_plain_pickle(path)

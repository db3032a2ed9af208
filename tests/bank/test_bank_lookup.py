"""What goes in comes out: keys of both types, unknown users, wrong input, skewed hashes."""

import mmap
import textwrap
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import userip_fast as uf
from userip_fast import bank as bank_module
from userip_fast.bank import BankWriter, FeatureBank, KeyTypeError
from userip_fast.bank.index import HashIndex
from userip_fast.core import _extension
from userip_fast.core.errors import ConfigError, DataError, FormatError, MismatchError
from userip_fast.core.keys import hash_keys, key_order

FIELDS = [
    {"name": "hobby", "codebook_size": 300, "code_names": None},
    {"name": "spending", "codebook_size": 3, "code_names": ["low", "middle", "high"]},
]
INTEGERS = [7, -1, 0, 2**63 - 1, -(2**63), 12345678901]
STRINGS = ["", "a", "a\0", "ü", "uü", "日本語のユーザー", "x" * 100, "🎬", "12"]


def codes_for(n, seed=0, sizes=(300, 3)):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, k, n) for k in sizes], axis=1)


def write(path, keys, codes=None, **kwargs):
    codes = codes_for(len(keys)) if codes is None else codes
    return FeatureBank.write(path, keys, codes, fields=FIELDS, model_fingerprint="m", **kwargs)


@pytest.mark.parametrize("keys", [INTEGERS, STRINGS], ids=["int64", "string"])
def test_round_trip(tmp_path, keys):
    codes = codes_for(len(keys))
    p = np.random.default_rng(1).random((len(keys), 2), dtype=np.float32)
    write(tmp_path / "b", keys, codes, probabilities=p, metadata={"lm": "ü"})
    bank = uf.FeatureBank.open(tmp_path / "b", verify=True)
    assert len(bank) == len(keys)
    assert bank.fields == FIELDS
    assert bank.model_fingerprint == "m"
    assert bank.metadata == {"lm": "ü"}
    got = bank.lookup(keys[::-1])
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, codes[::-1])
    for key, code in zip(keys, codes, strict=True):
        np.testing.assert_array_equal(bank.lookup(key), code[None])
    assert bank.keys().to_pylist() == pa.array(keys).take(key_order_of(keys)).to_pylist()
    np.testing.assert_array_equal(bank.probabilities[bank.rows(keys)], p)
    assert bank.codes().dtype == np.uint16
    assert not bank.codes().flags.writeable


def key_order_of(keys):
    array = pa.array(keys).cast(pa.int64() if isinstance(keys[0], int) else pa.large_string())
    return pa.array(key_order(array, hash_keys(array)))


@pytest.mark.parametrize(
    "form",
    [
        np.array,
        tuple,
        pa.array,
        lambda k: pa.chunked_array([k[:2], k[2:]]),
        lambda k: pa.array(["x", *k] if isinstance(k[0], str) else [9, *k])[1:],
        lambda k: pa.array(k).dictionary_encode(),
        lambda k: np.array(k, dtype=object),
    ],
)
@pytest.mark.parametrize("keys", [[3, 1, 2], ["c", "", "bb"]], ids=["int64", "string"])
def test_key_containers(tmp_path, keys, form):
    bank = write(tmp_path / "b", form(keys))
    np.testing.assert_array_equal(bank.lookup(form(keys)), codes_for(3))


def test_code_dtype_holds_the_reserved_code(tmp_path):
    for size, dtype in [(255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32)]:
        fields = [{"name": "f", "codebook_size": size}]
        path = tmp_path / str(size)
        bank = FeatureBank.write(path, [1], [[size - 1]], fields=fields, model_fingerprint="m")
        assert bank.codes().dtype == dtype
        assert bank.lookup([1, 2], on_unknown="code").tolist() == [[size - 1], [size]]


@pytest.mark.parametrize("keys", [INTEGERS, STRINGS], ids=["int64", "string"])
def test_unknown_users(tmp_path, keys):
    bank = write(tmp_path / "b", keys[:3])
    with pytest.raises(DataError, match=r"user_ids: 2 of 3 are not in the bank .*on_unknown"):
        bank.lookup([keys[0], keys[3], keys[4]])
    got = bank.lookup([keys[0], keys[3], keys[4]], on_unknown="code")
    assert got.tolist() == [codes_for(3)[0].tolist(), [300, 3], [300, 3]]
    assert bank.rows(keys[3]).tolist() == [-1]
    assert bank.lookup([]).shape == (0, 2)
    with pytest.raises(ConfigError, match="on_unknown='zero'"):
        bank.lookup(keys, on_unknown="zero")


def test_empty_bank_knows_nobody_and_takes_any_key_type(tmp_path):
    bank = write(tmp_path / "b", [])
    bank.verify()
    assert bank.lookup(["a", "b"], on_unknown="code").tolist() == [[300, 3]] * 2
    bank = bank.update(["a"], [[1, 2]], probabilities=[[0.5, 1.0]])
    assert bank.lookup("a").tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("keys", "wrong", "message"),
    [
        ([1, 2], ["1"], "has int64 keys, these are string"),
        (["1", "2"], [1], "has string keys, these are int64"),
        ([1, 2], [1.0], "must be integers or strings"),
        ([1, 2], [True], "must be integers or strings"),
        ([1, 2], True, "must be integers or strings"),
        ([1, 2], [1, None], "null"),
        ([1, 2], [1, "a"], "user_ids"),
        ([1, 2], [2**63], "user_ids"),
        ([1, 2], np.array([2**63], np.uint64), "user_ids"),
        ([1, 2], np.array([[1]]), "1-dimensional"),
        (["1", "2"], ["\ud800"], "user_ids"),
        (["1", "2"], [b"1"], "must be integers or strings"),
    ],
)
def test_wrong_keys_are_refused(tmp_path, keys, wrong, message):
    bank = write(tmp_path / "b", keys)
    with pytest.raises(KeyTypeError, match=message) as e:
        bank.lookup(wrong)
    assert isinstance(e.value, TypeError)
    assert isinstance(e.value, MismatchError)


@pytest.mark.parametrize(
    ("keys", "codes", "kwargs", "message"),
    [
        ([1, 2, 1, 2, 3], None, {}, "2 occur more than once: (1, 2|2, 1)"),
        (["a", "b", "a"], None, {}, "1 occur more than once: 'a'"),
        ([1], [[0, 3]], {}, "user 1 has code 3 in field 'spending', which has codes 0 .. 2"),
        ([1], [[-1, 0]], {}, "user 1 has code -1 in field 'hobby'"),
        ([1], [[0.0, 0.0]], {}, "must be integers, got float64"),
        ([1], [[0]], {}, r"must be \[users, fields\] = \(1, 2\), got \(1, 1\)"),
        ([1, 2], [[0, 0]], {}, r"= \(2, 2\), got \(1, 2\)"),
        ([1], [[0, 0]], {"probabilities": [[0.5, np.nan]]}, r"\[0, 1\] is nan"),
        ([1], [[0, 0]], {"probabilities": [[1.5, 0.5]]}, r"\[0, 0\] is 1.5"),
        ([1], [[0, 0]], {"probabilities": [0.5]}, "probabilities: must be"),
    ],
)
def test_bad_rows_are_refused_and_leave_nothing(tmp_path, keys, codes, kwargs, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "b", keys, codes, **kwargs)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fields": []}, "at least one profile field"),
        ({"fields": [{"name": "", "codebook_size": 2}]}, "name must be"),
        ({"fields": [{"name": "f", "codebook_size": 0}]}, "'f': codebook_size must be"),
        ({"fields": [{"name": "f", "codebook_size": True}]}, "codebook_size must be"),
        ({"fields": [{"name": "f", "codebook_size": 2, "size": 2}]}, r"unknown entries \['size'\]"),
        ({"fields": [{"name": "f", "codebook_size": 2, "code_names": ["a"]}]}, "2 texts"),
        ({"fields": [{"name": "f", "codebook_size": 2}] * 2}, "'f'.* used twice"),
        ({"fields": [{"name": "user_id", "codebook_size": 2}]}, "'user_id'.* used twice"),
        ({"model_fingerprint": ""}, "model_fingerprint"),
        ({"metadata": {"a": float("nan")}}, "metadata"),
        ({"metadata": {"a": object()}}, "metadata"),
    ],
)
def test_bad_settings_are_refused(tmp_path, kwargs, message):
    kwargs = {"fields": FIELDS, "model_fingerprint": "m"} | kwargs
    with pytest.raises(ConfigError, match=message):
        BankWriter(tmp_path / "b", **kwargs)
    assert not (tmp_path / "b").exists()


def test_coerce_keys(tmp_path):
    integers = write(tmp_path / "i", [-5, 12])
    np.testing.assert_array_equal(
        integers.lookup(integers.coerce_keys(["12", "-5"]))[0], [*codes_for(2)[1]]
    )
    with pytest.raises(
        KeyTypeError, match=r"has integer keys .*; 3 of 4 are not: 'u1', '1.0', '92"
    ):
        integers.coerce_keys(["12", "u1", "1.0", "9223372036854775808"])
    strings = write(tmp_path / "s", ["12", "x"])
    assert strings.coerce_keys(["12"]).to_pylist() == ["12"]


def test_describe_and_info(tmp_path):
    bank = write(tmp_path / "b", [1, 2])
    assert [bank.describe("spending", c) for c in range(4)] == [
        "low", "middle", "high", "unknown user",
    ]  # fmt: skip
    assert bank.describe("hobby", bank.lookup(1)[0, 0]) == f"code {codes_for(2)[0, 0]}"
    with pytest.raises(ConfigError, match=r"field='age': the bank has the fields \['hobby'"):
        bank.describe("age", 0)
    with pytest.raises(ConfigError, match="code=4"):
        bank.describe("spending", 4)
    info = bank.info()
    assert info["users"] == 2
    assert info["generation"] == "gen-000001"
    assert info["file_bytes"]["codes.bin"] == 2 * 2 * 2
    assert "users=2" in repr(bank)


@pytest.mark.parametrize("keys", [range(500), [f"u{i}" for i in range(500)]], ids=["int", "str"])
@pytest.mark.parametrize("distinct", [1, 3])
def test_colliding_hashes_cost_time_not_answers(tmp_path, monkeypatch, keys, distinct):
    """All keys share one hash, or three: one bucket holds hundreds of users."""

    def skewed(values):
        return hash_keys(values) % np.uint64(distinct)

    for module in ("index", "layout", "writer"):
        monkeypatch.setattr(f"userip_fast.bank.{module}.hash_keys", skewed)
    monkeypatch.setattr(HashIndex, "_native", lambda *_: None)  # it hashes for itself
    keys = list(keys)
    bank = write(tmp_path / "b", keys[:400])
    bank.verify()
    np.testing.assert_array_equal(bank.lookup(keys[:400]), codes_for(400))
    assert (bank.rows(keys[400:]) == -1).all()
    bank = bank.update(keys[300:], codes_for(200, seed=1))
    bank.verify()
    want = np.concatenate([codes_for(400)[:300], codes_for(200, seed=1)])
    np.testing.assert_array_equal(bank.lookup(keys), want)
    with pytest.raises(DataError, match="1 occur more than once"):
        write(tmp_path / "c", [*keys, keys[17]])


any_keys = st.one_of(
    st.just((st.integers(-(2**63), 2**63 - 1), 0)),
    st.just((st.text(max_size=12), "")),
).flatmap(
    lambda kind: st.lists(st.lists(kind[0], max_size=40, unique=True), min_size=1, max_size=3)
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=any_keys, seed=st.integers(0, 2**32 - 1))
@example(rounds=[[""]], seed=0)  # no byte of text
@example(rounds=[["x" * 4096, ""]], seed=0)  # no byte after a page's last
def test_behaves_like_a_dict(tmp_path_factory, rounds, seed):
    path, want, bank = tmp_path_factory.mktemp("banks") / "b", {}, None
    for i, keys in enumerate(rounds):
        codes = codes_for(len(keys), seed + i)
        bank = write(path, keys, codes) if bank is None else bank.update(keys, codes)
        want |= dict(zip(keys, codes.tolist(), strict=True))
    bank.verify()
    assert len(bank) == len(want)
    assert bank.lookup(list(want)).tolist() == list(want.values())
    assert dict(zip(bank.keys().to_pylist(), bank.codes().tolist(), strict=True)) == want


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 127, 128, 129, 8191, 8193])
def test_sizes_around_buckets_windows_and_chunks(tmp_path, n):
    keys = np.random.default_rng(n).permutation(10 * n)[: 2 * n]
    bank = write(tmp_path / "b", keys[:n])
    bank.verify()
    got = bank.lookup(keys, on_unknown="code")
    np.testing.assert_array_equal(got[:n], codes_for(n))
    assert (got[n:] == [300, 3]).all()


def test_a_million_users_are_mapped_not_read(tmp_path):
    n = 1_000_000
    keys = np.random.default_rng(0).permutation(4 * n)[: n + 1000]
    codes = codes_for(n)
    write(tmp_path / "b", keys[:n], codes)
    bank = FeatureBank.open(tmp_path / "b")
    np.testing.assert_array_equal(bank.lookup(keys[:n]), codes)
    assert (bank.rows(keys[n:]) == -1).all()
    base = bank.codes()
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)
    assert bank.info()["bytes_per_user"] < 8 + 2 * 2 + 1  # keys, codes, directory


@pytest.mark.parametrize("with_p", [False, True])
@pytest.mark.parametrize("keys", [INTEGERS, STRINGS], ids=["int64", "string"])
def test_parquet_round_trip(tmp_path, keys, with_p):
    p = codes_for(len(keys)) / 300 if with_p else None
    bank = write(tmp_path / "b", keys, probabilities=p, metadata={"a": [1]})
    bank.to_parquet(tmp_path / "b.parquet")
    table = pq.read_table(tmp_path / "b.parquet")
    columns = ["user_id", "hobby", "spending"]
    assert table.column_names == columns + [f"{c}_probability" for c in columns[1:] if with_p]
    assert table["user_id"].to_pylist() == bank.keys().to_pylist()
    again = FeatureBank.from_parquet(tmp_path / "b.parquet", tmp_path / "c")
    again.verify()
    assert again.keys().equals(bank.keys())
    np.testing.assert_array_equal(again.codes(), bank.codes())
    for name in ("fields", "model_fingerprint", "metadata"):
        assert getattr(again, name) == getattr(bank, name)
    if with_p:
        np.testing.assert_array_equal(again.probabilities, bank.probabilities)


def test_foreign_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"user_id": [1]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_text("not parquet")
    for name in ("x", "y", "z"):
        with pytest.raises(FormatError, match=rf"{name}.parquet: not a feature bank written by"):
            FeatureBank.from_parquet(tmp_path / f"{name}.parquet", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_documented_training_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("BANK", [1, 2, 3])
    lines = bank_module.__doc__.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    names = {"batches": [(np.array([1, 99]), np.array([5, 6]), np.array([0, 1]))]}
    exec(code, names)
    assert names["profile"].shape == (2, 16)


@pytest.mark.parametrize("users", [0, 1, 2, 63, 64, 65, 5000])
@pytest.mark.parametrize("size", [200, 300, 70_000])
def test_the_compiled_lookup_is_the_numpy_one(tmp_path, monkeypatch, users, size):
    if _extension.load() is None:
        pytest.skip(f"no compiled extension: {_extension.why_not()}")
    rng = np.random.default_rng(users + size)
    pool = np.unique(rng.integers(-(2**63), 2**63 - 1, 2 * users + 2))
    fields = [{"name": n, "codebook_size": size, "code_names": None} for n in "abc"]
    codes = rng.integers(0, size, (users, 3))
    bank = FeatureBank.write(
        tmp_path / "b", pool[:users], codes, fields=fields, model_fingerprint="m"
    )
    index = bank._generation.index
    for n in (0, 1, 63, 64, 65, 200):
        asked = rng.choice(pool, n)
        assert users == 0 or index._native(bank._codes, bank._reserved) is not None
        fast = index.lookup(pa.array(asked), bank._codes, bank._reserved)
        with monkeypatch.context() as patch:
            patch.setattr(HashIndex, "_native", lambda *_: None)
            slow = index.lookup(pa.array(asked), bank._codes, bank._reserved)
        for a, b in zip(fast, slow):
            np.testing.assert_array_equal(a, b)
        strided = np.repeat(asked, 2)[::2]  # no copy may be assumed
        np.testing.assert_array_equal(bank.lookup(strided, on_unknown="code"), fast[1])


def test_an_extension_of_before_is_passed_over(tmp_path, monkeypatch):
    """One that was built before the files were checked must not be given them."""
    monkeypatch.setattr(_extension, "load", lambda: ModuleType("_C"))
    bank = write(tmp_path / "b", INTEGERS)
    np.testing.assert_array_equal(bank.lookup(np.array(INTEGERS)), codes_for(len(INTEGERS)))

"""Probabilities of all codes in a bank: kept, looked up, updated, exported, refused."""

import json

import numpy as np
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from test_bank_exports import own_server, server  # noqa: F401

from userip_fast.bank import BankWriter, FeatureBank
from userip_fast.bank import parquet as exports
from userip_fast.bank.drift import drift
from userip_fast.bank.redis_export import RedisBank, connect, export_redis
from userip_fast.core.errors import ConfigError, DataError, FormatError, MismatchError

SIZES = [5, 3]
FIELDS = [{"name": "taste", "codebook_size": 5}, {"name": "habit", "codebook_size": 3}]
SETTINGS = {"fields": FIELDS, "model_fingerprint": "m"}


def drawn(users, seed=0):
    """Codes [users, 2] and profiles [users, 8] of which they are the likeliest."""
    random = np.random.default_rng(seed)
    parts = [random.dirichlet(np.full(k, 0.3), users) for k in SIZES]
    return np.stack([p.argmax(1) for p in parts], axis=1), np.concatenate(parts, axis=1)


def made(path, keys, seed=0):
    codes, p = drawn(len(keys), seed)
    return FeatureBank.write(path, keys, codes, profiles=p, **SETTINGS), codes, p


def best(profiles):
    """Two items of each user, told from the profile."""
    return profiles.argsort(1)[:, :-3:-1], -np.sort(-profiles, 1)[:, :2]


@pytest.mark.parametrize("strings", [False, True])
def test_profiles_are_looked_up_as_they_were_written(tmp_path, strings):
    keys = [f"user {i} é" for i in range(900)] if strings else list(range(900))
    bank, codes, p = made(tmp_path / "b", keys)
    want = p.astype(np.float16).astype(np.float32)
    asked = [7, 3, 899, 3]
    got = bank.lookup_profiles([keys[i] for i in asked])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want[asked])
    np.testing.assert_array_equal(bank.profiles[bank.rows(keys)], p.astype(np.float16))
    np.testing.assert_array_equal(
        bank.probabilities[bank.rows(keys)],
        np.stack([want[np.arange(900), codes[:, 0]], want[np.arange(900), 5 + codes[:, 1]]], 1),
    )
    nobody = "nobody" if strings else 10**9
    got = bank.lookup_profiles([keys[0], nobody], on_unknown="code")
    np.testing.assert_array_equal(got, [want[0], np.zeros(8)])
    with pytest.raises(DataError, match="1 of 1 are not in the bank"):
        bank.lookup_profiles(nobody)
    with pytest.raises(ConfigError, match="on_unknown='prior'"):
        bank.lookup_profiles(nobody, on_unknown="prior")
    assert bank.lookup_profiles([]).shape == (0, 8)
    bank.verify()
    assert bank.info()["profiles"]
    assert bank.info()["file_bytes"]["profiles.bin"] == 900 * 8 * 2


def test_a_bank_of_codes_alone_says_so(tmp_path):
    bank = FeatureBank.write(tmp_path / "b", [1], [[0, 0]], **SETTINGS)
    assert bank.profiles is bank.probabilities is None
    for ask in (
        lambda: bank.lookup_profiles([1]),
        lambda: bank.to_parquet(tmp_path / "x.parquet", best),
        lambda: bank.to_csv(tmp_path / "x.csv", best),
        lambda: bank.to_feast(tmp_path / "x.parquet", best=best),
        lambda: export_redis(bank, "redis://nowhere", probabilities=True),
    ):
        with pytest.raises(ConfigError, match=r"b holds none; .*\(--profiles\)"):
            ask()
    with pytest.raises(ConfigError, match="probabilities: the bank"):
        bank.to_feast(tmp_path / "x.parquet", probabilities=True)
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (lambda p: p[:, :7], DataError, r"must be \[users, sum of codebook sizes\] = \(2, 8\)"),
        (lambda p: p[0], DataError, "got \\(8,\\)"),
        (lambda p: np.where(np.arange(8) == 2, np.nan, p), DataError, r"\[0, 2\] is nan"),
        (lambda p: p * 2 - 1, DataError, "must be within 0 .. 1"),
        (lambda p: p * 0.9, DataError, "those of field 'taste' must add up to 1, row 0"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, change, error, why):
    codes, p = drawn(2)
    with pytest.raises(error, match=why):
        FeatureBank.write(tmp_path / "b", [1, 2], codes, profiles=change(p), **SETTINGS)
    assert not (tmp_path / "b" / "CURRENT").exists()


def test_columns_of_profiles_do_not_hide_a_field(tmp_path):
    fields = [{"name": "a", "codebook_size": 1}, {"name": "a_p", "codebook_size": 1}]
    named = {"fields": fields, "model_fingerprint": "m"}
    codes = [[0, 0]]
    bank = FeatureBank.write(tmp_path / "b", [1], codes, **named)  # without profiles they may
    bank.to_parquet(tmp_path / "b.parquet")
    again = FeatureBank.from_parquet(tmp_path / "b.parquet", tmp_path / "c")
    assert again.profiles is None
    fields = [{"name": "b", "codebook_size": 2}, {"name": "b_p_1", "codebook_size": 1}]
    numbered = {"fields": fields, "model_fingerprint": "m", "profiles": [[0.5, 0.5, 1]]}
    bank = FeatureBank.write(tmp_path / "e", [1], [[1, 0]], **numbered)
    with pytest.raises(ConfigError, match=r"\['b_p_1'\] are used twice"):
        bank.to_csv(tmp_path / "e.csv")
    assert not (tmp_path / "e.csv").exists()
    with pytest.raises(ConfigError, match=r"\['a_p'\] are used twice"):
        FeatureBank.write(tmp_path / "d", [1], codes, profiles=[[1, 1]], **named)


def test_updates_keep_profiles_of_all_or_of_none(tmp_path):
    bank, _, p = made(tmp_path / "b", range(50))
    codes, new = drawn(20, seed=1)
    bank = bank.update(range(40, 60), codes, profiles=new)
    got = bank.lookup_profiles(range(60))
    np.testing.assert_allclose(got, np.concatenate([p[:40], new]), atol=1e-3)
    bank = bank.remove([3, 45])
    np.testing.assert_allclose(bank.lookup_profiles([2, 46]), [p[2], new[6]], atol=1e-3)
    with pytest.raises(MismatchError, match=r"profiles: the bank .* has profiles"):
        bank.update([1], [[0, 0]])
    with pytest.raises(MismatchError, match=r"probabilities: the bank .* has no probabilities"):
        bank.update([1], codes[:1], [[1.0, 1.0]], new[:1])
    without = FeatureBank.write(tmp_path / "c", [1], [[0, 0]], **SETTINGS)
    with pytest.raises(MismatchError, match="has no profiles"):
        without.update([1], codes[:1], profiles=new[:1])
    with BankWriter(tmp_path / "d", **SETTINGS) as writer:
        writer.append([1], codes[:1], profiles=new[:1])
        with pytest.raises(MismatchError, match="profiles: give them with every block"):
            writer.append([2], codes[:1])
    told = drift(bank, FeatureBank.open(tmp_path / "b"))
    assert told == drift(bank, bank)


def test_users_that_wait_on_disk_make_the_same_files(tmp_path, monkeypatch):
    keys = np.random.default_rng(0).permutation(700)
    whole = made(tmp_path / "memory", keys)[0]
    monkeypatch.setattr("userip_fast.bank.spool.WAITING_USERS", 200)
    waited = made(tmp_path / "disk", keys)[0]
    assert whole.digest == waited.digest
    assert whole.digest != made(tmp_path / "other", keys, seed=1)[0].digest


@pytest.mark.parametrize("native", [True, False])
def test_a_flipped_bit_is_never_served(tmp_path, monkeypatch, native):
    if not native:
        monkeypatch.setattr("userip_fast.bank.index.HashIndex._native", lambda *_: None)
    keys = list(range(1000))
    made(tmp_path / "b", keys)
    file = tmp_path / "b" / "gen-000001" / "profiles.bin"
    whole = file.read_bytes()
    for at in (0, 4095, 4096, len(whole) - 1):
        data = bytearray(whole)
        data[at] ^= 1
        file.write_bytes(data)
        damaged = FeatureBank.open(tmp_path / "b")
        damaged.lookup(keys)  # whose pages are whole
        page = f"profiles.bin: page {at // 4096} "
        refused = []
        for part in np.split(np.argsort(damaged.rows(keys)), 20):
            try:
                damaged.lookup_profiles(part)
            except FormatError as e:
                refused.append(str(e))
        assert 0 < len(refused) <= 7  # of 20, a page holding a quarter of the users
        assert all(page in why for why in refused)
        for read in (lambda b: b.profiles, lambda b: b.probabilities, lambda b: b.to_arrow()):
            with pytest.raises(FormatError, match=page):
                read(FeatureBank.open(tmp_path / "b"))
        with pytest.raises(FormatError, match="profiles"):
            FeatureBank.open(tmp_path / "b", verify=True)
    file.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=r"profiles.bin: is .* the file is torn"):
        FeatureBank.open(tmp_path / "b")


def test_a_bank_of_before_opens_and_stays_as_it_was(tmp_path):
    """A bank without profiles is the bytes of a release that knew none."""
    bank = FeatureBank.write(tmp_path / "b", [1, 2], [[0, 0], [4, 2]], **SETTINGS)
    manifest = json.loads((tmp_path / "b" / "gen-000001" / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert sorted(manifest["files"]) == ["codes.bin", "directory.bin", "keys.bin", "page_sums.bin"]
    assert bank.update([3], [[1, 1]]).lookup([3]).tolist() == [[1, 1]]


def test_files_of_a_bank_have_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "BLOCK", 16)
    bank, _, _ = made(tmp_path / "b", range(40))
    rows = bank.rows(range(40))
    for found in (None, best):
        bank.to_parquet(tmp_path / "b.parquet", found)
        table = pq.read_table(tmp_path / "b.parquet")
        names = ["user_id", "taste", "habit", "taste_p", "habit_p"]
        assert table.column_names == names + ["top_items", "top_scores"] * (found is not None)
        assert table.equals(bank.to_arrow(found))
        p = np.concatenate([np.stack(table[n].to_numpy()) for n in ("taste_p", "habit_p")], axis=1)
        np.testing.assert_array_equal(p, bank.profiles.astype(np.float32))
        again = FeatureBank.from_parquet(tmp_path / "b.parquet", tmp_path / "again")
        assert again.digest == bank.digest
    assert table["top_items"].to_pylist() == best(p)[0].tolist()
    bank.to_csv(tmp_path / "b.csv", best)
    table = pacsv.read_csv(tmp_path / "b.csv")
    assert table.column_names == [
        "user_id", "taste", "habit", *(f"taste_p_{k}" for k in range(5)),
        *(f"habit_p_{k}" for k in range(3)), "top_items_0", "top_items_1", "top_scores_0",
        "top_scores_1",
    ]  # fmt: skip
    np.testing.assert_allclose(table["taste_p_4"].to_numpy(), p[:, 4])
    np.testing.assert_array_equal(table["top_items_1"].to_numpy(), best(p)[0][:, 1])
    bank.to_feast(tmp_path / "f.parquet")
    assert "taste_p" not in pq.read_table(tmp_path / "f.parquet").column_names
    bank.to_feast(tmp_path / "f.parquet", probabilities=True, best=best)
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == [
        "user_id", "taste", "habit", "taste_probability", "habit_probability", "taste_p",
        "habit_p", "top_items", "top_scores", "model_fingerprint", "event_timestamp",
    ]  # fmt: skip
    np.testing.assert_array_equal(np.stack(table["taste_p"].to_numpy()), p[:, :5])
    assert table.num_rows == 40
    assert rows.tolist() == bank.rows(table["user_id"]).argsort().argsort()[rows].tolist()


def test_an_altered_file_is_no_bank(tmp_path):
    made(tmp_path / "b", range(40))[0].to_parquet(tmp_path / "b.parquet")
    table = pq.read_table(tmp_path / "b.parquet")
    other = table.set_column(3, "taste_p", table["taste_p"].take(np.arange(40)[::-1]))
    pq.write_table(other, tmp_path / "b.parquet")
    with pytest.raises(FormatError, match="SHA-256 differs"):
        FeatureBank.from_parquet(tmp_path / "b.parquet", tmp_path / "c")


@pytest.mark.parametrize("strings", [False, True])
def test_redis_gives_what_was_exported(server, tmp_path, strings):  # noqa: F811
    keys = [f"user:{i} é" for i in range(257)] if strings else np.arange(-50, 207)
    bank, codes, p = made(tmp_path / "b", keys)
    want = p.astype(np.float16).astype(np.float32)
    plain = export_redis(bank, server.url, batch=100)
    codes_alone = RedisBank(server.url)
    for ask in (codes_alone.lookup_profiles, codes_alone.top_items):
        with pytest.raises(ConfigError, match="exported without"):
            ask(keys)
    more = export_redis(bank, server.url, batch=100, probabilities=True, best=best)
    assert more != plain
    online = RedisBank(server.url)
    assert (codes_alone.version, online.version) == (plain, more)
    for reader in (codes_alone, online):
        np.testing.assert_array_equal(reader.lookup(keys), codes)
    np.testing.assert_array_equal(online.lookup_profiles(keys), want)
    items, scores = best(want)
    found = online.top_items(keys[:3])
    assert [[k for k, _ in own] for own in found] == items[:3].tolist()
    np.testing.assert_allclose([[s for _, s in own] for own in found], scores[:3], rtol=1e-6)
    nobody = ["nobody"] if strings else [10**9]
    assert online.lookup_profiles(nobody, "code").tolist() == [[0.0] * 8]
    assert online.top_items(nobody, "code") == [[]]
    assert online.lookup(nobody, "code").tolist() == [[5, 3]]
    with pytest.raises(DataError, match="1 of 1 are not in the bank"):
        online.top_items(nobody)
    # What goes with a version goes with all of it.
    for seed in (1, 2):
        export_redis(made(tmp_path / f"{seed}", keys, seed)[0], server.url, version=f"v{seed}")
    left = {k.decode().split(":")[1] for k in connect(server.url).scan_iter("userip:*")}
    assert left == {"current", "versions", "v1", "v2"}


def test_redis_values_that_are_none_are_refused(server, tmp_path):  # noqa: F811
    bank, _, _ = made(tmp_path / "b", range(20))
    version = export_redis(bank, server.url, probabilities=True, best=best)
    client, online = connect(server.url), RedisBank(server.url)
    name = f"userip:{version}:u:7"
    whole = client.get(name)
    for value, why in ((whole[:-2], "must be 18"), (whole[:2] + b"\xff" * 16, "no probabilities")):
        client.set(name, value)
        with pytest.raises(FormatError, match=f"{why}.*export the bank again|user 7.*{why}"):
            online.lookup_profiles([6, 7])
    client.set(f"userip:{version}:t:7", b"{}x")
    with pytest.raises(FormatError, match="no list of items"):
        online.top_items([7])

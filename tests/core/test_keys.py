"""Hash values are a file format: banks on disk depend on them, so some are pinned here for ever."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userip_fast.core.errors import DataError
from userip_fast.core.keys import NUM_SHARDS, canonical_keys, hash_keys, key_order, seeded, shard_of

MASK = (1 << 64) - 1


def mix_plain(x):
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def hash_plain(text):
    data, h = text.encode(), 0
    for i in range(0, len(data), 8):
        h = mix_plain(h ^ int.from_bytes(data[i : i + 8], "little"))
    return mix_plain(h ^ len(data))


def test_integer_hashes_are_pinned():
    keys = np.array([0, 1, -1, 12346, np.iinfo(np.int64).max, np.iinfo(np.int64).min])
    expected = [mix_plain(int(k) & MASK) for k in keys]
    assert expected[0] == 0xE220A8397B1DCDAF  # the published first output of splitmix64 from seed 0
    assert hash_keys(keys).tolist() == expected


def test_string_hashes_are_pinned():
    pins = {
        "": 0xE220A8397B1DCDAF,
        "a": 0x121842D00719760B,
        "12346678": 0x36049DC9FE90B711,
        "123466789": 0x49FBDFB9BFFEFD5C,
        "Gebrüder": 0x79C8E36C2FABCE4,
    }
    assert hash_keys(list(pins)).tolist() == list(pins.values())


@given(st.lists(st.text(max_size=40)))
def test_strings_hash_as_the_plain_loop_does(texts):
    array = pa.array(texts, pa.string())
    assert hash_keys(array).tolist() == [hash_plain(t) for t in texts]
    assert hash_keys(array[1:]).tolist() == [hash_plain(t) for t in texts[1:]]


def test_every_form_of_the_same_keys_hashes_alike():
    texts = ["b", "a", "éclair", "b"]
    forms = [
        texts,
        np.array(texts),
        np.array(texts, object),
        pa.array(texts),
        pa.array(texts, pa.large_string()),
        pa.array(texts).dictionary_encode(),
        pa.chunked_array([texts[:1], texts[1:]]),
    ]
    for form in forms:
        assert hash_keys(form).tolist() == [hash_plain(t) for t in texts]
    for dtype in (np.int8, np.int32, np.uint16, np.uint64):
        assert hash_keys(np.arange(5, dtype=dtype)).tolist() == hash_keys([0, 1, 2, 3, 4]).tolist()
    assert len(hash_keys([])) == 0


def test_seeded_hashes_depend_on_key_and_seed_alone():
    hashes = hash_keys(np.arange(1000))
    for seed in (0, 1, -1, 2**62):
        assert seeded(hashes[5:9], seed).tolist() == seeded(hashes, seed)[5:9].tolist()
    assert len(np.unique([seeded(hashes, seed) for seed in range(4)])) == 4000
    assert seeded(hashes[:1], 7).tolist() == [mix_plain(mix_plain(int(hashes[0])) ^ mix_plain(7))]


def test_shards_follow_the_order_of_hashes():
    hashes = np.sort(hash_keys(np.arange(50_000)))
    shards = shard_of(hashes)
    assert shards.dtype == np.uint8
    assert (np.diff(shards.astype(int)) >= 0).all()
    counts = np.bincount(shards, minlength=NUM_SHARDS)
    assert counts.min() > 100
    assert counts.max() < 300


def test_order_breaks_ties_of_hashes_by_key():
    keys = canonical_keys(["b", "a", "c", "a"])
    same = np.zeros(4, np.uint64)
    assert key_order(keys, same).tolist() == [1, 3, 0, 2]
    assert key_order(keys, np.array([3, 2, 1, 0], np.uint64)).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([1, None], "must not be null, 1 of 2"),
        ([1.5], "must be integers or strings, these are double"),
        ([True], "these are bool"),
        ([1, "a"], "all integers within int64 or all strings"),
        (np.array([2**63], np.uint64), "within int64"),
    ],
)
def test_bad_keys_are_refused(keys, message):
    with pytest.raises(DataError, match=message):
        hash_keys(keys)

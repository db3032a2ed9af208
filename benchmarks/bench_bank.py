"""Feature bank: open, look up, write, update, against what one would write oneself.

    python benchmarks/bench_bank.py [--users 10000000] [--keys int64|string] [--batch 1024]
    pytest benchmarks/bench_bank.py --benchmark-only

Stores: `bank`; `searchsorted` (numpy arrays sorted by key, in memory, integer keys only); `dict`
(Python, in memory); `lmdb` (if installed). Every store must first answer 100,000 users right, else
there is no number. Look-ups are of random users, pages warm, one thread. The ceiling is `rows`: the
codes gathered by row numbers that are known already, so no look-up at all. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from userip_fast.bank import FeatureBank

FIELDS = [{"name": f"field {j}", "codebook_size": 1000, "code_names": None} for j in range(4)]
Lookup = Callable[[pa.Array], np.ndarray]


def make_users(users: int, kind: str) -> tuple[pa.Array, np.ndarray]:
    """Scattered unique keys and the codes, [users, 4] uint16."""
    rng = np.random.default_rng(0)
    # An odd multiplier is a bijection of 64-bit words: unique keys all over the range.
    keys = (rng.permutation(users).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    codes = rng.integers(0, 1000, (users, 4), dtype=np.uint16)
    array = pa.array(keys)
    return (array.cast(pa.large_string()) if kind == "string" else array), codes


def searchsorted_store(keys: pa.Array, codes: np.ndarray) -> Lookup:
    numbers = keys.to_numpy()
    order = np.argsort(numbers)
    ordered, codes = numbers[order], codes[order]

    def lookup(batch: pa.Array) -> np.ndarray:
        wanted = batch.to_numpy()
        rows = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        assert (ordered[rows] == wanted).all()
        return codes[rows].astype(np.int64)

    return lookup


def dict_store(keys: pa.Array, codes: np.ndarray) -> Lookup:
    row_of = dict(zip(keys.to_pylist(), range(len(keys)), strict=True))
    return lambda batch: codes[[row_of[key] for key in batch.to_pylist()]].astype(np.int64)


def lmdb_store(keys: pa.Array, codes: np.ndarray, path: Path) -> Lookup:
    import lmdb

    def encode(key: int | str) -> bytes:
        return key.to_bytes(8, "big", signed=True) if isinstance(key, int) else key.encode()

    environment = lmdb.open(str(path), map_size=200 * len(keys) + (1 << 26))
    with environment.begin(write=True) as writing, writing.cursor() as cursor:
        cursor.putmulti(
            sorted((encode(k), c.tobytes()) for k, c in zip(keys.to_pylist(), codes, strict=True))
        )
    reading = environment.begin(buffers=True)

    def lookup(batch: pa.Array) -> np.ndarray:
        found = b"".join(reading.get(encode(key)) for key in batch.to_pylist())
        return np.frombuffer(found, np.uint16).reshape(-1, 4).astype(np.int64)

    return lookup


def stores(keys: pa.Array, codes: np.ndarray, bank: FeatureBank, path: Path) -> dict[str, Lookup]:
    found: dict[str, Lookup] = {"bank": bank.lookup, "dict": dict_store(keys, codes)}
    if pa.types.is_integer(keys.type):
        found["searchsorted"] = searchsorted_store(keys, codes)
    if util.find_spec("lmdb"):
        found["lmdb"] = lmdb_store(keys, codes, path)
    return found


def check(name: str, lookup: Lookup, keys: pa.Array, codes: np.ndarray) -> None:
    rows = np.random.default_rng(1).integers(0, len(keys), 100_000)
    if not np.array_equal(lookup(keys.take(pa.array(rows))), codes[rows]):
        raise SystemExit(f"{name}: wrong codes; no number from a red store")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def rate(work: Callable[[Any], Any], batches: list[Any], size: int) -> dict[str, float]:
    """Look-ups a second: median and the 20th and 80th percentile over batches."""
    for batch in batches[: len(batches) // 4]:
        work(batch)
    per_second = [size / timed(lambda batch=batch: work(batch))[0] for batch in batches]
    p20, median, p80 = np.percentile(per_second, [20, 50, 80])
    return {"median": round(median), "p20": round(p20), "p80": round(p80)}


def run(users: int, kind: str, batch: int, repeats: int, folder: Path) -> dict[str, Any]:
    keys, codes = make_users(users, kind)
    path = folder / "bank"
    write_s, _ = timed(
        lambda: FeatureBank.write(path, keys, codes, fields=FIELDS, model_fingerprint="benchmark")
    )
    opens = [timed(lambda: FeatureBank.open(path))[0] for _ in range(20)]
    bank = FeatureBank.open(path)
    verify_s, _ = timed(bank.verify)
    rows = np.random.default_rng(2).integers(0, users, (repeats, batch))
    batches = [keys.take(pa.array(r)) for r in rows]
    lookups, singles = {}, {}
    for name, lookup in stores(keys, codes, bank, folder / "lmdb").items():
        check(name, lookup, keys, codes)
        lookups[name] = rate(lookup, batches, batch)
        singles[name] = round(1e6 / rate(lookup, [b[:1] for b in batches], 1)["median"], 1)
        per_s = lookups[name]["median"] / 1e6
        print(f"{name:13} {per_s:7.2f} M look-ups/s  {singles[name]:8.1f} us for a single one")
    ceiling = rate(lambda r: bank.codes().take(r, axis=0).astype(np.int64), list(rows), batch)
    print(f"{'rows':13} {ceiling['median'] / 1e6:7.2f} M rows/s (ceiling: no look-up at all)")
    some = pa.array(np.arange(0, users, 100))
    update_s, _ = timed(lambda: bank.update(keys.take(some), codes[::100]))
    return {
        "benchmark": "bank",
        "users": users,
        "keys": kind,
        "batch": batch,
        "open_ms": round(1e3 * float(np.median(opens)), 3),
        "lookups_per_s": lookups,
        "single_us": singles,
        "ceiling_rows_per_s": ceiling,
        "bytes_per_user": round(bank.info()["bytes_per_user"], 2),
        "write_s": round(write_s, 2),
        "update_1_percent_s": round(update_s, 2),
        "verify_s": round(verify_s, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "load_average": os.getloadavg()[0],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {p: metadata.version(p) for p in ("numpy", "pyarrow")},
        "commit": commit(),
    }


def commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    if shutil.which("git") is None:
        return None
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None


@pytest.fixture(scope="module", params=["int64", "string"])
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pa.Array, np.ndarray, FeatureBank, Path]:
    keys, codes = make_users(200_000, request.param)
    path = tmp_path_factory.mktemp("bank")
    bank = FeatureBank.write(path / "b", keys, codes, fields=FIELDS, model_fingerprint="benchmark")
    return keys, codes, bank, path


@pytest.mark.parametrize("store", ["bank", "searchsorted", "dict", "lmdb"])
def test_lookup(benchmark: Any, small: Any, store: str) -> None:
    keys, codes, bank, path = small
    lookup = stores(keys, codes, bank, path / "lmdb").get(store)
    if lookup is None:
        pytest.skip(f"{store}: not installed, or not for this key type")
    check(store, lookup, keys, codes)
    benchmark(lookup, keys.take(pa.array(np.random.default_rng(2).integers(0, len(keys), 1024))))


def test_open(benchmark: Any, small: Any) -> None:
    assert len(benchmark(FeatureBank.open, small[2].path)) == 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    host = "the bank is read by the host either way"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=host)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--keys", choices=["int64", "string"], default="int64")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=400, help="batches timed per store")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(args.users, args.keys, args.batch, args.repeats, Path(folder))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

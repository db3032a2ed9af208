"""Feature bank: open, look up, write, update, against LMDB, Redis, pandas and numpy.

    python benchmarks/bench_bank.py [--users 10000000] [--keys int64|string] [--quick]
    pytest benchmarks/bench_bank.py --benchmark-only

Stores: `bank`; `lmdb` (if installed); `redis` (a redis-server of our own over a Unix socket, one
MGET per batch, through hiredis where installed); in memory, with their index built: `pandas`
(Index.get_indexer, then the rows of an array), `searchsorted` (numpy, integer keys; pyarrow keeps
no index of its own, and searching its sorted buffers is this), `dict` (up to a million users).
Every store must first answer 100,000 users right, else there is no number. Look-ups are of random
users, pages warm, one thread, stores in turn. `dense_rows` is for ids that are row numbers already:
the codes gathered, no look-up at all. Last line: JSON; `ratios.batch_lookup` is the bank over the
better of LMDB and Redis, `ratios.batch_lookup_inprocess` over the best store in memory, of the best
calls: other load on the machine only ever adds, and to long calls more than to short ones.

`--before CHECKOUT` also times the look-ups of another checkout (say of a commit before a change,
its extension built by `python setup.py build_ext --inplace`) in turn with ours, each in a process
of its own on a bank that it has written: batches, single users, opening, and the first batch after.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from _before import answer, in_turn

from userip_fast.bank import FeatureBank
from userip_fast.core import _extension as extension
from userip_fast.core.errors import UnavailableError

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


def pandas_store(keys: pa.Array, codes: np.ndarray) -> Lookup:
    import pandas as pd

    index = pd.Index(keys.to_numpy(zero_copy_only=False))
    index.get_indexer(index[:1])  # builds its hash table

    def lookup(batch: pa.Array) -> np.ndarray:
        rows = index.get_indexer(batch.to_numpy(zero_copy_only=False))
        assert rows.min(initial=0) >= 0
        return codes[rows].astype(np.int64)

    return lookup


def lmdb_store(keys: pa.Array, codes: np.ndarray, path: Path) -> Lookup:
    import lmdb

    def encode(key: int | str) -> bytes:
        return (key + (1 << 63)).to_bytes(8, "big") if isinstance(key, int) else key.encode()

    environment = lmdb.open(str(path), map_size=200 * len(keys) + (1 << 26))
    order = pc.sort_indices(keys).to_numpy()
    with environment.begin(write=True) as writing, writing.cursor() as cursor:
        for i in range(0, len(keys), 100_000):
            own = order[i : i + 100_000]
            rows = codes[own].tobytes()
            pairs = enumerate(keys.take(pa.array(own)).to_pylist())
            cursor.putmulti(((encode(k), rows[8 * n : 8 * n + 8]) for n, k in pairs), append=True)
    reading = environment.begin(buffers=True)

    def lookup(batch: pa.Array) -> np.ndarray:
        found = b"".join(reading.get(encode(key)) for key in batch.to_pylist())
        return np.frombuffer(found, np.uint16).reshape(-1, 4).astype(np.int64)

    return lookup


@contextmanager
def redis_store(bank: FeatureBank, folder: Path) -> Iterator[Lookup | None]:
    """A server of our own, or None where there is no redis-server or client."""
    if shutil.which("redis-server") is None or util.find_spec("redis") is None:
        yield None
        return
    from userip_fast.bank.redis_export import RedisBank, connect, export_redis

    url = f"unix://{folder}/redis.sock"
    options = ["--port", "0", "--unixsocket", f"{folder}/redis.sock", "--save", ""]
    command = ["redis-server", *options, "--appendonly", "no", "--dir", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                connect(url)
                break
            except UnavailableError:
                time.sleep(0.05)
        export_redis(bank, url)
        online = RedisBank(url)
        yield lambda batch: online.lookup(batch.to_pylist())
    finally:
        server.kill()
        server.wait()


def stores(keys: pa.Array, codes: np.ndarray, bank: FeatureBank, path: Path) -> dict[str, Lookup]:
    found: dict[str, Lookup] = {"bank": bank.lookup}
    if len(keys) <= 1_000_000:
        found["dict"] = dict_store(keys, codes)
    if pa.types.is_integer(keys.type):
        found["searchsorted"] = searchsorted_store(keys, codes)
    if util.find_spec("pandas"):
        found["pandas"] = pandas_store(keys, codes)
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


def latencies(
    works: dict[str, Callable[[Any], Any]], batches: dict[str, list[Any]], size: int
) -> dict[str, dict[str, float]]:
    """Per store: look-ups per second at best, and best, p50 and p99 of a call in microseconds."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for i in range(-5, len(next(iter(batches.values())))):
        for name, work in works.items():
            seconds, _ = timed(lambda w=work, n=name, i=i: w(batches[n][max(i, 0)]))
            if i >= 0:
                taken[name].append(seconds)
    out = {}
    for name, seconds in taken.items():
        best, p50, p99 = np.percentile(seconds, [0, 50, 99])
        out[name] = {
            "per_s": round(size / best), "best_us": round(1e6 * best, 1),
            "p50_us": round(1e6 * p50, 1), "p99_us": round(1e6 * p99, 1),
        }  # fmt: skip
    return out


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
    with redis_store(bank, folder) as redis:
        works: dict[str, Lookup] = stores(keys, codes, bank, folder / "lmdb")
        if redis is not None:
            works["redis"] = redis
        for name, lookup in works.items():
            check(name, lookup, keys, codes)
        mapped = bank.codes()
        dense = "dense_rows"
        works[dense] = lambda r: mapped.take(r, axis=0).astype(np.int64)
        looked_for = [keys.take(pa.array(r)) for r in rows]
        inputs = {name: list(rows) if name == dense else looked_for for name in works}
        lookups = latencies(works, inputs, batch)
        singles = latencies(works, {n: [x[:1] for x in xs] for n, xs in inputs.items()}, 1)
    for name in works:
        b, one = lookups[name], singles[name]
        print(
            f"{name:13} {b['per_s'] / 1e6:7.2f} M look-ups/s in batches of {batch} (best "
            f"{b['best_us']:.0f} us, p50 {b['p50_us']:.0f}, p99 {b['p99_us']:.0f}); single p50 "
            f"{one['p50_us']:.1f} us, p99 {one['p99_us']:.1f}"
        )

    def over(*names: str) -> float | None:
        best = max((lookups[n]["per_s"] for n in names if n in lookups), default=None)
        return None if best is None else round(lookups["bank"]["per_s"] / best, 2)

    some = pa.array(np.arange(0, users, 100))
    update_s, _ = timed(lambda: bank.update(keys.take(some), codes[::100]))
    return {
        "benchmark": "bank",
        "users": users,
        "keys": kind,
        "batch": batch,
        "open_ms": round(1e3 * float(np.median(opens)), 3),
        "ratios": {
            "batch_lookup": over("lmdb", "redis"),
            "batch_lookup_inprocess": over("pandas", "searchsorted", "dict"),
        },
        "compiled_extension": extension.load() is not None,
        "batches": lookups,
        "singles": singles,
        "bytes_per_user": round(bank.info()["bytes_per_user"], 2),
        "file_bytes": bank.info()["file_bytes"],
        "write_s": round(write_s, 2),
        "update_1_percent_s": round(update_s, 2),
        "verify_s": round(verify_s, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "load_average": os.getloadavg()[0],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {
            p: metadata.version(p)
            for p in ("numpy", "pyarrow", "pandas", "lmdb", "redis")
            if util.find_spec(p)
        },
        "commit": commit(),
    }


def answer_questions(users: int, kind: str, batch: int, folder: Path) -> None:
    """Our side of `--before`, with whatever package this process has."""
    keys, codes = make_users(users, kind)
    path = folder / "bank"
    FeatureBank.write(path, keys, codes, fields=FIELDS, model_fingerprint="benchmark")
    bank = FeatureBank.open(path)
    check("bank", bank.lookup, keys, codes)
    draw = np.random.default_rng(3)

    def some(size: int) -> pa.Array:
        return keys.take(pa.array(draw.integers(0, users, size)))

    def calls(size: int, times: int) -> list[float]:
        batches = [some(size) for _ in range(times)]
        return [timed(lambda b=b: bank.lookup(b))[0] for b in batches]

    def first(_: int) -> list[float]:
        opened, asked = FeatureBank.open(path), some(batch)
        return [timed(lambda: opened.lookup(asked))[0]]

    answer(
        {
            "batch": lambda _: calls(batch, 20),
            "single": lambda _: calls(1, 200),
            "open": lambda _: [timed(lambda: FeatureBank.open(path))[0]],
            "first_batch": first,
        }
    )


def commit(checkout: Path = Path(__file__).parent) -> str | None:
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
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


@pytest.mark.parametrize("store", ["bank", "searchsorted", "dict", "pandas", "lmdb"])
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
    parser.add_argument("--users", type=int, default=10_000_000)
    parser.add_argument("--keys", choices=["int64", "string"], default="int64")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=400, help="batches timed per store")
    parser.add_argument("--quick", action="store_true", help="200,000 users")
    parser.add_argument("--before", type=Path, help="another checkout, its extension built")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.users = 200_000
    if args.answer:
        answer_questions(args.users, args.keys, args.batch, args.answer)
        return
    more = {}
    if args.before:
        sizes = ["--users", str(args.users), "--keys", args.keys, "--batch", str(args.batch)]
        rounds = {"batch": args.repeats // 2, "single": args.repeats // 10, "open": 20}
        turns = in_turn(__file__, args.before, sizes, {**rounds, "first_batch": 20})
        more["before_and_after"] = {"commit_before": commit(args.before), **turns}
        for kind, t in turns.items():
            print(
                f"{kind:11} before: best {t['before']['best_us']:.1f} us, p50 "
                f"{t['before']['p50_us']:.1f}; after: {t['after']['best_us']:.1f}, "
                f"{t['after']['p50_us']:.1f}; over before: {t['best_over_before']:.3f}, "
                f"{t['p50_over_before']:.3f}"
            )
    with tempfile.TemporaryDirectory() as folder:
        result = run(args.users, args.keys, args.batch, args.repeats, Path(folder))
    print(json.dumps(result | more))


if __name__ == "__main__":
    main()

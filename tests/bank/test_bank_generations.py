"""Updates under open readers, interrupted writers, two writers at once."""

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from userip_fast.bank import BankWriter, FeatureBank
from userip_fast.core.errors import (
    ConfigError,
    DataError,
    FormatError,
    MismatchError,
    UnavailableError,
)
from userip_fast.core.files import remove

FIELDS = [{"name": "f", "codebook_size": 10, "code_names": None}]
SETTINGS = {"fields": FIELDS, "model_fingerprint": "m"}
POOLS = []  # Arrow's, for measuring; they must outlive what they gave


def write(path, keys, code, **kwargs):
    codes = np.full((len(keys), 1), code)
    return FeatureBank.write(path, keys, codes, **SETTINGS | kwargs)


def generations(path):
    return sorted(p.name for p in path.iterdir() if p.name.startswith("gen-"))


def test_a_generation_goes_at_once(tmp_path, monkeypatch):
    """Whoever was handed it is told so, also while its files are being removed."""
    keys = np.arange(5)
    sent = pickle.dumps(write(tmp_path / "b", keys, 0))
    write(tmp_path / "b", keys, 1)
    real, halves = remove, []

    def half(entry):
        (entry / "manifest.json").unlink()
        halves.append(entry)
        with pytest.raises(FormatError, match=r"gen-000001: is gone.*open the bank again"):
            pickle.loads(sent)
        real(entry)

    monkeypatch.setattr("userip_fast.bank.generations.remove", half)
    write(tmp_path / "b", keys, 2)
    assert len(halves) == 1
    assert sorted(os.listdir(tmp_path / "b")) == ["CURRENT", "LOCK", "gen-000002", "gen-000003"]


def test_blocks_in_any_order_make_the_same_files(tmp_path):
    keys = np.arange(100)
    whole = FeatureBank.write(tmp_path / "a", keys, keys[:, None] % 10, **SETTINGS)
    with BankWriter(tmp_path / "b", **SETTINGS) as writer:
        for block in (keys[60:], keys[:1], keys[:0], keys[1:60]):
            writer.append(block, block[:, None] % 10)
    blocks = FeatureBank.open(tmp_path / "b")
    for name in whole.info()["file_bytes"]:
        a, b = (tmp_path / p / "gen-000001" / name for p in "ab")
        assert a.read_bytes() == b.read_bytes()
    assert len(blocks) == 100


@pytest.mark.parametrize(("strings", "probabilities"), [(False, False), (True, True)])
def test_users_that_wait_on_disk_make_the_same_files(tmp_path, monkeypatch, strings, probabilities):
    """Blocks larger and smaller than what waits in memory; in hash order and not; updates too."""
    rng = np.random.default_rng(0)
    keys = [f"user {i} é" * (i % 3) + str(i) for i in range(700)] if strings else list(range(700))
    codes, p = rng.integers(0, 10, (2, 700, 1)), rng.random((2, 700, 1))

    def blocks(writer, rows, which):
        for part in np.split(rows, [0, 3, 130, 131, 400]):
            here = p[which, part] if probabilities else None
            writer.append([keys[i] for i in part], codes[which, part], here)

    def make(path):
        with BankWriter(path, **SETTINGS) as writer:
            blocks(writer, rng.permutation(500), 0)
            (waiting,) = [*path.glob(".gen-*.tmp")] or [None]
            if waiting:  # as a kill would leave it
                shutil.copytree(waiting, path / ".gen-000000.killed_1.tmp")
        assert not [*path.glob(".*")]
        with BankWriter(path, **SETTINGS, keep_others=True) as writer:
            blocks(writer, np.arange(300, 700), 1)
        with BankWriter(path, **SETTINGS, keep_others=True):
            pass  # nobody new
        return waiting

    assert make(tmp_path / "memory") is None
    monkeypatch.setattr("userip_fast.bank.spool.WAITING_USERS", 200)
    assert make(tmp_path / "disk") is not None
    bank = FeatureBank.open(tmp_path / "disk", verify=True)
    want = np.concatenate([codes[0, :300], codes[1, 300:]])
    np.testing.assert_array_equal(bank.lookup(keys), want)
    for generation in ("gen-000002", "gen-000003"):
        files = sorted((tmp_path / "memory" / generation).iterdir())
        assert len(files) == (7 if strings else 5) + probabilities
        for file in files:
            assert file.read_bytes() == (tmp_path / "disk" / generation / file.name).read_bytes()
    writer = BankWriter(tmp_path / "disk", **SETTINGS)
    blocks(writer, np.arange(700), 0)
    writer.append(keys[:1], codes[0, :1], p[0, :1] if probabilities else None)
    with pytest.raises(DataError, match="1 occur more than once"):
        writer.close()
    assert sorted(f.name for f in (tmp_path / "disk").iterdir()) == [
        "CURRENT", "LOCK", "gen-000002", "gen-000003",
    ]  # fmt: skip


def test_writer_refuses_what_does_not_fit_together(tmp_path):
    writer = BankWriter(tmp_path / "b", **SETTINGS)
    writer.append([1, 2], [[0], [0]])
    with pytest.raises(MismatchError, match="string keys after int64 keys"):
        writer.append(["a"], [[0]])
    with pytest.raises(MismatchError, match="with every block or with none"):
        writer.append([3], [[0]], [[1.0]])
    writer.append([2, 3], [[0], [0]])
    with pytest.raises(DataError, match="1 occur more than once: 2"):
        writer.close()
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="closed"):
        writer.append([4], [[0]])
    writer.close()  # twice is harmless
    assert not (tmp_path / "b").exists()


def test_readers_keep_what_they_opened(tmp_path):
    path = tmp_path / "b"
    readers = [write(path, ["a", "b"], 0)]
    for code in range(1, 5):
        readers.append(readers[-1].update(["b", f"new{code}"], [[code], [code]]))
        assert generations(path) == [f"gen-{code:06d}", f"gen-{code + 1:06d}"]
    for code, reader in enumerate(readers):  # most of their files are gone by now
        assert reader.lookup(["a", "b"]).tolist() == [[0], [code]]
        assert len(reader) == 2 + code
        reader.verify()
        assert reader.info()["generation"] == f"gen-{code + 1:06d}"
        assert reader.info()["file_bytes"]["codes.bin"] == len(reader)
        for export in (reader.to_parquet, reader.to_feast):
            export(tmp_path / "out.parquet")
            assert pq.read_table(tmp_path / "out.parquet")["f"].to_pylist().count(code) > 0
    latest = FeatureBank.open(path, verify=True)
    assert latest.lookup([f"new{code}" for code in range(1, 5)]).tolist() == [[1], [2], [3], [4]]


def test_update_starts_from_the_current_generation(tmp_path):
    first = write(tmp_path / "b", [1], 1)
    first.update([2], [[2]])
    bank = first.update([3], [[3]])
    assert bank.lookup([1, 2, 3]).tolist() == [[1], [2], [3]]
    write(tmp_path / "b", [9], 9)  # exactly these users
    assert FeatureBank.open(tmp_path / "b").keys().to_pylist() == [9]
    write(tmp_path / "b", [9], 9, model_fingerprint="another")
    with pytest.raises(MismatchError, match="another model"):
        first.update([3], [[3]])


def test_update_of_probabilities(tmp_path):
    with_p = write(tmp_path / "a", [1, 2], 1, probabilities=[[0.5], [0.25]])
    with_p = with_p.update([2, 3], [[2], [3]], [[0.75], [1.0]])
    assert with_p.probabilities[with_p.rows([1, 2, 3])].tolist() == [[0.5], [0.75], [1.0]]
    with pytest.raises(MismatchError, match="has probabilities"):
        with_p.update([1], [[1]])
    without = write(tmp_path / "b", [1], 1)
    with pytest.raises(MismatchError, match="has no probabilities"):
        without.update([1], [[1]], [[1.0]])
    with pytest.raises(DataError, match="1 occur more than once: 5"):
        without.update([5, 5], [[1], [2]])
    assert FeatureBank.open(tmp_path / "b").info()["generation"] == "gen-000001"


def test_open_follows_a_pointer_that_moves(tmp_path, monkeypatch):
    """Two updates between reading CURRENT and opening what it names remove the latter."""
    from userip_fast.bank import feature_bank

    bank = write(tmp_path / "b", [1], 0)
    real, calls = feature_bank.current_generation, []

    def slow(path):
        answer = real(path)
        calls.append(answer)
        if len(calls) == 1:
            monkeypatch.setattr(feature_bank, "current_generation", real)
            bank.update([1], [[1]]).update([1], [[2]])
            monkeypatch.setattr(feature_bank, "current_generation", slow)
        return answer

    monkeypatch.setattr(feature_bank, "current_generation", slow)
    assert FeatureBank.open(tmp_path / "b").lookup(1).tolist() == [[2]]
    assert calls[0][0].name == "gen-000001"
    assert not calls[0][0].exists()


@pytest.mark.parametrize("name", ["manifest.json", "keys.bin", "codes.bin"])
def test_open_while_what_it_reads_is_replaced(tmp_path, monkeypatch, name):
    """Wherever two updates fall into an opening, it turns to what is current then."""
    from userip_fast.bank import layout

    bank = write(tmp_path / "b", [1], 0)
    reads, replaced = {f: getattr(layout, f) for f in ("read_json_bytes", "_map")}, []

    def reading(function):
        def read(path, *args):
            if path.name == name and not replaced:
                replaced.append(path)
                bank.update([1], [[1]]).update([1], [[2]])
                assert not path.exists()
            return reads[function](path, *args)

        return read

    for function in reads:
        monkeypatch.setattr(layout, function, reading(function))
    assert FeatureBank.open(tmp_path / "b").lookup(1).tolist() == [[2]]
    assert replaced


def test_copies_and_other_processes_read_the_same_generation(tmp_path):
    bank = write(tmp_path / "b", [1, 2], 3)
    bank.lookup(1)  # which binds the compiled look-up
    assert copy.copy(bank) is copy.deepcopy(bank) is bank
    sent = pickle.dumps(bank)
    assert len(sent) < 1000  # nothing of the arrays
    newer = bank.update([1], [[4]])
    assert pickle.loads(sent).lookup([1, 2]).tolist() == [[3], [3]]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # as a DataLoader's workers
        assert pool.map(newer.lookup, [[1], 2]) == [[[4]], [[3]]]
    newer.update([1], [[5]])
    with pytest.raises(FormatError, match=r"gen-000001: is gone, .* open the bank again before"):
        pickle.loads(sent)
    assert bank.lookup(1).tolist() == [[3]]


@pytest.mark.parametrize("strings", [False, True])
def test_memory_of_update_and_verify_does_not_grow_with_the_bank(tmp_path, monkeypatch, strings):
    monkeypatch.setattr("userip_fast.bank.spool.WAITING_USERS", 1 << 12)
    monkeypatch.setattr("userip_fast.bank.layout._PIECE", 1 << 12)
    usual = pa.default_memory_pool()

    def peak(work):
        POOLS.append(pool := pa.proxy_memory_pool(usual))
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1] + pool.max_memory()
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(usual)

    peaks, users = [], (30_000, 130_000)
    for n in users:
        keys = [f"user {i}" for i in range(n)] if strings else np.arange(n)
        bank = write(tmp_path / f"{n}", keys, 1)
        peaks.append([peak(bank.verify), peak(lambda b=bank, k=keys: b.update(k[:1], [[2]]))])
    per_user = (np.array(peaks[1]) - peaks[0]) / (users[1] - users[0])
    assert (per_user < 3).all(), per_user  # the directory: half a byte, and what is made of it


def test_a_writer_sweeps_before_it_writes(tmp_path):
    path, outside = tmp_path / "b", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("x")
    write(path, [1], 1)
    write(path, [1], 2)

    def leave():
        for name in (
            ".gen-000003.dead_1.tmp",
            ".gen-000000.dead_2.tmp",
            "gen-000003",
            "gen-000009",
        ):
            shutil.copytree(path / "gen-000001", path / name)
        (path / ".CURRENT.dead_3.tmp").write_text("{")
        (path / ".gen-000004.dead_4.tmp").symlink_to(outside)

    leave()
    BankWriter(path, **SETTINGS).abandon()  # before it has written anything
    assert sorted(os.listdir(path)) == ["CURRENT", "LOCK", "gen-000001", "gen-000002"]
    assert os.listdir(outside) == ["mine"]
    assert FeatureBank.open(path, verify=True).lookup(1).tolist() == [[2]]
    for damage in (lambda f: f.write_text("{"), lambda f: (f.unlink(), f.symlink_to("nowhere"))):
        damage(path / "CURRENT")  # which generation it was nobody knows
        if not (path / "gen-000009").exists():
            leave()
        BankWriter(path, **SETTINGS).abandon()
        assert generations(path) == ["gen-000001", "gen-000002", "gen-000003", "gen-000009"]
    (path / "CURRENT").unlink()  # a first writer was killed: nothing was ever current
    BankWriter(path, **SETTINGS).abandon()
    assert not path.exists()


def test_an_exception_leaves_the_bank_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "b"

    def interrupted():
        with BankWriter(path, **SETTINGS) as writer:
            writer.append([1], [[1]])
            raise RuntimeError("inference")

    with pytest.raises(RuntimeError, match="inference"):
        interrupted()
    assert not path.exists()
    bank = write(path, [1], 1)
    before = sorted(p.relative_to(path) for p in path.rglob("*"))

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("userip_fast.bank.layout.write_json", full)
    with pytest.raises(OSError, match="disk full"):
        bank.update([1], [[2]])
    assert sorted(p.relative_to(path) for p in path.rglob("*")) == before
    assert FeatureBank.open(path, verify=True).lookup(1).tolist() == [[1]]


KILLED = """
    # Kills a writer at its k-th step towards the disk, for every k until it gets through.
    import os, signal, sys
    import numpy as np
    from userip_fast.bank import FeatureBank

    path, keys = sys.argv[1], [f"u{i}" for i in range(50)]
    settings = dict(fields=[dict(name="f", codebook_size=200)], model_fingerprint="m")

    def child(work):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(work())
            except BaseException as e:
                print(repr(e), file=sys.stderr, flush=True)
                os._exit(255)
        return os.waitpid(pid, 0)[1]

    def write(kill_at, code, path=path):
        steps = 0
        def counted(real):
            def step(*args, **kwargs):
                nonlocal steps
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1
                return real(*args, **kwargs)
            return step
        for name in ("fsync", "rename", "replace", "chmod", "rmdir") if kill_at is not None else ():
            setattr(os, name, counted(getattr(os, name)))
        FeatureBank.write(path, keys, np.full((50, 1), code), **settings)
        return 0

    def read():
        # The one code of all users; 0 if there is no bank.
        if not os.path.exists(os.path.join(path, "CURRENT")):
            return 0
        (code,) = set(FeatureBank.open(path, verify=True).lookup(keys).ravel().tolist())
        return code

    write(None, 1, path + "-first")  # what is imported now need not be imported in every child
    kills = found = 0
    for round in range(2):  # a first write, and one onto a bank
        kill_at, done = 0, False
        while not done:
            code = kills + 1
            status = child(lambda: write(kill_at, code))
            assert status in (0, signal.SIGKILL), status
            done = status == 0
            before, found = found, child(read) >> 8
            assert found in ((code,) if done else (before, code)), (round, kill_at, found)
            kill_at, kills = kill_at + 1, kills + 1
    print(kills)
"""


def test_a_killed_writer_leaves_the_old_bank_or_the_new_one(tmp_path):
    path = tmp_path / "b"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # so many points to die at
    # What the dead left behind was swept up by those that got through.
    assert len(generations(path)) <= 2
    assert not [p.name for p in path.iterdir() if p.name.startswith(".")]


def test_second_writer_waits_or_is_told(tmp_path):
    path = tmp_path / "b"
    first = BankWriter(path, **SETTINGS)
    first.append([1], [[1]])
    with pytest.raises(UnavailableError, match="another writer has been holding this bank"):
        BankWriter(path, **SETTINGS, lock_timeout_s=0)
    with pytest.raises(FormatError, match="no feature bank here"):
        FeatureBank.open(path)
    waiting = threading.Timer(0.2, first.close)
    waiting.start()
    second = BankWriter(path, **SETTINGS, lock_timeout_s=60)  # gets in when the first is through
    waiting.join()
    assert FeatureBank.open(path).lookup(1).tolist() == [[1]]
    with pytest.raises(UnavailableError, match="lock_timeout_s"):
        FeatureBank.open(path).update([1], [[2]], lock_timeout_s=0)
    second.abandon()
    assert FeatureBank.open(path).update([1], [[2]], lock_timeout_s=0).lookup(1).tolist() == [[2]]


def test_waiting_for_a_writer_that_abandons_a_new_bank(tmp_path):
    """The folder that is waited for is removed and made anew: the lock must be on the new one."""
    path = tmp_path / "b"
    first = BankWriter(path, **SETTINGS)
    waiting = threading.Timer(0.2, first.abandon)
    waiting.start()
    second = BankWriter(path, **SETTINGS, lock_timeout_s=60)
    waiting.join()
    with pytest.raises(UnavailableError):
        BankWriter(path, **SETTINGS, lock_timeout_s=0)
    second.append([1], [[1]])
    second.close()
    assert FeatureBank.open(path).lookup(1).tolist() == [[1]]


def test_foreign_paths_are_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for path, message in [(file, "is a file"), (tmp_path, "not a feature bank .*'notes.txt'")]:
        with pytest.raises(DataError, match=message):
            write(path, [1], 1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert len(write(tmp_path / "empty", [1], 1)) == 1


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("waiting", [100, 10**6])
def test_who_is_removed_is_gone(tmp_path, monkeypatch, strings, probabilities, waiting):
    monkeypatch.setattr("userip_fast.bank.spool.WAITING_USERS", waiting)
    rng = np.random.default_rng(0)
    keys = [f"user {i}" for i in range(700)] if strings else list(range(700))
    codes, p = rng.integers(0, 10, (700, 1)), rng.random((700, 1)).astype(np.float32)
    if not probabilities:
        p = None
    old = FeatureBank.write(tmp_path / "a", keys, codes, probabilities=p, **SETTINGS)
    gone = rng.permutation(700)[:300]
    left = np.setdiff1d(np.arange(700), gone)
    names = [keys[i] for i in gone]
    new = old.remove([*names, names[0]])
    new.verify()
    assert len(new) == 400
    assert (new.rows(names) == -1).all()
    assert (new.lookup([keys[i] for i in left]) == codes[left]).all()
    assert (old.lookup(keys) == codes).all()  # an open reader stays as it was
    want = FeatureBank.write(
        tmp_path / "b", [keys[i] for i in left], codes[left],
        probabilities=None if p is None else p[left], **SETTINGS,
    )  # fmt: skip
    assert new.digest == want.digest
    nobody = new.remove(new.keys())
    nobody.verify()
    assert (len(nobody), nobody.key_type) == (0, old.key_type)
    assert len(nobody.update(keys[:2], codes[:2], None if p is None else p[:2])) == 2


def test_what_cannot_be_removed(tmp_path):
    bank = write(tmp_path / "a", [1, 2, 3], 4)
    with pytest.raises(DataError, match=r"2 of 3 are not in the bank .*: 7, 8; on_unknown='skip'"):
        bank.remove([1, 7, 8])
    assert len(FeatureBank.open(tmp_path / "a")) == 3
    assert len(bank.remove([1, 7, 8], on_unknown="skip")) == 2
    with pytest.raises(DataError, match="1 of 1"):  # the bank as it is now
        bank.remove([1])
    with pytest.raises(MismatchError, match="has int64 keys, these are string"):
        bank.remove(["1"])
    with pytest.raises(ConfigError, match="on_unknown='code'"):
        bank.remove([1], on_unknown="code")
    writer = BankWriter(tmp_path / "a", **SETTINGS, keep_others=True)
    writer.remove(["x"])
    with pytest.raises(MismatchError, match="int64 keys after string keys"):
        writer.remove([1])
    with pytest.raises(MismatchError, match="string keys, the bank"):
        writer.close()
    write(tmp_path / "a", [1], 4, model_fingerprint="other")
    with pytest.raises(MismatchError, match="rewritten with another model"):
        bank.remove([1])

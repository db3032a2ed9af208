"""Kills, damage, full disks, missing shards, a Redis that goes away, two at once: nothing is lost,
and nothing is wrong.

    python tests/faults/harness.py                 # 250 kills and all other faults; minutes
    python tests/faults/harness.py --quick         # what the test suite runs

One parent loads a tiny model and forks a child per attempt, so that an attempt costs a fraction of
a second. A child is killed with SIGKILL after a random time, or before or after its n-th system
call that changes a file. After each kill whatever is visible must be whole and verify; when an
attempt ends by itself, model and bank must be the bytes of a run that nothing happened to. The last
line is JSON with the counts; a fault that was not survived ends in a traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import structured
import tiny
import torch

import userip_fast as uf
import userip_fast.em.table
import userip_fast.model.files
from userip_fast.bank.index import HashIndex
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.errors import (
    ConfigError,
    DataError,
    FormatError,
    MismatchError,
    StorageError,
    UnavailableError,
    UserIPError,
)
from userip_fast.core.files import sha256_file, write_json
from userip_fast.core.sums import check_sums, folder_sums, sealed
from userip_fast.jobs import shards
from userip_fast.lm import embedded

USERS, SHARDS = 40, 3
CONFIG = Config(
    data=DataConfig(rating="rating", max_tokens=60),
    em=EMConfig(
        estep="gradient",
        steps=1,
        rounds=3,
        lr=0.2,
        block_users=9,
        codebook_update="ema",
        kmeans_restarts=2,
    ),
    fields=(uf.ProfileField("taste", "The user's taste is", 1, 4), uf.ProfileField("b", "b", 1, 3)),
)
SMALL_LM = replace(
    CONFIG,
    data=DataConfig(max_tokens=60),
    lm=LMConfig(embedded_hidden=16, embedded_heads=2, embedded_layers=1, embedded_tokens=4_000,
                embedded_vocab=320),
)  # fmt: skip
TABLE_CONFIG = Config(
    data=DataConfig(rating="rating", max_tokens=60, behaviour_context="independent"),
    em=EMConfig(estep="posterior", posterior="exact", rounds=2, lr=0.2),
    fields=CONFIG.fields,
)
CHANGES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
QUICK = 10, 6  # kills, scale of the other faults
Counts = Counter[str]


class World:
    """What an undisturbed run makes, to compare with.

    Attributes:
        old, new: Codes of a bank before and after inference over it.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # no thread pool exists when children are forked
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(0)
        user = np.repeat(np.arange(USERS), 3)
        log = {
            "user_id": user,
            "item_id": draw.integers(0, len(tiny.TEXTS), len(user)),
            "rating": draw.integers(1, 6, len(user)),
        }
        pq.write_table(pa.table(log), folder / "log.parquet")
        items = pa.table({"item_id": range(len(tiny.TEXTS)), "title": tiny.TEXTS})
        pq.write_table(items, folder / "items.parquet")
        self.lm = tiny.frozen("llama")
        self.lm.fingerprint  # noqa: B018  computed once, before the forks
        self.model: Any = None
        self._child(lambda: self.fit(folder / "whole"))
        self.whole = contents(folder / "whole")
        self.model = self._load(folder / "whole")
        self._child(lambda: self.infer(folder / "bank"))
        self.new = codes(folder / "bank")
        self.old = {user: (3, 2) for user in self.new}

    def _load(self, run: Path, lm: Any = None) -> Any:
        load = uf.model.files.open_lm
        try:  # the LM is in memory, not on disk
            uf.model.files.open_lm = lambda *args, **kwargs: lm or self.lm
            return uf.Model.load(run / "model")
        finally:
            uf.model.files.open_lm = load

    def _child(self, job: Callable[[], None]) -> None:
        status = attempt(job, None, 0.0)
        assert status == 0, status

    def stream(self, work: Path) -> Any:
        paths = self.folder / "log.parquet", self.folder / "items.parquet"
        return uf.stream_interactions(*paths, work=work, rating="rating")

    def fit(self, run: Path) -> None:
        data = self.stream(run.with_suffix(".work"))
        uf.fit(data, self.lm, config=CONFIG, out=run, resume=True)

    def infer(self, bank: Path) -> None:
        self.model.infer(self.stream(bank.with_suffix(".work")), bank)

    def all_shards(self, bank: Path) -> None:
        data = self.stream(bank.with_suffix(".work"))
        folder = bank.with_suffix(".shards")
        for i in range(SHARDS):
            shards.infer_shard(self.model, data, i, SHARDS, folder)
        shards.merge_shards(folder, bank)

    def old_bank(self, bank: Path) -> None:
        """A bank of the same users with other codes, to be replaced."""
        users = np.array(list(self.old))
        values = np.array([self.old[u] for u in users.tolist()])
        fields = self.model.bank_fields()
        uf.FeatureBank.write(bank, users, values, fields=fields, model_fingerprint="old")


def codes(bank: Path) -> dict[int, tuple[int, ...]]:
    opened = uf.FeatureBank.open(bank, verify=True)
    return dict(zip(opened.keys().to_pylist(), map(tuple, opened.codes().tolist())))


def contents(run: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of the model and of the bank's current generation."""
    model = run / "model"
    files = {str(p.relative_to(model)): p for p in model.rglob("*") if p.is_file()}
    current = json.loads((run / "bank" / "CURRENT").read_text())["generation"]
    files |= {f"bank/{p.name}": p for p in (run / "bank" / current).iterdir()}
    return {name: sha256_file(path) for name, path in sorted(files.items())}


# Attempts


def attempt(job: Callable[[], None], call: int | None, seconds: float) -> int:
    """Runs `job` in a child; its wait status.

    Args:
        call: Kills it around its n-th change of a file (before, where n is even); None: does not.
        seconds: Kills it after so long, where `call` is None and this is not 0.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            if call is not None:
                _die_at(call)
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if call is None and seconds:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _die_at(call: int) -> None:
    made = 0

    def wrap(real: Any) -> Any:
        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == call and call % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if made == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        return change

    for name in CHANGES:
        setattr(os, name, wrap(getattr(os, name)))


def kill_until_done(
    job: Callable[[], None],
    check: Callable[[], None],
    draw: random.Random,
    counts: Counts,
    name: str,
    *,
    most: int = 6,
    longest_s: float = 1.0,
) -> None:
    """Attempts `job`, killed up to `most` times, until one ends by itself; `check`s after each."""
    for kill in range(most + 1):
        call, seconds = None, 0.0
        if kill < most:
            by_call = draw.random() < 0.6
            call = int(draw.expovariate(1 / 25)) + 1 if by_call else None
            seconds = 0.0 if by_call else draw.uniform(0.001, longest_s)
        status = attempt(job, call, seconds)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            counts[f"{name}: kills"] += 1
            counts["kills"] += 1
        else:
            assert os.WEXITSTATUS(status) == 0, f"{name}: the child failed, see above"
        check()
        if not os.WIFSIGNALED(status):
            break
    counts[f"{name}: runs that ended"] += 1


def whole_or_absent(run: Path) -> None:
    if (run / "model").exists():
        manifest = json.loads((run / "model" / "manifest.json").read_text())
        check_sums(run / "model", manifest["files"])
    if (run / "bank" / "CURRENT").exists():
        uf.FeatureBank.open(run / "bank", verify=True)


# Faults


def kills(world: World, folder: Path, wanted: int, draw: random.Random, counts: Counts) -> None:
    """At least `wanted` kills over fit, inference over an older bank, and shards merged."""
    chain = 0
    while counts["kills"] < wanted:
        here = folder / f"chain{chain}"
        here.mkdir(parents=True)
        if chain % 3 == 0:
            run = here / "run"
            kill_until_done(
                lambda run=run: world.fit(run), lambda run=run: whole_or_absent(run), draw, counts,
                "fit", most=8,
            )  # fmt: skip
            assert contents(run) == world.whole, "fit: other bytes after kills"
        else:
            bank = here / "bank"
            world.old_bank(bank)

            def check(bank: Path = bank) -> None:
                assert codes(bank) in (world.old, world.new), "a reader saw a mixture"

            job, name = (world.infer, "infer") if chain % 3 == 1 else (world.all_shards, "shards")
            kill_until_done(
                lambda job=job, bank=bank: job(bank), check, draw, counts, name, longest_s=0.6
            )
            assert codes(bank) == world.new, f"{name}: other codes after kills"
        shutil.rmtree(here)
        chain += 1


def event_tables(
    world: World, folder: Path, rounds: int, draw: random.Random, counts: Counts
) -> None:
    """Inference of items that a model has not read, killed while it adds them to the event table;
    and damaged segments. The table ends as that of a run that nothing happened to.
    """
    root = folder / "model"
    log = pq.read_table(world.folder / "log.parquet")
    known, new = (
        uf.read_interactions(
            log, pa.table({"item_id": range(len(titles)), "title": titles}), rating="rating"
        )
        for titles in (tiny.TEXTS, [f"{text}, mended" for text in tiny.TEXTS])
    )

    def load(root: Path) -> Any:  # in a child: what is late finds the LM in memory, too
        userip_fast.em.table._TEXTS = 1  # a segment for each text
        uf.model.files.open_lm = lambda *args, **kwargs: world.lm
        return uf.Model.load(root)

    def infer(root: Path, bank: Path) -> None:
        load(root).infer(new, bank, probabilities=True, profiles=True)

    def names(root: Path) -> list[str]:
        for path in (found := sorted((root / "events").rglob("*.arrow"))):
            assert sha256_file(path) in path.name, f"{path}: is not whole"
        return [path.name for path in found]

    world._child(lambda: uf.fit(known, world.lm, config=TABLE_CONFIG).save(root))
    whole = folder / "whole"
    shutil.copytree(root, whole)
    world._child(lambda: infer(whole, folder / "bank"))
    assert len(names(whole)) == len(names(root)) + len(tiny.TEXTS)
    want = uf.FeatureBank.open(folder / "bank", verify=True).digest
    for i in range(rounds):
        copy, bank = folder / f"killed{i}", folder / f"bank{i}"
        shutil.copytree(root, copy)
        kill_until_done(
            lambda copy=copy, bank=bank: infer(copy, bank), lambda copy=copy: names(copy) and None,
            draw, counts, "event table", longest_s=0.6,
        )  # fmt: skip
        assert names(copy) == names(whole), "event table: other segments after kills"
        assert uf.FeatureBank.open(bank, verify=True).digest == want, "other codes after kills"
        added = set(names(copy)) - set(names(root))
        (victim,) = (copy / "events").rglob(draw.choice(sorted(added)))
        damage(victim, draw)
        assert attempt(lambda copy=copy, bank=bank: infer(copy, bank), None, 0.0) == 0
        opened = uf.FeatureBank.open(bank, verify=True)
        assert opened.digest == want, "other codes from a damaged event table"
        assert len(names(copy)) == len(names(whole)), "a damaged segment was left"
        counts["event table: damaged segments made again"] += 1
        shutil.rmtree(copy)


def damage(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "truncate", "empty", "tail"))
    if kind == "flip" and data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del data[draw.randrange(max(1, len(data))) :]
    elif kind == "empty":
        data.clear()
    else:
        data += draw.randbytes(9)
    path.write_bytes(data)


def torn_files(
    world: World, folder: Path, rounds: int, draw: random.Random, counts: Counts
) -> None:
    """Damaged finished files are refused; damaged checkpoints and blocks are computed again."""
    run = world.folder / "whole"
    good = codes(run / "bank")
    for i in range(rounds):
        copy = folder / f"torn{i}"
        shutil.copytree(run, copy)
        part = copy / draw.choice(("model", "bank"))
        victim = draw.choice([p for p in sorted(part.rglob("*")) if p.is_file()])
        before = victim.read_bytes()
        damage(victim, draw)
        counts["torn or flipped files"] += 1
        try:
            if part.name == "bank":
                assert codes(copy / "bank") == good
            else:
                world._load(copy)
            same = victim.name == "LOCK" or victim.read_bytes() == before
            # Spaces inside the manifest are not content; anything else must have been refused.
            assert same or victim.name in ("manifest.json", "CURRENT"), f"{victim}: not noticed"
            counts["damage without effect"] += 1
        except UserIPError:
            counts["damage refused"] += 1
        shutil.rmtree(copy)
    for i in range(max(1, rounds // 8)):
        run = folder / f"resume{i}"
        status = attempt(lambda run=run: world.fit(run), draw.randrange(20, 90), 0.0)
        kept = [p for p in sorted((run / "checkpoints").rglob("*")) if p.is_file()]
        for victim in draw.sample(kept, min(2, len(kept))):
            damage(victim, draw)
            counts["checkpoints and blocks damaged"] += 1
        status = attempt(lambda run=run: world.fit(run), None, 0.0)
        assert status == 0, "resuming beside damaged checkpoints failed, see above"
        assert contents(run) == world.whole, "other bytes after damaged checkpoints"
        shutil.rmtree(run)


def full_disk(world: World, folder: Path, sizes: list[int], counts: Counts) -> str | None:
    """A small tmpfs that fills up or turns read-only; why this was skipped, or None."""
    disk = folder / "disk"
    with mounted(disk, "4m") as problem:
        if problem:
            return problem
        for kib in sizes:
            run = disk / "run"
            for entry in disk.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            world.old_bank(run / "bank")
            filler = disk / "filler"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(b"x" * max(0, free - kib * 1024))

            def full(run: Path = run) -> None:
                try:
                    world.fit(run)
                except StorageError as e:
                    os._exit(3 if "No space left" in str(e) else 5)

            status = attempt(full, None, 0.0)
            code = os.WEXITSTATUS(status)
            assert os.WIFEXITED(status), status
            assert code in (0, 3), "a full disk must be a StorageError, see above"
            counts["full disk: refusals"] += code == 3
            filler.unlink()
            # New where the disk filled up after the bank was written, at the report.
            assert codes(run / "bank") in (world.old, world.new), "a full disk tore the bank"
            whole_or_absent(run)
            assert attempt(lambda run=run: world.fit(run), None, 0.0) == 0
            assert contents(run) == world.whole, "other bytes after a full disk"
            counts["full disk: runs that went on"] += 1
        world_run = disk / "run"
        before = contents(world_run)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

        def read_only() -> None:
            for job in (
                lambda: world.model.infer(world.stream(folder / "work"), world_run / "bank"),
                lambda: world.fit(world_run),
                lambda: world.stream(disk / "work"),
            ):
                try:
                    job()
                    os._exit(4)
                except (StorageError, ConfigError):
                    pass
            os._exit(3)

        assert os.WEXITSTATUS(attempt(read_only, None, 0.0)) == 3
        counts["read-only disk: refusals"] += 3
        assert contents(world_run) == before
    return None


FIELDS = [{"name": "a", "codebook_size": 9}, {"name": "b", "codebook_size": 300}]


def made_bank(
    path: Path, keys: Any, seed: int, profiles: bool = False
) -> tuple[uf.FeatureBank, np.ndarray, np.ndarray]:
    """A bank with probabilities, and what was written into it; maybe with profiles."""
    rng = np.random.default_rng(seed)
    values = np.stack([rng.integers(0, f["codebook_size"], len(keys)) for f in FIELDS], axis=1)
    p = rng.random(values.shape, np.float32)
    settings: dict[str, Any] = {"fields": FIELDS, "model_fingerprint": f"m{seed}"}
    if profiles:
        every = [rng.dirichlet(np.ones(f["codebook_size"]), len(keys)) for f in FIELDS]
        settings["profiles"] = np.concatenate(every, axis=1)
    return uf.FeatureBank.write(path, keys, values, probabilities=p, **settings), values, p


def damaged_banks(folder: Path, rounds: int, draw: random.Random, counts: Counts) -> None:
    """Flipped bits and truncated files, with and without the compiled look-up: what is read is
    right, or refused.
    """
    users = 700
    for name, keys in (("int", np.arange(users)), ("text", [f"user {i}" for i in range(users)])):
        path = folder / name
        bank, values, p = made_bank(path, keys, 0, profiles=True)
        rows = bank.rows(keys)
        reads: list[tuple[Callable[[Any], Any], Any]] = [
            (lambda b, k=keys: b.lookup(k, on_unknown="code"), values),
            (lambda b, k=keys: b.lookup(k[5], on_unknown="code"), values[5:6]),
            (lambda b, k=keys: b.rows(k), rows),
            (lambda b, r=rows: b.codes()[r], values),
            (lambda b, r=rows: b.probabilities[r], p),
            (lambda b, k=keys: b.lookup_profiles(k), bank.lookup_profiles(keys)),
            (lambda b, k=keys: b.lookup_profiles(k[5:6]), bank.lookup_profiles(keys[5:6])),
            (lambda b, r=rows: np.array(b.keys())[r], np.array(keys)),
        ]
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name != "LOCK"]
        for i in range(rounds):
            victim, cut = draw.choice(files), i % 6 == 5
            whole = victim.read_bytes()
            data = bytearray(whole)
            if cut:
                del data[draw.randrange(len(data)) :]
            else:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            victim.write_bytes(data)
            kind = "truncated" if cut else "bits flipped"
            counts[f"bank: {kind}"] += 1
            refused = 0
            with patched(HashIndex, "_native", lambda *_: None if draw.random() < 0.5 else ...):
                for read, wanted in reads:
                    try:
                        found = read(uf.FeatureBank.open(path))
                        assert np.array_equal(found, wanted), f"{victim}: damage was served"
                    except UserIPError:
                        refused += 1
            if refused:
                counts[f"bank: {kind}, refused"] += 1
            else:  # spaces in JSON are not content
                assert victim.name == "CURRENT", f"{victim}: not noticed"
            victim.write_bytes(whole)


def damaged_folders(
    world: World, folder: Path, rounds: int, draw: random.Random, counts: Counts
) -> None:
    """Flipped bits and truncated files of models, event tables, finished blocks, the cache of
    embedded LMs, `WORK` and shards: none is served; it is refused by name, or made again.
    """
    bank = folder / "bank"
    assert attempt(lambda: world.all_shards(bank), None, 0.0) == 0
    data = world.stream(bank.with_suffix(".work"))
    whole, events = data.digest, data.users(0, data.num_users)

    def model() -> bool:
        return bool(world._load(world.folder / "whole").fingerprint == world.model.fingerprint)

    def work() -> bool:  # what is damaged is sorted again
        found = world.stream(bank.with_suffix(".work"))
        users = found.users(0, found.num_users)
        same = np.array_equal(users.item_index, events.item_index)
        return same and found.digest == whole and users.user_keys.equals(events.user_keys)

    def merged() -> bool:
        shards.merge_shards(bank.with_suffix(".shards"), folder / "merged")
        return codes(folder / "merged") == world.new

    def inferred_again() -> bool:  # a damaged shard is
        shards.infer_shard(world.model, data, 1, SHARDS, bank.with_suffix(".shards"))
        return merged()

    cache = embedded_folder(folder / "cache")

    def cached() -> bool:
        embedded.check_embedded(cache)
        return True

    independent = structured.made_model(folder / "independent")
    kinds_read = list(independent.event_table()._numbering.number)

    def tabled() -> bool:  # a damaged segment is passed over, its texts are read again
        with heard("cannot be used: ", "userip_fast") as words:
            found = world._load(folder / "independent", independent.lm).event_table()
            rows = torch.from_numpy(found.rows(kinds_read))
        counts["event table: words about it"] += len(words)
        return bool(torch.equal(found.values[rows], independent.event_table().values))

    finds = structured.finished_blocks(independent, folder / "blocks")
    wanted = {name: find() for name, find in finds.items()}

    def blocks() -> bool:  # what is damaged is made again, with a word
        with heard("passed over and computed again") as words:
            same = all(torch.equal(find(), wanted[name]) for name, find in finds.items())
        counts["blocks: words about it"] += len(words)
        return same

    middle = bank.with_suffix(".shards") / f"shard-00001-of-{SHARDS:05d}.parquet"
    kinds: dict[str, tuple[list[Path], Callable[[], bool]]] = {
        "model": (files_of(world.folder / "whole" / "model"), model),
        "WORK": (files_of(bank.with_suffix(".work") / "histories"), work),
        "shards": (files_of(bank.with_suffix(".shards")), merged),
        "shards, inferred again": ([middle], inferred_again),
        "cache": (files_of(cache), cached),
        "event table": (files_of(folder / "independent" / "model" / "events"), tabled),
        "blocks": (files_of(folder / "blocks"), blocks),
    }
    for name, (files, right) in kinds.items():
        assert right(), name
        saved = {f: f.read_bytes() for f in files}
        for i in range(rounds):
            victim, cut = draw.choice(files), i % 6 == 5
            content = bytearray(saved[victim])
            if cut:
                del content[draw.randrange(len(content)) :]
            else:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            victim.write_bytes(content)
            kind = f"{name}: {'truncated' if cut else 'bits flipped'}"
            counts[kind] += 1
            try:
                assert right(), f"{victim}: damage was served"
                counts[f"{kind}, without effect or made again"] += 1
            except UserIPError as e:
                if str(victim.parent) not in str(e):
                    raise AssertionError(f"{victim}: refused, not by name") from e
                counts[f"{kind}, refused"] += 1
            for file, kept in saved.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(kept)


@contextmanager
def heard(text: str, logger_name: str = "userip_fast.em") -> Iterator[list[str]]:
    """Collects a logger's warnings with `text` and keeps them off the terminal."""
    words: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if text not in record.getMessage():
            return True
        words.append(record.getMessage())
        return False

    logger = logging.getLogger(logger_name)
    logger.addFilter(keep)
    try:
        yield words
    finally:
        logger.removeFilter(keep)


def files_of(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "LOCK"]


def embedded_folder(folder: Path) -> Path:
    """An entry of the cache of embedded LMs, as `embedded_lm` writes it."""
    tiny.save("llama", folder)
    about = {"format": "userip_fast.lm", "version": 1, "files": folder_sums(folder)}
    write_json(folder / "manifest.json", sealed(about))
    return folder


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute; `...` returned by `value` stands for what was there."""
    real = getattr(owner, name)

    def call(*args: Any) -> Any:
        found = value(*args)
        return real(*args) if found is ... else found

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, real)


def small_disk(folder: Path, writers: int, draw: random.Random, counts: Counts) -> str | None:
    """Killed writers on a disk of 16 MiB, whose leftovers alone would fill it; or why skipped."""
    keys = np.arange(150_000)
    with mounted(folder / "disk", "16m") as problem:
        if problem:
            return problem
        path = folder / "disk" / "bank"
        made_bank(path, keys, 0)
        for i in range(writers):
            status = attempt(
                lambda i=i: made_bank(path, keys, i + 1) and None, draw.randrange(1, 9), 0.0
            )
            assert os.WIFSIGNALED(status), f"writer {i} ended with {status}, see above"
            counts["small disk: writers killed"] += 1
            uf.FeatureBank.open(path, verify=True)
        bank, values, _ = made_bank(path, keys, writers + 1)
        assert np.array_equal(bank.lookup(keys), values)
        left = [e.name for e in path.iterdir() if not e.name.startswith("gen-")]
        assert sorted(left) == ["CURRENT", "LOCK"], left
        counts["small disk: writers that went on"] += 1
    return None


@contextmanager
def mounted(disk: Path, size: str) -> Iterator[str | None]:
    """A tmpfs of its own; yields why there is none, or None."""
    disk.mkdir(parents=True)
    if shutil.which("mount") is None:
        yield "no mount"
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        yield f"no tmpfs can be mounted: {tried.stderr.strip()}"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)  # a map may still be held


def many_generations(folder: Path, generations: int, counts: Counts) -> None:
    """A writer publishes one generation after the other; readers open, verify, export, and send
    banks to another process.
    """
    path, keys = folder / "bank", np.arange(2000)
    settings = {"fields": FIELDS, "model_fingerprint": "m"}

    def codes_of(generation: int) -> np.ndarray:
        return np.stack([keys % 9, (keys + generation) % 300], axis=1)

    first = uf.FeatureBank.write(path, keys, codes_of(0), **settings)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(lookup_pickled, (pickle.dumps(first), keys))  # it is up
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                bank = first
                for g in range(1, generations + 1):
                    bank = bank.update(keys, codes_of(g))
                code = 0
            finally:
                os._exit(code)
        last, status = 0, None
        while status is None:
            done, result = os.waitpid(pid, os.WNOHANG)
            status = result if done else None
            bank = uf.FeatureBank.open(path, verify=counts["generations: opened"] % 2 == 0)
            found = bank.lookup(keys)
            generation = int(bank.info()["generation"].removeprefix("gen-")) - 1
            assert np.array_equal(found, codes_of(generation)), "a look-up mixed generations"
            assert generation >= last, "a reader went back"
            last = generation
            counts["generations: opened"] += 1
            bank.verify()
            bank.to_parquet(folder / "out.parquet")
            try:
                sent = pool.apply(lookup_pickled, (pickle.dumps(bank), keys))
                assert np.array_equal(sent, found), "another process read something else"
                counts["generations: read by another process"] += 1
            except FormatError as e:
                if "open the bank again" not in str(e):
                    raise
                counts["generations: told that theirs is gone"] += 1
            assert np.array_equal(first.lookup(keys), codes_of(0))
        assert status == 0, "the writer failed, see above"
    first.verify()
    assert last == generations
    counts["generations: published"] += generations


def lookup_pickled(bank: bytes, keys: np.ndarray) -> np.ndarray:
    codes: np.ndarray = pickle.loads(bank).lookup(keys)
    return codes


def two_at_once(world: World, folder: Path, rounds: int, counts: Counts) -> None:
    """Two processes on one bank, one `WORK`, one run folder and one cache of embedded LMs."""
    folder.mkdir(parents=True)
    bank = folder / "bank"
    uf.FeatureBank.write(bank, [0], [[0, 0]], fields=FIELDS, model_fingerprint="m")

    def update(which: int) -> None:
        for i in range(rounds):
            uf.FeatureBank.open(bank).update([1 + 2 * i + which], [[which, i]])

    together(lambda: update(0), lambda: update(1))
    opened = uf.FeatureBank.open(bank, verify=True)
    found = opened.lookup([1 + 2 * i + which for i in range(rounds) for which in (0, 1)])
    assert found.tolist() == [[which, i] for i in range(rounds) for which in (0, 1)]
    counts["two at once: updates of one bank"] += 2 * rounds

    work = folder / "work"
    together(lambda: world.stream(work) and None, lambda: world.stream(work) and None)
    assert world.stream(work).digest == world.stream(folder / "alone").digest
    counts["two at once: sorting into one WORK"] += 1

    run = folder / "run"

    def second() -> None:
        while not (run / "checkpoints").exists():  # the first one is at work
            time.sleep(0.01)
        try:
            world.fit(run)
        except UnavailableError as e:
            if "another process is writing this run" in str(e):
                return
            raise
        raise AssertionError("a second fit was let in")

    together(lambda: world.fit(run), second)
    assert contents(run) == world.whole, "other bytes after a second fit was refused"
    counts["two at once: second fit refused"] += 1

    trained = folder / "trained"

    def note(*_: Any) -> Any:
        with trained.open("a") as file:
            file.write(".")
        return ...

    def train() -> None:
        os.environ["USERIP_FAST_CACHE"] = str(folder / "cache")
        with patched(embedded, "train", note):
            uf.fit(structured.read_log(), config=SMALL_LM)

    def until_it_trains() -> None:
        pid = os.fork()
        if pid == 0:
            try:
                train()
            finally:
                os._exit(0)
        while not trained.exists():
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it ended before it was killed"

    until_it_trains()
    together(train, train)
    assert trained.read_text() == "..", "one LM was not trained once, after a kill"
    (entry,) = (folder / "cache" / "lm").iterdir()
    embedded.check_embedded(entry)
    counts["two at once: embedded LM trained once"] += 1


def together(*jobs: Callable[[], None]) -> None:
    """Runs jobs in a child each, at once; all must end well."""
    pids = []
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                job()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(statuses), "a child failed, see above"


def missing_shards(world: World, folder: Path, draw: random.Random, counts: Counts) -> None:
    bank = folder / "missing" / "bank"
    assert attempt(lambda: world.all_shards(bank), None, 0.0) == 0
    made = sorted(bank.with_suffix(".shards").glob("*.parquet"))
    for victim in made:
        data = victim.read_bytes()
        victim.unlink()
        try:
            shards.merge_shards(victim.parent, bank)
            raise AssertionError("a missing shard was not noticed")
        except DataError:
            counts["missing shards refused"] += 1
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1
        victim.write_bytes(damaged)
        try:
            shards.merge_shards(victim.parent, bank)
        except UserIPError:
            counts["damaged shards refused"] += 1
        assert codes(bank) == world.new
        victim.write_bytes(data)


def redis_faults(
    world: World, folder: Path, rounds: int, draw: random.Random, counts: Counts
) -> str | None:
    """Exporters killed and a server that dies; why this was skipped, or None."""
    if shutil.which("redis-server") is None:
        return "no redis-server"
    try:
        import redis  # noqa: F401
    except ImportError:
        return "no Redis client"
    from userip_fast.bank.redis_export import RedisBank, connect, export_redis

    socket = folder / "r.sock"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "",
               "--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder)]  # fmt: skip

    def start() -> Any:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                connect(url)
                return process
            except UnavailableError:
                time.sleep(0.02)
        raise AssertionError("redis-server does not answer")

    url = f"unix://{socket}"
    users = list(world.new)
    server = start()
    try:
        banks = []
        for i in range(2):
            values = np.array([[(u + i) % 4, i] for u in users])
            made = uf.FeatureBank.write(
                folder / f"b{i}", np.array(users), values, fields=world.model.bank_fields(),
                model_fingerprint=f"m{i}",
            )  # fmt: skip
            banks.append((made, made.lookup(users)))
        export_redis(banks[0][0], url, version="v0")
        for i in range(rounds):
            made, _ = banks[i % 2]

            def export(made: Any = made, i: int = i) -> None:
                try:
                    export_redis(made, url, version=f"v{i % 2}", batch=4)
                except UnavailableError:
                    os._exit(3)

            if i % 4 == 3:  # the server dies
                pid = os.fork()
                if pid == 0:
                    time.sleep(draw.uniform(0, 0.02))
                    os.kill(server.pid, signal.SIGKILL)
                    os._exit(0)
                status = attempt(export, None, 0.0)
                assert os.WEXITSTATUS(status) in (0, 3)
                os.waitpid(pid, 0)
                server.wait()
                server = start()
                counts["Redis: servers killed"] += 1
            else:
                attempt(export, None, draw.uniform(0.001, 0.03))
                counts["Redis: exporters killed"] += 1
            online = RedisBank(url)
            expected = banks[int(online.version[1:])][1]
            assert np.array_equal(online.lookup(users), expected), "a reader saw a mixture"
            assert os.WEXITSTATUS(attempt(export, None, 0.0)) == 0
            assert np.array_equal(RedisBank(url).lookup(users), banks[i % 2][1])
        for i in range(rounds):  # readers three exports old
            old, (before, _) = RedisBank(url), banks[draw.randrange(2)]
            for j in range(3):
                export_redis(
                    banks[draw.randrange(2)][0] if j < 2 else before, url, version=f"w{j}{i}"
                )
            try:
                now = old.lookup(users, on_unknown="code")
                assert np.array_equal(now, before.lookup(users)), "an old reader got other codes"
                assert old.model_fingerprint == before.model_fingerprint
                counts["Redis: old readers that followed"] += 1
            except MismatchError:
                assert old.model_fingerprint != before.model_fingerprint
                counts["Redis: old readers told"] += 1
    finally:
        server.kill()
        server.wait()
    return None


def run(folder: Path, *, wanted: int, others: int, seed: int = 0) -> dict[str, Any]:
    """All faults.

    Args:
        wanted: Kills, at least.
        others: Scale of the other faults.
    """
    counts: Counts = Counter()
    draw = random.Random(seed)
    world = World(folder / "world")
    kills(world, folder / "kills", wanted, draw, counts)
    event_tables(world, folder / "events", max(2, wanted // 20), draw, counts)
    torn_files(world, folder / "torn", others, draw, counts)
    missing_shards(world, folder / "shards", draw, counts)
    damaged_banks(folder / "damaged", 5 * others, draw, counts)
    damaged_folders(world, folder / "folders", 2 * others, draw, counts)
    two_at_once(world, folder / "two", max(4, others // 4), counts)
    many_generations(folder / "generations", 4 * others + 20, counts)
    skipped = {
        "small disk": small_disk(folder / "small", 10, draw, counts),
        "full disk": full_disk(
            world,
            folder / "full",
            [draw.randrange(8, 240) for _ in range(max(2, others // 8))],
            counts,
        ),
        "Redis": redis_faults(world, folder / "redis", max(4, others // 4), draw, counts),
    }
    return {"counts": dict(counts), "skipped": {k: v for k, v in skipped.items() if v}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=250)
    parser.add_argument("--others", type=int, default=120, help="scale of the other faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.others = QUICK
    started = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # of a child at work
        result = run(Path(folder), wanted=args.kills, others=args.others, seed=args.seed)
    for name, count in sorted(result["counts"].items()):
        print(f"{count:6}  {name}")
    print(json.dumps({**result, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()

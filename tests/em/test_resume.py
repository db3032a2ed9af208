"""Kept blocks and checkpoints: a run that goes on computes what it has not, and the same bytes."""

import errno
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

import userip_fast as uf
from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config, DataConfig, EMConfig
from userip_fast.core.errors import FormatError, MismatchError, StorageError
from userip_fast.core.files import atomic_dir, atomic_file, read_tensors, sha256_file, write_tensors
from userip_fast.core.interrupts import deferred_interrupts
from userip_fast.core.prefetch import Prefetch
from userip_fast.em.cache import DiskCache
from userip_fast.em.checkpoints import Checkpoint, Checkpoints
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.steps import Profiles
from userip_fast.em.trainer import Trainer

USERS = 24
CONFIG = Config(
    data=DataConfig(max_tokens=60, behaviour_context="sequence"),
    em=EMConfig(estep="gradient", steps=2, rounds=3, lr=0.2, block_users=5, codebook_update="ema"),
    fields=(uf.ProfileField("taste", "The user's taste is", 1, 4), uf.ProfileField("b", "b", 1, 3)),
)


def read(users=USERS):
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(users), 3)
    item = random.integers(0, len(tiny.TEXTS), len(user))
    log = {"user_id": user, "item_id": item, "rating": random.integers(1, 6, len(user))}
    items = pa.table({"item_id": range(len(tiny.TEXTS)), "title": tiny.TEXTS})
    return uf.read_interactions(pa.table(log), items, rating="rating")


def contents(folder, bank):
    """Name -> SHA-256 of every file of a model, and of a bank's current generation."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    generation = uf.FeatureBank.open(bank)._generation.folder
    files |= {p.relative_to(generation): p for p in generation.iterdir()}
    return {str(name): sha256_file(path) for name, path in files.items()}


@pytest.fixture(scope="module")
def lm():
    return tiny.frozen("llama")


@pytest.fixture(scope="module")
def whole(lm, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    uf.fit(read(), lm, config=CONFIG, out=run)
    return contents(run / "model", run / "bank")


class StopHereError(Exception):
    pass


@pytest.fixture
def descents(monkeypatch):
    """Counts descents; `stop_at` raises when so many were made."""

    class Count:
        made, stop_at = 0, None

    real = GradientEStep._descend

    def descend(self, *args):
        if Count.made == Count.stop_at:
            raise StopHereError
        Count.made += 1
        return real(self, *args)

    monkeypatch.setattr(GradientEStep, "_descend", descend)
    return Count


def test_a_fit_that_goes_on_repeats_no_block_and_ends_in_the_same_bytes(
    lm, whole, tmp_path, descents
):
    out = tmp_path / "run"
    descents.stop_at = 3  # of 5 blocks
    with pytest.raises(StopHereError):
        uf.fit(read(), lm, config=CONFIG, out=out)
    descents.made, descents.stop_at = 0, None
    uf.fit(read(), lm, config=CONFIG, out=out, resume=True)
    assert descents.made == 2
    assert contents(out / "model", out / "bank") == whole
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"round-0002", "round-0003"}
    rounds = [line for line in (out / "metrics.jsonl").read_text().splitlines() if line]
    assert len(rounds) == 3


def test_a_fit_killed_after_a_round_remembers_its_codes_and_records(lm, whole, tmp_path):
    out = tmp_path / "run"
    uf.fit(read(), lm, config=replace(CONFIG, em=replace(CONFIG.em, rounds=2)), out=out)
    uf.fit(read(), lm, config=CONFIG, out=out, resume=True)
    model = {k: v for k, v in contents(out / "model", out / "bank").items() if "codebooks" in k}
    assert model == {k: whole[k] for k in model}
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_blocks_of_other_settings_are_not_reused(lm, tmp_path, descents):
    uf.fit(read(), lm, config=CONFIG, out=tmp_path / "run")
    other = replace(CONFIG, em=replace(CONFIG.em, lr=0.1))
    with pytest.raises(MismatchError, match="other data, LM or settings"):
        uf.fit(read(), lm, config=other, out=tmp_path / "run", resume=True)
    descents.made = 0
    uf.fit(read(), lm, config=other, out=tmp_path / "run")  # begins anew
    assert descents.made == 5


def test_the_last_pass_of_a_posterior_fit_repeats_no_block(lm, tmp_path, monkeypatch):
    config = replace(CONFIG, em=replace(CONFIG.em, estep="posterior", rounds=1, fit_users=8))
    uf.fit(read(), lm, config=config, out=tmp_path / "whole")
    runs, stop_at = 0, None
    real = PosteriorEStep.run

    def run(self, block, *args):
        nonlocal runs
        if len(block.hashes) > 5 or runs is None:
            return real(self, block, *args)
        if runs == stop_at:
            raise StopHereError
        runs += 1
        return real(self, block, *args)

    sweep = Trainer.infer

    def infer(self, *args, **kwargs):
        nonlocal runs
        runs = 0
        yield from sweep(self, *args, **kwargs)

    monkeypatch.setattr(PosteriorEStep, "run", run)
    monkeypatch.setattr(Trainer, "infer", infer)
    runs, stop_at = None, 3  # counted from the last pass on, of 5 blocks
    with pytest.raises(StopHereError):
        uf.fit(read(), lm, config=config, out=tmp_path / "run")
    runs, stop_at = None, None
    uf.fit(read(), lm, config=config, out=tmp_path / "run", resume=True)
    assert runs == 2
    whole = contents(tmp_path / "whole" / "model", tmp_path / "whole" / "bank")
    assert contents(tmp_path / "run" / "model", tmp_path / "run" / "bank") == whole


def test_infer_that_goes_on_repeats_no_block(lm, tmp_path, descents):
    model = uf.fit(read(), lm, config=CONFIG)
    model.trainer = None
    bank = model.infer(read(), tmp_path / "whole")
    descents.made, descents.stop_at = 0, 3
    with pytest.raises(StopHereError):
        model.infer(read(), tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    assert (tmp_path / "bank.part").exists()
    descents.made, descents.stop_at = 0, None
    again = model.infer(read(), tmp_path / "bank")
    assert descents.made == 2
    assert np.array_equal(again.codes(), bank.codes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "whole"]


def test_a_damaged_block_is_computed_again(tmp_path, caplog):
    cache = DiskCache(tmp_path, b"run")
    cache.put("s", b"key", {"x": torch.arange(100)})
    (file,) = (tmp_path / "s").iterdir()
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    assert cache.get("s", b"key") is None
    assert "computed again" in caplog.text
    assert DiskCache(tmp_path, b"another").get("s", b"key") is None


def test_profiles_survive_a_file():
    p = Profiles(
        np.arange(3, dtype=np.uint64), torch.zeros(3, 2).long(), torch.rand(3),
        torch.rand(3).double(), torch.ones(3), None, [torch.rand(3, 4), torch.rand(3, 5)],
    )  # fmt: skip
    again = Profiles.from_tensors(p.to_tensors(), p.hashes, [4, 5])
    assert again.theta is None
    assert torch.equal(again.log_resp[1], p.log_resp[1])
    assert torch.equal(again.weight, p.weight)


def test_the_last_checkpoint_that_can_be_read_is_taken(tmp_path, caplog):
    kept = Checkpoints(tmp_path, "run")
    books = [Codebook(torch.rand(3, 4))]
    for r in (1, 2, 3):
        kept.save(Checkpoint(r, books, None, []))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0002", "round-0003"]
    file = tmp_path / "round-0003" / "codebooks.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert kept.last().round == 2
    assert "round-0003 is passed over" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"round": 2', '"round": 3'),
        lambda text: text.replace('"nll": 1.5', '"nll": 1.25'),
        lambda text: text.replace('"codes": false', '"codes": 0'),
        lambda text: "[]",
        lambda text: '"sha256"',
    ],
)
def test_a_checkpoint_whose_state_was_altered_is_passed_over(tmp_path, caplog, change):
    kept = Checkpoints(tmp_path, "run")
    for r in (1, 2):
        kept.save(Checkpoint(r, [Codebook(torch.rand(3, 4))], None, [{"nll": 1.5}]))
    file = tmp_path / "round-0002" / "state.json"
    whole = file.read_text()
    assert kept.last().round == 2
    file.write_text(change(whole))
    assert file.read_text() != whole
    assert kept.last().round == 1
    assert f"passed over: {file}" in caplog.text


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_block_and_a_second_one_does_not(stop):
    # A shell that runs the tests in the background has SIGINT ignored.
    old = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with deferred_interrupts() as let_through:
            os.kill(os.getpid(), stop)
            done = True
            with pytest.raises(KeyboardInterrupt):
                let_through()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(stop)
        assert done
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def test_prefetch_hands_on_results_errors_and_ends_its_thread():
    with Prefetch(range(5), lambda x: x * x) as squares:
        assert list(squares) == [0, 1, 4, 9, 16]

    def fail(x):
        if x == 2:
            raise StopHereError
        return x

    before = threading.active_count()
    with pytest.raises(StopHereError), Prefetch(range(9), fail) as numbers:
        for _ in numbers:
            pass
    with Prefetch(range(1000), lambda x: x) as numbers:
        assert next(iter(numbers)) == 0  # and leaves
    assert threading.active_count() == before


# Storage


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x", {"a": torch.ones(3)})

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"x: cannot be written .*No space left"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(3)})
    with pytest.raises(StorageError), atomic_dir(tmp_path / "d") as tmp:
        (tmp / "f").write_text("x")
    monkeypatch.undo()
    assert read_tensors(tmp_path / "x")["a"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), atomic_file(tmp_path / "file/x"):
        pass


def test_folders_change_places(tmp_path):
    for text in ("old", "new"):
        with atomic_dir(tmp_path / "d") as tmp:
            (tmp / "f").write_text(text)
    assert (tmp_path / "d" / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_altered_tensors_are_refused(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(3), "empty": torch.zeros(0, 2)})
    assert read_tensors(tmp_path / "x")["empty"].shape == (0, 2)
    data = bytearray((tmp_path / "x").read_bytes())
    data[-1] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FormatError, match="SHA-256"):
        read_tensors(tmp_path / "x")

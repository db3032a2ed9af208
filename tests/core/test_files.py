"""What is replaced, with which permissions, and what is refused."""

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import torch

from userip_fast.core.errors import FormatError, StorageError, UnavailableError
from userip_fast.core.files import (
    atomic_dir,
    atomic_file,
    lock_file,
    one_writer,
    open_regular,
    read_json,
    read_json_bytes,
    sweep_leftovers,
    write_json,
    write_tensors,
)
from userip_fast.jobs.run_folder import open_run


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def odd(tmp_path):
    """Everything that is not a regular file, by what messages call it."""
    (tmp_path / "real").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder-link").symlink_to("folder")
    os.mkfifo(tmp_path / "fifo")
    found = {
        "link": "symbolic link", "dangling": "symbolic link", "folder-link": "symbolic link",
        "fifo": "FIFO", "folder": "folder",
    }  # fmt: skip
    if os.geteuid() == 0:
        os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        found["null"] = "device"
    return tmp_path, found


def test_only_regular_files_are_replaced(odd):
    folder, found = odd
    for name, kind in found.items():
        before = (folder / name).lstat()
        with pytest.raises(StorageError, match=rf"{name}: is a {kind}, .*; name a regular file"):
            write_json(folder / name, {})
        after = (folder / name).lstat()
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert sorted(p.name for p in folder.iterdir()) == sorted(["real", *found])


def test_only_folders_are_replaced(odd):
    folder, found = odd
    for name, kind in (found | {"real": "file"}).items():
        if name != "folder":
            with (
                pytest.raises(StorageError, match=rf"{name}: is a {kind}, .*; name a folder"),
                atomic_dir(folder / name),
            ):
                raise AssertionError("it must not begin")
    with atomic_dir(folder / "folder") as tmp:
        (tmp / "x").write_text("x")
    assert os.listdir(folder / "folder") == ["x"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(["real", *found])


def test_links_and_devices_are_not_read(odd):
    folder, found = odd
    for name, kind in found.items():
        with pytest.raises(OSError, match=f"is a {kind}"):
            open_regular(folder / name).close()
        with pytest.raises(FormatError, match=f"{name}: cannot be read as JSON .*is a {kind}"):
            read_json_bytes(folder / name)
    assert read_json_bytes(folder / "real") == ({}, b"{}")
    assert read_json(folder / "link") == {}  # a path that somebody named may be one


def test_new_files_are_what_the_umask_allows_and_old_ones_keep_their_mode(tmp_path):
    before = os.umask(0o077)
    try:
        write_json(tmp_path / "a", {})
        with atomic_dir(tmp_path / "d") as tmp:
            write_json(tmp / "b", {})
        assert [mode(tmp_path / n) for n in ("a", "d", "d/b")] == [0o600, 0o700, 0o600]
        os.umask(0o022)
        write_json(tmp_path / "a", {})
        with atomic_dir(tmp_path / "d") as tmp:
            write_json(tmp / "b", {})
        write_json(tmp_path / "c", {})
        assert [mode(tmp_path / n) for n in ("a", "d", "c")] == [0o600, 0o700, 0o644]
    finally:
        os.umask(before)


def test_only_a_full_disk_is_told_to_be_freed(tmp_path):
    for error, said in ((28, "Free space, or choose"), (5, "Make it possible, or choose")):
        with pytest.raises(StorageError, match=said), atomic_file(tmp_path / "a"):
            raise OSError(error, os.strerror(error))
    assert not os.listdir(tmp_path)


def test_sweeping_does_not_follow_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("x")
    (tmp_path / ".a.1.tmp").symlink_to(outside)
    (tmp_path / ".b.1.old").mkdir()
    (tmp_path / ".c.1.tmp").write_text("x")
    sweep_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["outside"]
    assert os.listdir(outside) == ["mine"]


def test_libraries_that_make_the_file_anew_do_not_decide_its_mode(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x", {"a": torch.zeros(2)})
        with atomic_file(tmp_path / "y") as tmp:
            tmp.unlink()
            tmp.touch(0o666)
            tmp.chmod(0o666)
        assert [mode(tmp_path / n) for n in "xy"] == [0o640, 0o640]
    finally:
        os.umask(before)


HOLDER = """
import sys
from pathlib import Path
from userip_fast.core.files import lock_file
held = lock_file(Path(sys.argv[1]), 0.0, "held")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds RUN/LOCK."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "RUN" / "LOCK")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_lock_holds_against_other_processes_until_they_end(tmp_path, holder, caplog):
    path = tmp_path / "RUN" / "LOCK"
    with pytest.raises(UnavailableError, match=r"^taken$"):
        lock_file(path, 0.0, "taken")
    waiting = threading.Timer(0.3, holder.send_signal, [signal.SIGKILL])
    waiting.start()
    with caplog.at_level(logging.WARNING), lock_file(path, 60.0, "taken"):
        assert caplog.messages == [f"{path} is held by another process; waiting for it to end"]
        with pytest.raises(UnavailableError):  # nor does this process lock it twice
            lock_file(path, 0.0, "taken")
    lock_file(path, 0.0, "taken").close()


def test_a_run_folder_is_written_by_one_process(tmp_path, holder):
    run = tmp_path / "RUN"
    (run / ".metrics.json.dead.tmp").write_text("x")
    message = r"out=.*RUN': another process is writing this run; wait for it to end, or name"
    with pytest.raises(UnavailableError, match=message), open_run(run, writes=True):
        raise AssertionError("it must not begin")
    assert (run / ".metrics.json.dead.tmp").exists()  # it may be the other's, at work
    with open_run(run, writes=False) as opened:  # another rank of the same run
        assert opened.root == run
    holder.kill()
    holder.wait()
    blocks = run / "checkpoints" / "blocks" / "profiles"
    blocks.mkdir(parents=True)
    for leftover in (run / "checkpoints" / ".round-0001.dead.tmp", blocks / ".x.dead.tmp"):
        leftover.mkdir()
    with open_run(run, writes=True):
        assert sorted(p.name for p in run.rglob(".*")) == []
    with open_run(run, writes=True):
        pass  # let go of


def test_a_lock_is_no_link(tmp_path):
    (tmp_path / "LOCK").symlink_to("elsewhere")
    with pytest.raises(StorageError, match="LOCK: cannot be written"):
        lock_file(tmp_path / "LOCK", 0.0, "")
    assert os.listdir(tmp_path) == ["LOCK"]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(StorageError, match=r"LOCK: cannot be locked .*No locks .*; choose"):
        lock_file(tmp_path / "LOCK", 0.0, "")


def at_once(run, count):
    """Runs it in so many threads."""
    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_one_at_a_time_makes_a_file_and_sweeps_what_was_killed(tmp_path):
    target = tmp_path / "made"
    for name in (".made.0123.tmp", ".made.0123.old", ".made2.0123.tmp", ".x.0123.tmp"):
        (tmp_path / name).mkdir()
    made = []

    def make():
        with one_writer(target, "another"):
            if not target.exists():
                made.append(1)
                time.sleep(0.05)
                target.touch()

    at_once(make, 4)
    assert made == [1]
    assert sorted(os.listdir(tmp_path)) == [".made2.0123.tmp", ".x.0123.tmp", "made"]
    with pytest.raises(ZeroDivisionError), one_writer(target, "another"):
        raise ZeroDivisionError
    assert not (tmp_path / "made.LOCK").exists()


def test_a_lock_whose_file_its_holder_removes_is_handed_on(tmp_path):
    """However many wait, one at a time is in, and no file is left."""
    inside, most = [], []

    def enter():
        with _open_run_waiting(tmp_path / "RUN"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    at_once(enter, 8)
    assert most == [1] * 8
    assert os.listdir(tmp_path / "RUN") == []


@contextmanager
def _open_run_waiting(run):
    while True:
        with ExitStack() as held:
            try:
                held.enter_context(open_run(run, writes=True))
            except UnavailableError:
                time.sleep(0.001)
                continue
            yield
            return

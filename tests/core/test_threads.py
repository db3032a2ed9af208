"""How many threads: affinity, quotas of control groups, and what was asked for."""

import os

import pytest
import torch

from userip_fast.core import _extension, threads


def files(root, **texts):
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_max", ".max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("lines", "texts", "want"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu_max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"cpu_max": "max 100000\n", "a__cpu_max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a__cpu_max": "300000 100000", "a__b__cpu_max": "400000 100000"}, 3.0),
        ("0::/of/the/host\n", {"cpu_max": "50000 100000\n"}, 0.5),  # as a container sees it
        ("0::/", {"cpu_max": "max 100000\n"}, None),
        ("0::/", {"cpu_max": "nonsense"}, None),
        ("3:cpu,cpuacct:/c\n",
         {"cpu__c__cfs_quota_us": "250000", "cpu__c__cfs_period_us": "100000"},
         2.5),
        ("3:cpu:/c\n", {"cpu__c__cfs_quota_us": "-1", "cpu__c__cfs_period_us": "100000"}, None),
        ("3:memory:/c\n", {"cpu__c__cfs_quota_us": "1", "cpu__c__cfs_period_us": "1"}, None),
    ],
)  # fmt: skip
def test_quota(tmp_path, lines, texts, want):
    files(tmp_path / "cgroup", **texts)
    (tmp_path / "groups").write_text(lines)
    assert threads.quota(tmp_path / "cgroup", tmp_path / "groups") == want


def test_no_control_groups(tmp_path):
    assert threads.quota(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("granted", "want"), [(None, 64), (2.0, 2), (1.5, 2), (0.1, 1), (99.0, 64)]
)
def test_processors(monkeypatch, granted, want):
    monkeypatch.setattr(threads, "affinity", lambda: 64)
    monkeypatch.setattr(threads, "quota", lambda: granted)
    assert threads.processors() == want


def test_threads_follow_the_quota_unless_a_number_was_asked_for(monkeypatch):
    now, asked = [64], []
    monkeypatch.setattr(threads, "affinity", lambda: 64)
    monkeypatch.setattr(threads, "quota", lambda: 2.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    settle = threads.settle.__wrapped__
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    settle()
    assert not asked
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    now[0] = 8  # by torch.set_num_threads
    settle()
    assert not asked
    now[0] = 64
    settle()
    assert asked == [2]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
def test_affinity_is_this_process_s():
    assert threads.affinity() == len(os.sched_getaffinity(0))


@pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not()))
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_threads_of_its_own():
    from userip_fast import ops

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(4096, 64)
        want = ops.assign_codes(x, x[:300])[0]  # threads are there
        child = os.fork()
        if child == 0:
            same = torch.equal(ops.assign_codes(x, x[:300])[0], want)
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not()))
def test_the_limit_holds_and_crowding_is_told():
    module = _extension.load()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert module.num_threads() == 4
        module.set_thread_limit(3)
        assert (module.num_threads(), module.thread_limit()) == (3, 3)
        torch.set_num_threads(2)
        assert module.num_threads() == 2
        assert module.crowded() in (True, False)
    finally:
        module.set_thread_limit(0)
        torch.set_num_threads(before)

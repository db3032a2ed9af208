"""Progress: what it says, where it is shown, and what hears it."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_log

import userip_fast as uf
from userip_fast.core import progress as module
from userip_fast.core.progress import clock, listening, progress
from userip_fast.core.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parents[2]


class Screen(io.StringIO):
    encoding = "utf-8"

    def __init__(self, tty: bool = False) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only we move on."""
    at = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: at[0])
    return at


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(now, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)  # here: pytest sets its own after fixtures
    with progress("reading", 100, "rows", True) as bar:
        for second in range(25):
            now[0] = 101.0 + second
            bar.advance(2, loss=1.0 / (second + 1))
    first, second, last = screen.getvalue().splitlines()
    assert first.endswith("20/100 rows  2/s  about 40 s left  loss 0.1")
    assert second.endswith("40/100 rows  2/s  about 30 s left  loss 0.05")
    assert last.endswith("50 rows in 25 s (2/s)  loss 0.04")


def test_time_left_follows_the_rate_of_late(now):
    bar = module.Progress("reading", 1000, "rows", show=False)
    for _ in range(50):  # slow at first
        now[0] += 1
        bar.advance(1)
    for _ in range(50):
        now[0] += 1
        bar.advance(10)
    assert bar.rate == pytest.approx(10, rel=0.05)
    assert "about 45 s left" in bar.so_far()
    assert len(bar._marks) < 150


def test_work_that_may_end_before_says_so(now):
    bar = module.Progress("training", 10, "rounds", show=False, at_most=True)
    assert bar.so_far() == "0/10 rounds"
    now[0] += 4
    bar.advance(2)
    assert bar.so_far() == "2/10 rounds  0.5/s  at most 16 s left"


def test_a_terminal_redraws_one_line_and_inner_work_leaves_none(now, monkeypatch):
    screen = Screen(tty=True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "60")
    with progress("outer", 4, "rounds", True) as outer:
        now[0] += 1
        outer.advance(1)
        with progress("inner", 10, "rows", True) as inner:
            now[0] += 1
            inner.advance(5)
        now[0] += 1
        outer.advance(3)
    drawn = screen.getvalue()
    assert drawn.count("\n") == 1
    lines = drawn.split("\r\x1b[2K")
    assert all(len(line) <= 60 for line in lines)
    assert "inner" in "".join(lines)
    assert "" in lines[1:]  # the inner one, erased
    assert lines[-1].startswith("outer ")
    assert lines[-1].endswith("4 rounds in 3.0 s (1.33/s)\n")


def test_a_screen_of_few_letters_gets_those(monkeypatch):
    screen = Screen()
    screen.encoding = "ascii"
    monkeypatch.setattr(sys, "stderr", screen)
    bar = module.Progress("x", 2, "rows", show=True)
    bar.advance(1)
    assert "######------" in bar._screen.line()


def test_listeners_hear_what_is_not_shown(capsys):
    heard = []
    with listening(lambda *told: heard.append(told)), progress("x", 3, "rows", False) as bar:
        bar.advance(1, loss=2.0)
        bar.advance(1)
        bar.advance(1, loss=1.0)
    with progress("x", 1, "rows", False) as bar:
        bar.advance(1, loss=3.0)
    assert heard == [("x", 1, {"loss": 2.0}), ("x", 3, {"loss": 1.0})]
    assert capsys.readouterr() == ("", "")


def test_clock():
    told = {0: "0.0 s", 9.44: "9.4 s", 9.96: "10 s", 59.4: "59 s", 59.6: "1 min 0 s",
            200: "3 min 20 s", 7500: "2 h 5 min"}  # fmt: skip
    assert {s: clock(s) for s in told} == told


def test_libraries_are_quiet_meanwhile_and_as_before_then():
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    bnb = logging.getLogger("bitsandbytes")
    level = bnb.level

    @quiet_libraries()
    def fail() -> None:
        assert not theirs.is_progress_bar_enabled()
        assert not bnb.isEnabledFor(logging.WARNING)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before
    assert bnb.level == level


CODE = """
import sys, userip_fast as uf
data = uf.read_interactions("interactions.parquet", "items.parquet", rating="rating")
config = uf.Config().override({settings})
uf.fit(data, config=config, out="run")
print("quiet from here", file=sys.stderr)
uf.fit(data, config=config, show=False)
"""


def test_python_shows_progress_unless_told_not_to(tmp_path):
    """And nothing else: no bars, no advice of other libraries. Scalars tell the same."""
    small_log.write(tmp_path)
    settings = dict(s.split("=") for s in (*small_log.TINY, "lm.quantization=nf4-double"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "USERIP_FAST_CACHE": str(tmp_path / "cache")}
    code = CODE.replace("{settings}", repr(settings))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == ""
    shown, silent = done.stderr.split("quiet from here\n")
    assert silent == ""
    lines = [line for line in shown.splitlines() if "what the LM is told" not in line]
    assert lines[0].startswith("pre-training the LM ")
    assert lines[-1].startswith("inferring profiles ")
    assert all(" in " in line or " left" in line for line in lines)


def test_a_training_from_the_cache_has_its_curve_all_the_same(tmp_path, monkeypatch):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs TensorBoard: pip install tensorboard",
    )
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    data = uf.read_interactions(*small_log.tables(), rating="rating")
    config = uf.Config().override(dict(s.split("=") for s in small_log.TINY))
    found = []
    for name in ("a", "b", "b"):  # the last one replaces what was there
        uf.fit(data, config=config, out=tmp_path / name, show=False)
        read = accumulator.EventAccumulator(str(tmp_path / name / "tensorboard"))
        read.Reload()
        found.append({t: [e.step for e in read.Scalars(t)] for t in read.Tags()["scalars"]})
    assert found[1] == found[2]
    live, kept = (f["pre-training_the_LM/loss"] for f in found[:2])
    assert live == sorted(live)
    assert live[0] == 2048
    assert "rounds/nll_per_weight" in found[0]
    assert any(tag.startswith("rounds/perplexity_of_") for tag in found[0])
    assert live[-1] == kept[-1]
    assert {k: v for k, v in found[0].items() if "LM" not in k} == {
        k: v for k, v in found[1].items() if "LM" not in k
    }

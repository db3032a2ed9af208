"""Progress of long work: a bar on a terminal or in a notebook, a line now and then in a log.

Each stage of the work has its bar, and leaves one line: how much was done, how fast, how long it
took, and its last values. What goes on inside a stage is shown meanwhile and leaves nothing.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

Listener = Callable[[str, int, Mapping[str, float]], None]
"""Is told a stage, how many units of it are done, and its values."""

_REDRAW_S, _LINE_S = 0.25, 10.0  # on screens and in logs
_WIDTH = 12  # of a bar
_listeners: list[Listener] = []
_open: list[Progress] = []


class Progress:
    """Counts units of work and shows rate, time left and last values. Quiet unless `show` is true.

    Args:
        total: Units to do.
        at_most: Whether the work may end before all are done, so that time left is a bound.
    """

    def __init__(self, what: str, total: int, unit: str, show: bool, at_most: bool = False) -> None:
        self.what, self.total, self.unit, self.at_most = what, total, unit, at_most
        self.done = 0
        self.values: dict[str, float] = {}
        self.started = time.monotonic()
        self._marks = deque([(self.started, 0)])
        self._screen = _screen_of(self) if show else None

    @property
    def rate(self) -> float:
        """Units a second of late: work often begins slower, or faster, than it goes on."""
        when, done = self._marks[0]
        return (self.done - done) / max(time.monotonic() - when, 1e-9)

    def advance(self, count: int, **values: float) -> None:
        """Notes `count` more units done; `values` are shown beside the rate."""
        self.done += count
        self.values |= values
        for listener in _listeners if values else ():
            listener(self.what, self.done, values)
        now = time.monotonic()
        passed = now - self.started
        if now - self._marks[-1][0] >= max(_REDRAW_S, passed / 100):
            self._marks.append((now, self.done))
            while self._marks[1][0] < now - max(_LINE_S, passed / 3):
                self._marks.popleft()
        if self._screen is not None:
            self._screen.draw(now)

    def close(self) -> None:
        if self._screen is not None:
            self._screen.close()

    def so_far(self) -> str:
        """How much is done, how fast, how long the rest will take."""
        done = f"{self.done:,}/{self.total:,} {self.unit}"
        if not self.done:
            return done
        left = max(self.total - self.done, 0) / max(self.rate, 1e-9)
        bound = "at most" if self.at_most else "about"
        return f"{done}  {_rate(self.rate)}/s  {bound} {clock(left)} left"

    def in_all(self) -> str:
        """What was done, in how long."""
        seconds = time.monotonic() - self.started
        speed = f" ({_rate(self.done / seconds)}/s)" if seconds > 1 else ""
        return f"{self.done:,} {self.unit} in {clock(seconds)}{speed}"

    def told(self) -> str:
        """The last values."""
        return "".join(f"  {name.replace('_', ' ')} {v:.4g}" for name, v in self.values.items())

    @property
    def share(self) -> float:
        return min(1.0, self.done / max(self.total, 1))


@contextmanager
def progress(
    what: str, total: int, unit: str, show: bool, at_most: bool = False
) -> Iterator[Progress]:
    """A `Progress` that ends its line whatever happens."""
    p = Progress(what, total, unit, show, at_most)
    _open.append(p)
    try:
        yield p
    finally:
        p.close()
        _open.remove(p)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Has a listener told the values of all progress meanwhile, whether it is shown or not."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def clock(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole} s"


def _rate(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


class _Screen:
    """Where a bar is shown, and how often."""

    every = _REDRAW_S

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.inside = bool(_open)
        self.drawn = bar.started

    def draw(self, now: float) -> None:
        if now - self.drawn >= self.every:
            self.drawn = now
            self.show()

    def show(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def line(self) -> str:
        bar = self.bar
        full, empty = ("█", "░") if _can_print("█░") else ("#", "-")
        filled = int(_WIDTH * bar.share)
        drawn = full * filled + empty * (_WIDTH - filled)
        return f"{bar.what:<20} {drawn} {bar.so_far()}{bar.told()}"

    def end(self) -> str:
        return f"{self.bar.what:<20} {self.bar.in_all()}{self.bar.told()}"


class _Terminal(_Screen):
    def show(self) -> None:
        import shutil

        width = max(20, shutil.get_terminal_size().columns - 1)  # a wrapped line is not erased
        _write("\r\x1b[2K" + self.line()[:width])

    def close(self) -> None:
        _write("\r\x1b[2K" + ("" if self.inside else self.end() + "\n"))


class _Log(_Screen):
    every = _LINE_S

    def show(self) -> None:
        _write(self.line() + "\n")

    def close(self) -> None:
        if not self.inside or self.drawn > self.bar.started:
            _write(self.end() + "\n")


class _Notebook(_Screen):
    def __init__(self, bar: Progress) -> None:
        super().__init__(bar)
        self.handle: Any = None

    def show(self) -> None:
        self._display(f'<progress max="1" value="{self.bar.share:.3f}"></progress> ', self.line())

    def close(self) -> None:
        if self.inside and self.handle is None:
            return
        self._display("", "" if self.inside else self.end())

    def _display(self, drawn: str, line: str) -> None:
        from IPython.display import display

        bar = self.bar
        said = bar.so_far() if drawn else bar.in_all()
        html = f"<b>{escape(bar.what)}</b> {drawn}{escape(said + bar.told())}" if line else ""
        data = {"text/plain": line, "text/html": f"<div>{html}</div>"}
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


def _screen_of(bar: Progress) -> _Screen:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if hasattr(shell, "kernel"):
        return _Notebook(bar)
    return _Terminal(bar) if sys.stderr.isatty() else _Log(bar)


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def _write(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)

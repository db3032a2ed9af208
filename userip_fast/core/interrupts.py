"""SIGINT and SIGTERM: held back while a block of users is finished, and never lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_S = 0.05


def keep_interrupts() -> None:
    """Has an interrupt come again where Python would drop it: inside a finaliser or a callback.

    An exception there can only be printed and ignored, so a Ctrl-C that hits one, as happens among
    the thousands of objects that imports leave behind, would stop nothing. For a program, not for
    a library: it changes `sys.unraisablehook`.
    """
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            before(lost)
            return
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Holds back what would raise KeyboardInterrupt; the yielded function lets it through.

    A second signal is not held back. Signals that others handle, and threads that cannot handle
    any, are left alone.
    """
    came = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    ours = [s for s in _SIGNALS if signal.getsignal(s) is signal.default_int_handler]
    for s in ours:
        signal.signal(s, note)
    try:
        yield check
    finally:
        for s in ours:
            signal.signal(s, signal.default_int_handler)

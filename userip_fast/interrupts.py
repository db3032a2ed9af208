"""SIGINT and SIGTERM while users are being inferred: finish the block, keep it, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

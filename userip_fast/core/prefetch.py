"""Blocks of users read and tokenised ahead of the device, in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over `make(x) for x in inputs`, made up to `ahead` results in advance.

    Use it in a `with` statement: leaving stops the thread. What `make` raises is raised here.

    Attributes:
        waited_s: Seconds the consumer waited for results: what the input costs beside the work.
    """

    def __init__(self, inputs: Iterable[S], make: Callable[[S], T], ahead: int = 2) -> None:
        self.waited_s = 0.0
        self._stop = threading.Event()
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._work, args=(inputs, make), daemon=True)

    def _work(self, inputs: Iterable[S], make: Callable[[S], T]) -> None:
        try:
            for x in inputs:
                if not self._put((make(x), None)):
                    return
            self._put((None, None))
        except BaseException as e:  # whatever it is, it belongs to the consumer
            self._put((None, e))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __iter__(self) -> Iterator[T]:
        while True:
            began = time.perf_counter()
            result, error = self._queue.get()
            self.waited_s += time.perf_counter() - began
            if error is not None:
                raise error
            if result is None:
                return
            yield result

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

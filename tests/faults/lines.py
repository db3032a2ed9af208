"""Which lines of functions were run, by a trace that ends for a function whose lines all were."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


def lines_of(code: CodeType) -> set[int]:
    """Lines of a function's own body; none of a module's or class's, which an import runs."""
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return set()
    return {line for *_, line in code.co_lines() if line} - {code.co_firstlineno}


def lines_in(file: Path) -> set[int]:
    """Lines of all functions of a file."""
    codes, lines = [compile(file.read_text("utf-8"), str(file), "exec")], set()
    while codes:
        code = codes.pop()
        lines |= lines_of(code)
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
    return lines


class Lines:
    """Collects what runs of some files; threads that begin meanwhile included.

    Attributes:
        run: File -> lines that were run.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.run: dict[str, set[int]] = {str(file): set() for file in files}
        # By identity, since a code's own hash looks at all of it; it is kept to stay what it is.
        self._left: dict[int, tuple[CodeType, set[int]]] = {}

    @contextmanager
    def traced(self) -> Iterator[None]:
        sys.settrace(self._call)
        threading.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if (known := self._left.get(id(code))) is None:
            ours = code.co_filename in self.run
            known = self._left[id(code)] = code, lines_of(code) if ours else set()
        left = known[1]
        if not left:
            return None
        run = self.run[code.co_filename]

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            if frame.f_lineno in left:
                left.discard(frame.f_lineno)
                run.add(frame.f_lineno)
            return line

        return line

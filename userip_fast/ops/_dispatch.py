"""How an op finds its implementation.

Every op has named implementations. `impl="auto"` takes the first usable one and logs the choice and
the reason once per process; a name asked for explicitly is that implementation or an error, never
another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from userip_fast.core import threads
from userip_fast.core.errors import UnavailableError
from userip_fast.ops import isa

logger = logging.getLogger("userip_fast.ops")

_announced: set[tuple[str, str, str]] = set()
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def unannounced() -> Iterator[None]:
    """Within it choices are not logged: nothing is computed with them."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


WhyNot = Callable[[], str | None]
"""Returns None where the implementation can run the call at hand, else the reason why it cannot."""


def resolve(op: str, impl: str, candidates: Mapping[str, WhyNot]) -> str:
    """The implementation to run.

    Args:
        op: Name of the op, for messages.
        impl: "auto" or one of the candidates' names.
        candidates: Name -> `WhyNot`, best first. The reference comes last and always can.

    Raises:
        ValueError: `impl` is not a name this op knows.
        UnavailableError: `impl` was asked for by name and cannot run this call.
    """
    if impl != "auto":
        if impl not in candidates:
            raise ValueError(
                f"{op}: impl={impl!r} is unknown; choose one of {['auto', *candidates]}"
            )
        reason = candidates[impl]()
        if reason is not None:
            raise UnavailableError(f"{op}: impl={impl!r} cannot run here: {reason}")
        return _ready(impl)
    skipped: list[str] = []
    for name, why_not in candidates.items():
        reason = why_not()
        if reason is None:
            if torch.compiler.is_compiling():  # it can follow no context variable, log or clock
                return name
            why = "; ".join(skipped) or "first choice"
            if (op, name, why) not in _announced and not _quiet.get():
                _announced.add((op, name, why))
                logger.info("%s: impl=%s (%s)", op, name, why)
            return _ready(name)
        skipped.append(f"{name}: {reason}")
    raise UnavailableError(f"{op}: no implementation can run this call: {'; '.join(skipped)}")


def _ready(impl: str) -> str:
    """`impl`, with threads and instruction sets settled where it computes on the CPU."""
    if impl == "cpu":
        threads.settle()
        isa.settle()
    return impl

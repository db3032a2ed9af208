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
from functools import cache
from typing import Any

import torch
from torch import Tensor

from userip_fast.core import _extension, threads
from userip_fast.core.errors import UnavailableError
from userip_fast.ops import isa

logger = logging.getLogger("userip_fast.ops")

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of the extension's arguments `type` and `dtype`."""

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


def by_device(x: Tensor, cpu: WhyNot | None = None, **on_device: WhyNot) -> dict[str, WhyNot]:
    """Implementations for tensors like x, best first, the reference among them.

    What comes after the reference is never chosen by "auto": Triton's interpreter is for tests.
    Tensors on `meta` stand for any device.
    """
    own = {} if cpu is None else {"cpu": cpu}
    last: dict[str, WhyNot] = {"reference": lambda: None}
    if x.device.type == "cpu":
        return own | last | on_device
    return on_device | last | own


def why_not_cpu(x: Tensor, kernel: str) -> str | None:
    """None where the extension has `kernel` and can run it on x here, else the reason."""
    if x.device.type not in ("cpu", "meta"):
        return f"it is for CPU tensors, these are on {x.device}"
    return _lacking(kernel)


@cache
def _lacking(kernel: str) -> str | None:
    module = _extension.load()
    if module is None:
        return _extension.why_not()
    if not hasattr(module, kernel):
        return f"userip_fast._C has no {kernel} for this processor type"
    missing = [name for name in ("avx2", "fma", "f16c") if not module.cpu_features().get(name)]
    return f"the processor lacks {', '.join(missing)}" if missing else None


def extension(kernel: str, *args: Any) -> None:
    """Runs a kernel of `userip_fast._C`, which takes addresses for tensors and 0 for None."""
    module: Any = _extension.load()
    found = (a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args)
    getattr(module, kernel)(*found)


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

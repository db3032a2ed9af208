"""Memory that was freed and not given back.

The LM's activations are some hundred tensors of as many sizes as there are packs. glibc keeps what
is freed between them for later, so that each phase of a fit would begin on top of the gaps that the
one before left.
"""

from __future__ import annotations

import ctypes
from functools import cache


def trim() -> None:
    """Gives freed pages back to the system, where the C library can; some milliseconds."""
    if (give := _malloc_trim()) is not None:
        give(0)


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None

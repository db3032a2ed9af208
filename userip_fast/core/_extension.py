"""The one place that imports the compiled extension `userip_fast._C`."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("USERIP_FAST_NO_EXTENSION") == "1":
        return None, "USERIP_FAST_NO_EXTENSION=1"
    # Nothing of it is torch's. Both ask for an OpenMP runtime by one name, so that they share the
    # one that is there first, and torch.set_num_threads rules both in either order.
    try:
        return import_module("userip_fast._C"), None
    except (ImportError, OSError) as e:
        return None, f"userip_fast._C is not built or does not load ({e}); see docs/environment.md"


def load() -> ModuleType | None:
    """`userip_fast._C`, or None where it cannot be used; `why_not` then says why."""
    return _load()[0]


def why_not() -> str | None:
    """None where the extension is usable, else the reason in one line."""
    return _load()[1]

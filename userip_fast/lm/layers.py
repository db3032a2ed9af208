"""Where a module stands in its model."""

from __future__ import annotations

import re


def layer_of(name: str) -> str:
    """The layer that a module belongs to, by its name: up to its first index, else itself."""
    found = re.match(r"(.*?\.\d+)(\.|$)", name)
    return found[1] if found else name

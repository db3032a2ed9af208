"""What is costly to make, made when more of it is asked for than is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Late:
    """Stands for an object: has its attributes, and makes it to find out those not given.

    Args:
        make: Makes the object, at most once.
        known: Attributes that need no making.
    """

    def __init__(self, make: Callable[[], Any], **known: Any) -> None:
        self._make, self._made = make, None
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying and pickling look for must not make anything
            raise AttributeError(name)
        return getattr(self.made(), name)

    def made(self) -> Any:
        """The object itself."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @property
    def is_made(self) -> bool:
        return self._made is not None

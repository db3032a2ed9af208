"""What was renamed, moved or dropped: the old still works, with a warning, until `GONE_IN`.

Whoever renames a public name, an import path or a setting adds a line to a table here, and takes
the lines out when the version in which they go is made.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger("userip_fast")

GONE_IN = "0.2"

MODULES = {
    "api": "jobs.fit",
    "behaviour": "prompts.behaviour",
    "config": "core.config",
    "errors": "core.errors",
    "estimator": "jobs.estimator",
    "explain": "jobs.explain",
    "fields": "core.fields",
    "files": "core.files",
    "hub": "model.hub",
    "keys": "core.keys",
    "nf4": "ops.nf4_format",
    "packing": "prompts.packing",
    "profile_export": "jobs.profiles",
    "ray_job": "jobs.ray_job",
    "shards": "jobs.shards",
    "tune": "jobs.tune",
}
"""Modules of `userip_fast` that lie elsewhere now."""

NAMES = {
    "codebook.Codebook": "codebook.books.Codebook",
    "lm.FrozenLM.load": "lm.open_lm",
    "prompts.ProfileField": "core.fields.ProfileField",
    "prompts.PromptTemplate": "prompts.layout.PromptTemplate",
    "report.report_run": "report.write.report_run",
}
"""Names of modules that are folders now, or of classes."""

SETTINGS: dict[str, Any] = {"em.commitment": 0.0, "em.refine_steps": 0}
"""Settings that are passed over, and what they were by default."""

VALUES = {"em.start": {"behaviour": "auto"}}
"""Values of settings, and what is taken for them."""


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Says that `old` is `new` by now, to the caller of the function that calls this."""
    told = f"{old} is {new} now; the old goes in {GONE_IN}"
    warnings.warn(told, DeprecationWarning, stacklevel=stacklevel)


def renamed(old: str, stacklevel: int) -> Any:
    """What an entry of `NAMES` stands for."""
    new = NAMES[old]
    warn(f"userip_fast.{old}", f"userip_fast.{new}", stacklevel)
    module, _, name = new.rpartition(".")
    return getattr(import_module(f"userip_fast.{module}"), name)


class RenamedMember:
    """A member of a class in `NAMES`, as its class has it."""

    def __init__(self, old: str) -> None:
        self.old = old

    def __get__(self, of: object, kind: type | None = None) -> Any:
        return renamed(self.old, 4)


def names_of(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__` for its entries of `NAMES`."""
    inner = module.removeprefix("userip_fast.")

    def find(name: str) -> Any:
        if f"{inner}.{name}" in NAMES:
            return renamed(f"{inner}.{name}", 4)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


def setting(name: str, value: Any) -> tuple[bool, Any]:
    """Whether a setting of a file, flag or mapping stays, and the value it has by now."""
    if name in SETTINGS:
        if value != SETTINGS[name]:
            _say(f"{name}={value!r} is passed over: nothing was gained by it")
        return False, None
    if isinstance(value, str) and value in VALUES.get(name, {}):
        new = VALUES[name][value]
        _say(f"{name}={value} is taken for {new}, which is no worse")
        return True, new
    return True, value


def gone(name: str) -> bool:
    """Whether there was such a setting, which is passed over by now."""
    return name in SETTINGS


def _say(why: str) -> None:
    told = f"{why}; it is refused from {GONE_IN} on"
    logger.warning("%s", told)  # Python shows no DeprecationWarning but to whoever asks
    warnings.warn(told, DeprecationWarning, stacklevel=6)


class _Moved(MetaPathFinder, Loader):
    """Finds the modules of `MODULES` where they lie now."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith("userip_fast.") and name.partition(".")[2] in MODULES:
            return ModuleSpec(name, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = "userip_fast." + MODULES[spec.name.partition(".")[2]]
        warn(spec.name, new)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # the module is the new one, whatever it was asked for as
            module.__spec__ = module.__spec__.loader_state


def find_moved_modules() -> None:
    """Lets `import userip_fast.OLD` find the modules of `MODULES`, after all other ways."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())

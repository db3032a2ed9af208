"""UserIP-Tuning as a performance-first engine: interaction logs to collaborative IDs.

Source: "Prompt Tuning as User Inherent Profile Inference Machine", arXiv 2408.06577.

Importing this package touches no GPU, file or network, and needs neither triton, bitsandbytes,
flash-attn nor the compiled extension. Names are resolved on first use, so that
``import userip_fast`` stays cheap.
"""

import os as _os
from importlib import import_module as _import_module
from typing import Any as _Any

from userip_fast._version import __version__
from userip_fast.core.deprecated import find_moved_modules as _find_moved_modules

_find_moved_modules()

# In a checkout (editable install, or the root on sys.path) the Triton kernels lie in `kernels/`
# beside this package; in a wheel they are `userip_fast/kernels/`. There is no
# `kernels/__init__.py`: Hugging Face owns the top-level name `kernels`, which transformers imports.
_here = _os.path.dirname(_os.path.abspath(__file__))
_root = _os.path.dirname(_here)
if not _os.path.isdir(_os.path.join(_here, "kernels")) and _os.path.isdir(
    _os.path.join(_root, "kernels")
):
    __path__.append(_root)

_PUBLIC = {
    "Config": "userip_fast.core.config",
    "FeatureBank": "userip_fast.bank",
    "InteractionStream": "userip_fast.data",
    "Interactions": "userip_fast.data",
    "Model": "userip_fast.model.fitted",
    "ProfileField": "userip_fast.core.fields",
    "PromptTemplate": "userip_fast.prompts.layout",
    "UserIPError": "userip_fast.core.errors",
    "CTRConfig": "userip_fast.ctr",
    "evaluate_ctr": "userip_fast.ctr",
    "fit": "userip_fast.jobs.fit",
    "ops": "userip_fast",
    "read_interactions": "userip_fast.data",
    "stream_interactions": "userip_fast.data",
}

# Of libraries that may not be there, so that `import *` leaves them out.
_OPTIONAL = {"UserProfiler": "userip_fast.jobs.estimator"}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> _Any:
    if name == "ops":
        return _import_module("userip_fast.ops")
    if module := (_PUBLIC | _OPTIONAL).get(name):
        return getattr(_import_module(module), name)
    raise AttributeError(f"module 'userip_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_OPTIONAL])

"""Other libraries kept quiet: our own progress says what is going on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

with warnings.catch_warnings():
    # In a notebook without its widgets it warns when it is imported, as transformers does.
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Holds back transformers' bars, advice and loading reports, and bitsandbytes' advice; how the
    process had them is restored."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    # Without its optional kernels it works as well, and says so as a warning.
    bnb = logging.getLogger("bitsandbytes")
    level = bnb.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    bnb.setLevel(logging.ERROR)
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
        bnb.setLevel(level)

"""What was measured on this machine once, kept in the cache folder for the next processes.

One JSON file per question, {key: answer}; the key says of which device and versions the answer is.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from userip_fast.core.errors import FormatError, StorageError
from userip_fast.core.files import read_json, write_json
from userip_fast.core.sums import cache_folder

logger = logging.getLogger("userip_fast.core.measured")


def _store(question: str) -> Path:
    return cache_folder() / f"{question}.json"


def _all(question: str) -> dict[str, Any]:
    try:
        known = read_json(_store(question))
    except FormatError:
        return {}
    return known if isinstance(known, dict) else {}


def kept(question: str, key: str) -> Any:
    """The answer, None where there is none."""
    return _all(question).get(key)


def keep(question: str, key: str, answer: Any) -> None:
    """Keeps an answer; where that is not possible the log says so, and the next process asks."""
    path = _store(question)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**_all(question), key: answer})
    except (OSError, StorageError) as e:
        logger.info("%s is not kept, the next process measures again: %s", path.name, e)

"""The log that the flags name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from userip_fast.cli.flags import FORM_OF_FILES, flag_values
from userip_fast.cli.shell import say

if TYPE_CHECKING:
    from userip_fast.core.config import Config
    from userip_fast.data import Data, Interactions
    from userip_fast.model.fitted import Model


def settings_like(model: Model, params: Mapping[str, Any]) -> Config:
    """Those that a model was fitted with, then flags; how its files were written says nothing."""
    return model.config.override({**FORM_OF_FILES, **flag_values(params)})


def read_log(params: Mapping[str, Any], settings: Config) -> Interactions:
    """The log of --interactions and --items, in memory."""
    from userip_fast.data import read_interactions

    data: Interactions = _read(read_interactions, params, settings)
    return data


def read_or_stream(params: Mapping[str, Any], settings: Config) -> Data:
    """The same, sorted on disk where --stream says so."""
    from userip_fast.data import stream_interactions

    if params["stream"] is None:
        return read_log(params, settings)
    data: Data = _read(partial(stream_interactions, work=params["stream"]), params, settings)
    return data


def _read(read: Any, params: Mapping[str, Any], settings: Config) -> Any:
    d = settings.data
    data = read(
        _one_or_all(params["interactions"]),
        _one_or_all(params["items"]) if params["items"] else None,
        user=d.user,
        item=d.item,
        rating=d.rating,
        time=d.time,
        text=d.text,
        filter=d.filter,
        sep=d.sep,
        encoding=d.encoding,
        header=d.header,
        items_header=d.items_header,
        on_bad=d.on_bad,
        min_history=d.min_history,
        seed=settings.em.seed,
    )
    if not params["quiet"]:
        report = data.report
        if report.rows_bad or report.rows_filtered or report.short_users:
            say(report.table())
        if data.rating_note:
            say(data.rating_note)
    return data if params["max_users"] is None else data.head_users(params["max_users"])


def _one_or_all(paths: list[Path]) -> Path | list[Path]:
    return paths[0] if len(paths) == 1 else paths


def names(text: str | None) -> tuple[str, ...] | None:
    """A,B,... as it is said in one flag."""
    return None if text is None else tuple(n.strip() for n in text.split(",") if n.strip())

"""Profiles as a table: codes, probabilities of all codes, and a user's best items, as Parquet.

For recommenders that take more than a code: p(code | events) of every code, and what the profile
says of the catalogue (`Model.top_items`). Written block by block, whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from userip_fast.bank.parquet import lists, write_tables
from userip_fast.core.errors import ConfigError

if TYPE_CHECKING:
    from userip_fast.data import Interactions, InteractionStream
    from userip_fast.model.fitted import Model


def export_profiles(
    model: Model,
    data: Interactions | InteractionStream,
    path: str | os.PathLike[str],
    *,
    top: int = 0,
    on_bad: str | None = None,
    show: bool = False,
) -> int:
    """Writes the profiles of the users of `data`, in hash order.

    Args:
        path: Parquet file that gets `user_id`; per field its code, named like the field, and
            `<field>_p`, [K_j] float32 that add up to one; and with `top` the lists `top_items` and
            `top_scores` (see `Model.top_items`), best first.
        top: Items of each user.
        on_bad: As in `Model.infer`.
        show: Whether to show progress.

    Returns:
        The number of users.

    Raises:
        ConfigError: The E-step tells no probabilities, or `top` is below 0.
        DataError, MismatchError, StorageError: As in `Model.infer`.
    """
    if top < 0:
        raise ConfigError(f"top={top}: must be at least 0")
    if model.config.em.estep != "posterior":
        raise ConfigError(
            f"profiles: em.estep={model.config.em.estep} tells no probabilities of all codes; fit "
            "with em.estep=posterior"
        )
    return write_tables(path, _blocks(model, data, top, on_bad, show))


def _blocks(
    model: Model,
    data: Interactions | InteractionStream,
    top: int,
    on_bad: str | None,
    show: bool,
) -> Iterator[pa.Table]:
    source = model.source(data, on_bad)
    done = 0
    for found in model.infer_blocks(source, show=show):
        assert found.code_ids is not None
        assert found.log_resp is not None
        users = len(found.nll)
        columns = {"user_id": source.keys_of(done, done + users)}
        each = []
        for j, (field, log_resp) in enumerate(zip(model.config.fields, found.log_resp)):
            p = torch.as_tensor(log_resp).exp().float().numpy()
            columns[field.name] = pa.array(found.code_ids[:, j].numpy().astype(np.int32))
            columns[f"{field.name}_p"] = lists(p)
            each.append(p)
        if top:
            items, scores = model.top_items(model.event_table().grid.joint(each), top)
            columns["top_items"] = lists(items)
            columns["top_scores"] = lists(scores)
        done += users
        yield pa.table(columns)

"""`evaluate_ctr`: what do the IDs add to a recommender, for whom, and is it more than chance?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from userip_fast._version import __version__
from userip_fast.config import Config
from userip_fast.ctr.backbones import Column, build, train_and_predict
from userip_fast.ctr.cells import Cells, data_digest
from userip_fast.ctr.config import CLUSTERS, PROFILES, CTRConfig
from userip_fast.ctr.features import ImpossibleError, Profiles
from userip_fast.ctr.protocols import Rows, Task, make_task
from userip_fast.ctr.statistics import Bootstrap, auc, log_loss, paired
from userip_fast.ctr.vectors import Attribute, item_attributes
from userip_fast.data import Interactions
from userip_fast.errors import DataError
from userip_fast.files import write_json
from userip_fast.packing import Int64
from userip_fast.progress import progress

Scores = list[NDArray[np.float32]]


def evaluate_ctr(
    data: Interactions,
    *,
    ctr: CTRConfig | None = None,
    config: Config | Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    cells: str | os.PathLike[str] | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Trains recommenders with and without each user feature, and compares them.

    Args:
        data: The whole log; it is split here, by the protocol.
        ctr: Protocol, features, backbones, seeds.
        config: Fields, LM, behaviour and EM of the IDs; the fields' sizes are every feature's.
            A mapping is laid over `PROFILES`, None is `PROFILES`.
        out: Folder that gets `ctr.json`.
        cells: Folder of finished work, so that a stopped evaluation goes on; None is `out/cells`,
            or nothing without `out`. Several evaluations may share one.
        show: Whether to show progress.

    Returns:
        What `ctr.json` holds: `auc` and `logloss` by feature and backbone (mean, std, seeds and a
        95 % interval over users and seeds; null for a feature the data cannot have, with
        `reasons`), `relative_improvement` over `none`, `paired` comparisons of the IDs, `rows` and
        settings.

    Raises:
        DataError: The data cannot give this protocol or label.
        UnavailableError: torch-rechub is not installed.
    """
    ctr = ctr or CTRConfig()
    if not isinstance(config, Config):
        config = _over_profiles(config or {})
    if ctr.attributes and (missing := set(ctr.attributes) - set(data.items.column_names)):
        raise DataError(
            f"attributes: the items have no column {sorted(missing)[0]!r}, but "
            f"{data.items.column_names}"
        )
    for backbone in ctr.backbones:
        build(backbone, [Column("probe", 2, np.zeros(1, np.int64))], ctr)  # fails before hours pass
    folder = Path(cells) if cells else Path(out) / "cells" if out else None
    task = make_task(data, ctr)
    profiles = Profiles(task.learn, config, ctr.attributes, folder, show)
    store = Cells(folder)
    scores: dict[str, dict[str, Scores]] = {}
    reasons: dict[str, str] = {}
    total = len(ctr.features) * ctr.seeds * len(ctr.backbones)
    what = f"ctr {ctr.protocol}" + (f" {ctr.first}" if ctr.protocol == "new-users" else "")
    with progress(what, total, "models", show) as bar:
        for feature in ctr.features:
            scores[feature] = {b: [] for b in ctr.backbones}
            for seed in range(ctr.seeds):
                try:
                    codes = _codes(feature, seed, task, profiles, store)
                except ImpossibleError as why:
                    reasons[feature] = str(why)
                    del scores[feature]
                    bar.advance((ctr.seeds - seed) * len(ctr.backbones))
                    break
                for backbone in ctr.backbones:
                    found = _scores(feature, backbone, seed, codes, task, ctr, store)
                    scores[feature][backbone].append(found)
                    bar.advance(1)
    result = _result(scores, reasons, task, ctr, config)
    if out is not None:
        write_json(Path(out) / "ctr.json", result)
    return result


def _codes(feature: str, seed: int, task: Task, profiles: Profiles, store: Cells) -> list[Int64]:
    """Per view [U, J] codes of the task's users; K_j for those the view does not hold."""
    if feature == "none":
        return []
    found = []
    for view in task.views:
        key = {
            "kind": "codes",
            "seed": seed,
            "view": data_digest(view),
            **profiles.key(feature),
        }

        def compute(view: Interactions = view) -> dict[str, NDArray[Any]]:
            return {"codes": profiles.codes(feature, view, seed)}

        read = store.get(key, compute)["codes"]
        codes = np.tile(np.array(profiles.sizes), (task.data.num_users, 1))
        codes[task.data.user_index(view.user_keys)] = read
        found.append(codes)
    return found


def _scores(
    feature: str,
    backbone: str,
    seed: int,
    codes: list[Int64],
    task: Task,
    ctr: CTRConfig,
    store: Cells,
) -> NDArray[np.float32]:
    settings = ctr.to_dict()
    for other in ("features", "backbones", "seeds", "bootstrap"):
        del settings[other]
    key = {
        "kind": "scores", "feature": feature, "backbone": backbone, "seed": seed, "ctr": settings,
        "data": data_digest(task.data),
        "codes": [hashlib.sha256(c.tobytes()).hexdigest() for c in codes],
    }  # fmt: skip

    def compute() -> dict[str, NDArray[Any]]:
        inputs = _Inputs(task, ctr, codes)
        return {
            "score": train_and_predict(
                backbone, inputs.columns(task.train), task.train.label,
                inputs.columns(task.valid), task.valid.label, inputs.columns(task.test), ctr, seed,
            )
        }  # fmt: skip

    return store.get(key, compute)["score"]


class _Inputs:
    """Columns of any rows: item id, item attributes, the codes, and user ids where asked for."""

    def __init__(self, task: Task, ctr: CTRConfig, codes: list[Int64]) -> None:
        self.task, self.codes = task, codes
        items = np.unique(task.train.item)
        self.item_id = np.zeros(task.data.num_items, np.int64)  # 0: not met in training
        self.item_id[items] = 1 + np.arange(len(items))
        self.attributes: list[Attribute] = item_attributes(task.data, ctr.attributes)

    def columns(self, rows: Rows) -> list[Column]:
        out = [Column("item", int(self.item_id.max()) + 1, self.item_id[rows.item])]
        for a in self.attributes:
            values = a.values[rows.item]
            out.append(
                Column(f"item_{a.name}", a.size, values if values.shape[1] > 1 else values[:, 0])
            )
        if self.task.user_ids:
            out.append(Column("user", self.task.data.num_users, rows.user))
        if self.codes:
            codes = np.stack(self.codes)[rows.view, rows.user]  # [N, J]
            for j in range(codes.shape[1]):
                size = int(max(c[:, j].max() for c in self.codes)) + 1
                out.append(Column(f"code_{j}", size, codes[:, j]))
        return out


def _over_profiles(values: Mapping[str, Any]) -> Config:
    """`PROFILES` with some settings replaced."""
    merged = PROFILES.to_dict()
    for part, own in values.items():
        both = isinstance(own, Mapping) and isinstance(merged.get(part), Mapping)
        merged[part] = {**merged[part], **own} if both else own
    return Config.from_dict(merged)


def _result(
    scores: dict[str, dict[str, Scores]],
    reasons: dict[str, str],
    task: Task,
    ctr: CTRConfig,
    config: Config,
) -> dict[str, Any]:
    test = task.test
    draw = Bootstrap.draw(test.user, ctr.seeds, ctr.bootstrap)
    resampled = {f: {b: draw.auc(test.label, s) for b, s in by.items()} for f, by in scores.items()}
    measured: dict[str, dict[str, Any]] = {"auc": {}, "logloss": {}}
    for f in ctr.features:
        if f not in scores:
            measured["auc"][f] = measured["logloss"][f] = None
            continue
        measured["auc"][f], measured["logloss"][f] = {}, {}
        for b, by_seed in scores[f].items():
            areas = [float(auc(test.label, s)[0]) for s in by_seed]
            ci = np.quantile(resampled[f][b], [0.025, 0.975])
            measured["auc"][f][b] = {**_summary(areas), "ci95": ci.tolist()}
            measured["logloss"][f][b] = _summary([log_loss(test.label, s) for s in by_seed])
    mean = {f: {b: v["mean"] for b, v in by.items()} for f, by in measured["auc"].items() if by}
    relative = {
        f: {b: _relative(by[b], mean["none"][b]) for b in by}
        for f, by in mean.items()
        if "none" in mean and f != "none"
    }
    comparisons: dict[str, Any] = {}
    for b in ctr.backbones if "ids" in scores else ():
        best = max((f for f in CLUSTERS if f in scores), key=lambda f: mean[f][b], default=None)
        comparisons[b] = {
            "best_cluster": best,
            "against": {
                f: paired(resampled["ids"][b], resampled[f][b], mean["ids"][b] - mean[f][b])
                for f in scores
                if f != "ids"
            },
        }
    return {
        **measured,
        "relative_improvement": relative,
        "paired": comparisons,
        "reasons": reasons,
        "protocol": ctr.protocol,
        "first": ctr.first if ctr.protocol == "new-users" else None,
        "label": task.label,
        "rows": {
            "train": len(task.train), "valid": len(task.valid), "test": len(test),
            "test_positive": float(test.label.mean()), "test_users": len(np.unique(test.user)),
            "users": task.data.num_users, "learn_users": task.learn.num_users,
            "learn_events": task.learn.num_events,
        },
        "sizes": [f.codebook_size for f in config.fields],
        "settings": ctr.to_dict(),
        "em": config.to_dict()["em"],
        "userip_fast": __version__,
    }  # fmt: skip


def _summary(values: list[float]) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std, "seeds": values}


def _relative(area: float, without: float) -> float | None:
    """(AUC - 0.5) / (AUC_none - 0.5) - 1; None where the other is no better than chance."""
    return (area - 0.5) / (without - 0.5) - 1 if without > 0.5 else None

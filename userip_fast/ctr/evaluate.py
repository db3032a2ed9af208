"""`evaluate_ctr`: what do the IDs add to a recommender, for whom, and is it more than chance?"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast._version import __version__
from userip_fast.core.config import Config
from userip_fast.core.errors import DataError
from userip_fast.core.files import write_json
from userip_fast.ctr.backbones import check_installed, train_and_predict
from userip_fast.ctr.cells import Cells, data_digest
from userip_fast.ctr.codes import describe_codes
from userip_fast.ctr.compare import Scores, comparisons, slices, unseen_pairs
from userip_fast.ctr.config import DIN, HISTORY, PROFILES, CTRConfig
from userip_fast.ctr.features import ImpossibleError, Profiles
from userip_fast.ctr.inputs import PARTS, Input, Inputs, inputs_digest, some_rows
from userip_fast.ctr.protocols import REPEAT, make_task
from userip_fast.ctr.ranking import choice_scores, rank_choices
from userip_fast.ctr.statistics import Bootstrap, auc, log_loss
from userip_fast.ctr.warm import CODED, held_out_parts, leave_out, warm_rows
from userip_fast.ctr.work import Work
from userip_fast.data import Interactions
from userip_fast.em.columns import MOST
from userip_fast.prompts.packing import Int64

_FLOOR = 0.005
"""AUC that `none` may stay behind the better of item rate and popularity without a warning."""
_SAMPLED = 0.25
"""What popularity^0.75 of the sampled items leaves of an item's log popularity."""
_AGAIN = 500
"""Users whose codes are inferred once more, from other events."""
_DECIDES = ("lr", "batch", "epochs", "patience", "embed_dim", "weight_decay")
_LM_FEATURES = {"ids": "EM", "paper": "published recipe", "kmeans_states": "LM states"}


def evaluate_ctr(
    data: Interactions,
    *,
    ctr: CTRConfig | None = None,
    config: Config | Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    cells: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Trains recommenders with each user feature, and compares them.

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
        What `ctr.json` holds. By feature and backbone `auc` and `logloss` (mean, std, seeds and a
        95 % interval over users and seeds; null for a feature the data cannot have, with
        `reasons`), `slices` of it (see `userip_fast.ctr.compare.slices`) and `relative_improvement`
        over `none`; of warm users `left_out` (see `userip_fast.ctr.warm.leave_out`); `paired`
        comparisons, and those on items never met in training (`paired_unseen`); `floor`, AUC of the
        item's rate and popularity alone; `numbers`, AUC of further single numbers; `unseen`, shares
        of items never met in training; `codes` by seed, what the IDs are (`describe_codes`); of
        choices `ranking`; `rows`, `attributes`, `warnings`, settings.

    Raises:
        DataError: The data cannot give this protocol or label.
        UnavailableError: torch-rechub, LightGBM or implicit is not installed.
    """
    ctr = ctr or CTRConfig()
    if not isinstance(config, Config):
        config = _over_profiles(config or {})
    if ctr.attributes and (missing := set(ctr.attributes) - set(data.items.column_names)):
        raise DataError(
            f"attributes: the items have no column {sorted(missing)[0]!r}, but "
            f"{data.items.column_names}"
        )
    check_installed(ctr.backbones)  # fails before hours pass
    folder = Path(cells) if cells else Path(out) / "cells" if out else None
    return _Evaluation(data, ctr, config, folder, show).run(Path(out) if out else None)


def backbones_of(feature: str, ctr: CTRConfig) -> tuple[str, ...]:
    """The recommenders that read a feature: DIN the history, the chosen ones all others."""
    return (DIN,) if feature == HISTORY else ctr.backbones


class _Evaluation:
    """One task, its columns and the work to do."""

    def __init__(
        self, data: Interactions, ctr: CTRConfig, config: Config, folder: Path | None, show: bool
    ) -> None:
        self.ctr, self.config, self.show = ctr, config, show
        self.task = make_task(data, ctr)
        self.store = Cells(folder)
        self.profiles = Profiles(self.task.learn, config, ctr.attributes, folder, show)
        self.inputs = Inputs(self.task, ctr, self.profiles, self.store)
        self.reasons: dict[str, str] = {}
        parts = list(dict.fromkeys(p for f in ctr.features for p in PARTS[f]))
        seeds = [(part, seed) for part in parts for seed in range(ctr.seeds)]
        # The LM and EM first: from then on it is known how long the rest will take.
        lm = (*_LM_FEATURES.values(), "affinity")
        self.parts = sorted(seeds, key=lambda p: _kind(p[0]) not in lm)
        self.models = [
            (feature, backbone, seed)
            for feature in ctr.features
            for backbone in backbones_of(feature, ctr)
            for seed in range(ctr.seeds)
        ]
        self.work = self._work()

    def run(self, out: Path | None) -> dict[str, Any]:
        self._base()
        if any(_kind(part) in _LM_FEATURES.values() for part, _ in self.parts):
            with self.work.job("LM", "language model"):
                if not self.store.holds_all(self._inferred()):
                    _ = self.profiles.lm_model
        impossible: dict[str, str] = {}
        for part, seed in self.parts:
            if part in impossible:
                self.work.drop(_kind(part))
                continue
            try:
                with self.work.job(_kind(part), f"{part}, seed {seed}"):
                    self.inputs.part(part, seed)
            except ImpossibleError as why:
                impossible[part] = str(why)
                self.work.drop(_kind(part))
        scores: dict[str, dict[str, Scores]] = {}
        judging: dict[str, dict[str, Scores]] = {}
        for feature, backbone, seed in self.models:
            if lacking := [impossible[p] for p in PARTS[feature] if p in impossible]:
                self.reasons[feature] = lacking[0]
                self.work.drop(backbone)
                self.work.drop("judging", self._judged(feature))
                continue
            with self.work.job(backbone, f"{feature} in {backbone}, seed {seed}"):
                columns = self.inputs.of(feature, seed)
                found = self._scores(columns, backbone, seed)
            scores.setdefault(feature, {}).setdefault(backbone, []).append(found)
            if self._judged(feature):
                with self.work.job("judging", f"{feature} in {backbone} held out, seed {seed}"):
                    found = self._held_out(columns, backbone, seed)
                judging.setdefault(feature, {}).setdefault(backbone, []).append(found)
        codes = {}
        if "codes" in self.work.left:
            for seed in range(self.ctr.seeds):
                with self.work.job("codes", f"what codes are, seed {seed}"):
                    codes[str(seed)] = self._codes(seed)
        with self.work.job("statistics", "intervals"):
            left_out = leave_out(self.task, self.ctr, scores, judging)
            result = {**self._result(scores, codes), "left_out": left_out}
        if out is not None:
            write_json(out / "ctr.json", result)
        return result

    def _base(self) -> None:
        with self.work.job("base", "item and user statistics"):
            self.inputs.number_part("base")
            self.inputs.number_part("popularity")

    def _work(self) -> Work:
        """Jobs, and what they may cost: a guess of seconds for two cores, put right on the way."""
        ctr, task = self.ctr, self.task
        jobs = {"base": 1, "statistics": 1}
        for part, _ in self.parts:
            jobs[_kind(part)] = jobs.get(_kind(part), 0) + 1
        for feature, backbone, _ in self.models:
            jobs[backbone] = jobs.get(backbone, 0) + 1
            if self._judged(feature):
                jobs["judging"] = jobs.get("judging", 0) + 1
        if set(_LM_FEATURES.values()) & set(jobs):
            jobs["LM"] = 1
        if {"ids", "ids_prob", "affinity", "ids_affinity", "all+ids"} & set(ctr.features):
            jobs["codes"] = ctr.seeds
        rows = (len(task.train) + len(task.test)) / 1e5
        read = (task.learn.num_events + sum(v.num_events for v in task.views)) / 1e5
        lm, em = self.config.lm, self.config.em
        width = 0.2 + 0.8 * (lm.embedded_hidden / 128) * (lm.embedded_layers / 3)
        tokens = lm.embedded_tokens / 1e6 if lm.path == "default" else 0.1
        # An event table: so many texts under all codes a round, and all of them once.
        columns = min(math.prod(self.profiles.sizes), MOST)
        pairs = len(pc.unique(task.data.item_text)) * columns
        a_round = min(pairs, em.table_readings)
        guess = {
            "base": 1 + rows, "statistics": 0.004 * rows * ctr.bootstrap * len(self.models) / 10,
            "LM": 80 * tokens * width, "EM": width * (em.max_rounds * a_round + pairs) / 4e3,
            "affinity": width * pairs / 6e3, "codes": width * 5,
            "published recipe": 600 * read, "LM states": 10 + 20 * read,
            "clusters": 2 + 2 * read, "numbers": 1 + 5 * rows,
            **dict.fromkeys((*ctr.backbones, DIN), 0.1 + rows), "judging": 0.4 + 4 * rows,
        }  # fmt: skip
        what = f"ctr {ctr.protocol}" + (f" {ctr.first}" if ctr.protocol == "new-users" else "")
        return Work(what, jobs, guess, self.show)

    def _inferred(self) -> list[dict[str, Any]]:
        """Keys of the cells that an LM has to be there for."""
        asked = {part.partition(":")[2] for part, _ in self.parts} & set(_LM_FEATURES)
        return [
            self.inputs.read_key(feature, view, seed)
            for feature in asked
            for view in range(len(self.task.views))
            for seed in range(self.ctr.seeds)
        ]

    def _judged(self, feature: str) -> bool:
        """Whether training rows are scored by a feature too, held out: for warm users' codes."""
        return self.ctr.protocol == "warm" and feature in ("none", *CODED)

    def _scores(
        self, columns: dict[str, list[Input]], backbone: str, seed: int
    ) -> NDArray[np.float32]:
        """Of test rows."""
        labels = self.task.train.label, self.task.valid.label
        return self._trained(columns, labels, backbone, seed)

    def _held_out(
        self, columns: dict[str, list[Input]], backbone: str, seed: int
    ) -> NDArray[np.float32]:
        """Of warm users' training rows, each by a recommender that was trained without it."""
        task = self.task
        out = np.zeros(len(task.train), np.float32)
        for rows, held in held_out_parts(task, self.ctr):
            some = {
                "train": some_rows(columns["train"], rows),
                "valid": columns["valid"],
                "test": some_rows(columns["train"], held),
            }
            labels = task.train.label[rows], task.valid.label
            out[held] = self._trained(some, labels, backbone, seed)
        return out[warm_rows(task, self.ctr)]

    def _trained(
        self,
        columns: dict[str, list[Input]],
        labels: tuple[NDArray[np.float32], NDArray[np.float32]],
        backbone: str,
        seed: int,
    ) -> NDArray[np.float32]:
        """Scores of the rows of `test`, by a recommender trained on those of `train` until those of
        `valid` gain nothing; kept."""
        key = {
            "kind": "scores", "backbone": backbone, "seed": seed, "version": 1,
            "columns": inputs_digest(columns), "labels": _hash([x.tobytes() for x in labels]),
            "ctr": {name: getattr(self.ctr, name) for name in _DECIDES},
        }  # fmt: skip

        def compute() -> dict[str, NDArray[Any]]:
            return {
                "score": train_and_predict(
                    backbone, columns["train"], labels[0], columns["valid"], labels[1],
                    columns["test"], self.ctr, seed,
                )
            }  # fmt: skip

        return self.store.get(key, compute)["score"]

    def _codes(self, seed: int) -> dict[str, Any]:
        """`describe_codes` of the profiles that test rows read, or of half histories."""
        task, inputs = self.task, self.inputs
        view, read = len(task.views) - 1, inputs.profile("ids", seed)
        if view:  # the halves of a history, which training rows read
            view, other = 0, read[1]["codes"]
            again = np.where(other < np.array(self.profiles.sizes), other, -1)
        else:
            again = self._again(seed)
        name = "user_popularity" if task.choices else "user_excess"
        generosity = inputs.numbers.fit(-1).user_numbers(view)[name][task.view_rows(view)]
        return describe_codes(
            task, read[view]["codes"], self.profiles.sizes, generosity, inputs.attributes,
            read[view].get("probabilities"), again,
        )  # fmt: skip

    def _again(self, seed: int) -> Int64:
        """[U, J] codes of some test users from as many events after those of the profile."""
        task, n = self.task, self.ctr.first
        data = task.data
        place = np.arange(data.num_events) - data.offsets[:-1][data.users_of_events()]
        enough = np.flatnonzero((task.fold < 0) & (data.history_lengths >= 2 * n))[:_AGAIN]
        out = np.full((data.num_users, len(self.profiles.sizes)), -1)
        if not len(enough):
            return out
        mask = (place >= n) & (place < 2 * n) & np.isin(data.users_of_events(), enough)
        view = data.select_events(mask)
        key = {"kind": "again", "seed": seed, "view": data_digest(view), **self.profiles.key("ids")}
        found = self.store.get(key, lambda: self.profiles.read("ids", view, seed))["codes"]
        out[data.user_index(view.user_keys)] = found
        return np.where(out < np.array(self.profiles.sizes), out, -1)

    def _result(
        self, scores: dict[str, dict[str, Scores]], codes: dict[str, Any]
    ) -> dict[str, Any]:
        task, ctr, test = self.task, self.ctr, self.task.test
        counts = test.kind == 0
        label, who = test.label[counts], test.user[counts]
        draw = Bootstrap.draw(who, ctr.seeds, ctr.bootstrap)
        resampled = {
            f: {b: draw.auc(label, [x[counts] for x in s]) for b, s in by.items()}
            for f, by in scores.items()
        }
        seen = self.inputs.numbers.fit(-1).counts[test.item] > 0
        measured: dict[str, dict[str, Any]] = {"auc": {}, "logloss": {}, "slices": {}}
        for f in ctr.features:
            if f not in scores:
                for part in measured.values():
                    part[f] = None
                continue
            for part in measured.values():
                part[f] = {}
            for b, by_seed in scores[f].items():
                areas = [float(auc(label, s[counts])[0]) for s in by_seed]
                ci = np.quantile(resampled[f][b], [0.025, 0.975])
                measured["auc"][f][b] = {**_summary(areas), "ci95": ci.tolist()}
                losses = [log_loss(label, s[counts]) for s in by_seed]
                measured["logloss"][f][b] = _summary(losses)
                measured["slices"][f][b] = slices(task, by_seed, seen)
        mean = {f: {b: v["mean"] for b, v in by.items()} for f, by in measured["auc"].items() if by}
        unseen = unseen_pairs(task, scores, ~seen, ctr)
        relative = {
            f: {b: _relative(by[b], mean["none"][b]) for b in by if b in mean["none"]}
            for f, by in mean.items()
            if "none" in mean and f != "none"
        }
        floor, numbers = self._single_numbers(label, counts)
        warnings = [
            f"{b}: none has {area:.4f}, below the {name} alone, {floor[name]:.4f}: this "
            "recommender does not even learn what items are liked; trust no difference in it"
            for b, area in mean.get("none", {}).items()
            for name in [max(floor, key=lambda n: floor[n])]
            if area < floor[name] - _FLOOR
        ]
        return {
            **measured,
            "relative_improvement": relative,
            "paired": comparisons(resampled, mean, ctr),
            "paired_unseen": unseen,
            "reasons": self.reasons,
            "floor": floor,
            "numbers": numbers,
            "unseen": {
                name: float((~seen[counts & (test.label == y)]).mean())
                for name, y in (("positives", 1), ("negatives", 0))
            },
            "codes": codes,
            "ranking": self._ranking() if task.choices else None,
            "attributes": {a.name: {"values": a.distinct, "kept": a.size - 1}
                           for a in self.inputs.attributes},
            "warnings": warnings,
            "protocol": ctr.protocol,
            "first": ctr.first if ctr.protocol == "new-users" else None,
            "label": task.label,
            "rows": {
                "train": len(task.train), "valid": len(task.valid), "test": int(counts.sum()),
                "test_positive": float(label.mean()), "test_users": len(np.unique(who)),
                "repeats": int((test.kind == REPEAT).sum()),
                "users": task.data.num_users, "learn_users": task.learn.num_users,
                "learn_events": task.learn.num_events,
                "train_users": len(np.unique(task.train.user)),
            },
            "sizes": self.profiles.sizes,
            "settings": ctr.to_dict(),
            "em": self.config.to_dict()["em"],
            "userip_fast": __version__,
        }  # fmt: skip

    def _single_numbers(
        self, label: NDArray[np.float32], counts: NDArray[np.bool_]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """AUC of the item's rate and popularity; and of other numbers, on their own."""
        inputs = self.inputs
        base = inputs.number_part("base")["test"]
        popular = inputs.number_part("popularity")["test"]["popularity"]
        floor = {"item_rate": base["item_rate"], "popularity": popular}
        others = {n: x for n, x in base.items() if n.startswith("user_")}
        asked = self._asked()
        for kind in ("foldin", "text", "attribute_affinity"):
            if f"number:{kind}" in asked:
                others |= inputs.number_part(kind)["test"]
        for feature in ("mixture", "mixture_words"):
            if f"score:{feature}" in asked:
                others |= inputs.mixture_scores(0, feature)["test"]
        if "score:ids" in asked:
            others |= inputs.affinities(0)["test"]
            if self.task.choices:  # as against sampled items: popularity is put back
                known = np.log(popular + 0.1)
                others["affinity and popularity"] = others["affinity"] + _SAMPLED * known
        if "score:theta" in asked:
            others |= inputs.told(0)["test"]

        def areas(told: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
            return {n: float(auc(label, x[counts])[0]) for n, x in told.items()}

        return areas(floor), areas(others)

    def _asked(self) -> set[str]:
        """Parts of the features that the data can have."""
        return {part for f in self.ctr.features if f not in self.reasons for part in PARTS[f]}

    def _ranking(self) -> dict[str, dict[str, float]]:
        mixture = posterior = None
        asked = self._asked()
        if "score:mixture" in asked:
            view = self.task.views[-1]
            mixture = self.profiles.mixture(0)
            posterior = mixture.posterior(*self.profiles.choices(view))
        affinity = joint = None
        if "score:ids" in asked:
            affinity, codes = self.inputs.affinity_table(0)
            if self.profiles.format.words:  # "chosen", as against sampled items
                affinity = affinity / (1 - affinity)
            at = self.task.data.user_index(self.task.views[-1].user_keys)
            p = self.inputs.profile("ids", 0)[-1]["probabilities"][at]
            joint = self.profiles.joint(p, codes)
        scores = choice_scores(self.inputs.numbers.fit(-1), mixture, posterior, affinity, joint)
        return rank_choices(self.task, scores)


def _kind(part: str) -> str:
    kind, _, what = part.partition(":")
    if part in ("score:ids", "score:theta"):
        return "affinity"
    if kind in ("code", "probabilities"):
        return _LM_FEATURES.get(what, "clusters")
    return "numbers"


def _over_profiles(values: Mapping[str, Any]) -> Config:
    """`PROFILES` with some settings replaced."""
    merged = PROFILES.to_dict()
    for part, own in values.items():
        both = isinstance(own, Mapping) and isinstance(merged.get(part), Mapping)
        merged[part] = {**merged[part], **own} if both else own
    return Config.from_dict(merged)


def _hash(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _summary(values: list[float]) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std, "seeds": values}


def _relative(area: float, without: float) -> float | None:
    """(AUC - 0.5) / (AUC_none - 0.5) - 1; None where the other is no better than chance."""
    return (area - 0.5) / (without - 0.5) - 1 if without > 0.5 else None

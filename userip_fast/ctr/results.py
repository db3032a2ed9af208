"""The results table: every evaluation of a plan, resumable, and the page that tells what came out.

A plan is a YAML file; `benchmarks/results.yaml` is the one behind docs/results.md:

    ctr: {seeds: 2, rows_per_user: 30}        settings of every evaluation (CTRConfig)
    config: {em: {estep: posterior}}          of every profile model (Config)
    quick: {ctr: {...}, config: {...},        laid over both by --quick
            evaluations: [name]}              and which of them it runs
    evaluations: {name: {protocol: cold}}     one table each, further CTRConfig settings; and which
                                              `labels` it is for
    datasets:
      name:
        interactions: FILE                    below the data folder
        items: FILE
        about: one sentence, with the licence
        labels: [ratings, choices]            what label 1 is; choices alone without ratings
        data: {rating: rating}                DataConfig; `fields`, `config`, `ctr` if need be
        evaluations: [cold]                   those of the plan to run; all without it
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from userip_fast._version import __version__
from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError, DataError
from userip_fast.core.files import atomic_file, read_json, write_json
from userip_fast.ctr.config import CHOSEN, CLUSTERS, DIN, CTRConfig
from userip_fast.ctr.evaluate import evaluate_ctr
from userip_fast.ctr.warm import RULE
from userip_fast.data import read_interactions
from userip_fast.em.calibrate import TABLE_RECIPE
from userip_fast.lm.embedded import RECIPE
from userip_fast.report.words import codes_in_words, in_words, left_out_in_words

LABELS = {"ratings": None, "choices": CHOSEN}
HEADLINE, BACKBONE = "new users, 10 events", "lightgbm"
"""The evaluation and the recommender of the first table."""
TOP = 0.01
"""The aim: AUC of the IDs over the best cluster of equal capacity."""
UNHURT = -0.002
"""The aim for warm users: lower bound of the difference to no user feature."""
NO_HARM = -0.003
"""What `all+ids` may lose against `all`."""

Found = dict[str, dict[str, dict[str, Any]]]
"""Data set -> label -> evaluation -> ctr.json, None for what is to do, or a text: why it cannot."""


def parts_of(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(data set, label) of a plan."""
    return [
        (name, label)
        for name, dataset in plan["datasets"].items()
        for label in dataset.get("labels", ["choices"])
    ]


def run_plan(
    plan: Mapping[str, Any],
    data_root: Path,
    out: Path,
    *,
    quick: bool = False,
    only: tuple[str, ...] = (),
    seconds: float = float("inf"),
    show: bool = True,
) -> Found:
    """Runs what is not yet there of a plan.

    Args:
        data_root: Folder that the plan's files lie below.
        out: Gets `<data set>/<label>/<evaluation>/ctr.json` and `cells/`; run again, it goes on
            from there.
        only: Names of data sets, of labels, of evaluations or of several; empty for all.
        seconds: No evaluation is begun after so long.
    """
    started = time.monotonic()
    found: Found = {}
    for name, label in parts_of(plan):
        dataset = plan["datasets"][name]
        here = found.setdefault(name, {}).setdefault(label, {})
        asked = _settings(plan, dataset, quick)
        config = Config.from_dict(asked)
        data = None
        short = plan.get("quick", {}) if quick else {}
        for evaluation in (
            short.get("evaluations") or dataset.get("evaluations") or plan["evaluations"]
        ):
            settings, over = plan["evaluations"][evaluation], short.get("ctr", {})
            if label not in settings.get("labels", [label]):
                continue
            merged = {**plan.get("ctr", {}), **dataset.get("ctr", {}), **settings, **over}
            merged.pop("labels", None)
            merged["label"] = LABELS[label] or merged.get("label")
            ctr = CTRConfig(**_tuples(merged))
            folder = out / name / label / evaluation
            # What the plan says, not a version's defaults; and what an embedded LM's training and
            # an event table are.
            want = {"ctr": merged, "config": asked, "lm": RECIPE, "table": TABLE_RECIPE}
            if ctr.protocol == "warm":
                want["codes_kept"] = RULE
            stamp = folder / "settings.json"
            if (folder / "ctr.json").is_file() and stamp.is_file():
                said = read_json(stamp)
                # An older event table's figures stand until they are measured anew, and say so.
                older = seconds == 0 and {**want, **said, "table": TABLE_RECIPE} == want
                if said == want or older:
                    result = read_json(folder / "ctr.json")
                    behind = said.get("table") != TABLE_RECIPE
                    here[evaluation] = {**result, "older_table": True} if behind else result
                    continue
            skipped = any(
                chosen and one not in chosen
                for one, chosen in (
                    (name, set(only) & set(plan["datasets"])),
                    (label, set(only) & set(LABELS)),
                    (evaluation, set(only) & set(plan["evaluations"])),
                )
            )
            if skipped or time.monotonic() - started > seconds:
                here[evaluation] = None
                continue
            if data is None:
                d = config.data
                data = read_interactions(
                    data_root / dataset["interactions"], data_root / dataset["items"],
                    user=d.user, item=d.item, rating=d.rating, time=d.time, text=d.text,
                    filter=d.filter, on_bad=d.on_bad, min_history=d.min_history,
                )  # fmt: skip
            if show:
                print(f"== {name}, {label}: {evaluation}", flush=True)
            begun = time.monotonic()
            try:
                result = evaluate_ctr(data, ctr=ctr, config=config, cells=out / "cells", show=show)
            except DataError as why:  # say, no times for an earlier period
                here[evaluation] = str(why)
                continue
            result["seconds"] = time.monotonic() - begun
            result["machine"] = _machine()
            write_json(folder / "ctr.json", result)
            write_json(stamp, want)
            here[evaluation] = result
    return found


def _machine() -> str:
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, userip_fast {__version__}"
    )


def _settings(plan: Mapping[str, Any], dataset: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """Settings of a Config: the plan's, the data set's over them, those of --quick over both."""
    own = {k: dataset[k] for k in ("data", "fields") if k in dataset}
    layers = [plan.get("config", {}), dataset.get("config", {}), own]
    if quick:
        layers.append(plan.get("quick", {}).get("config", {}))
    out: dict[str, Any] = {}
    for layer in layers:
        for part, values in layer.items():
            merged = isinstance(values, Mapping)
            out[part] = {**out.get(part, {}), **values} if merged else values
    return out


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := set(settings) - set(CTRConfig.__dataclass_fields__):
        raise ConfigError(f"plan: {sorted(unknown)[0]!r} is no setting of an evaluation")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def write_figures(path: Path, found: Found) -> None:
    """{data set: {label: {evaluation: ctr.json without settings}}} of what is there, as JSON.

    A line an evaluation, figures of six decimals: a file that can be kept beside the page.
    """

    def listed(level: int, parts: Mapping[str, str]) -> str:
        lines = (f"{' ' * level}{json.dumps(name)}: {text}" for name, text in parts.items())
        return "{\n" + ",\n".join(lines) + f"\n{' ' * (level - 1)}}}"

    def told(r: Mapping[str, Any]) -> str:
        kept = {k: v for k, v in r.items() if k not in ("settings", "em", "userip_fast")}
        return json.dumps(_rounded(kept), separators=(",", ":"))

    text = listed(
        1,
        {
            name: listed(
                2,
                {
                    label: listed(3, {e: told(r) for e, r in by.items() if isinstance(r, Mapping)})
                    for label, by in labels.items()
                },
            )
            for name, labels in found.items()
        },
    )
    with atomic_file(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def write_page(
    path: Path,
    plan: Mapping[str, Any],
    found: Found,
    command: str,
    *,
    picture: str | None = None,
    further: Sequence[str] = (),
) -> None:
    """The results as Markdown, what is missing named as missing.

    Args:
        picture: File beside the page that draws them.
        further: Lines of what was measured beside the plan.
    """
    done = list(_done(found))
    lines = ["# Results", "", *_introduction(command, done), *_headline(done)]
    if picture:
        lines += [f"![AUC of every feature, by data set and label]({picture})", ""]
    lines += _verdict(done)
    for name, labels in found.items():
        about = " ".join(str(plan["datasets"][name].get("about", "")).split())
        lines += [f"## {name}", "", about, ""]
        for label, by in labels.items():
            for evaluation, result in by.items():
                lines += [f"### {name}, {label}: {evaluation}", ""]
                if isinstance(result, dict) and result.get("older_table"):
                    lines += ["Measured with an earlier version of the event table.", ""]
                if result is None:
                    lines += ["Not run yet.", ""]
                elif isinstance(result, str):
                    lines += [f"n/a: {result}.", ""]
                else:
                    lines += _table(result)
    lines += further
    if notes := plan.get("notes"):
        lines += ["## What was tried", "", notes.strip(), ""]
    with atomic_file(path) as tmp:
        tmp.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _done(found: Found) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """(data set, label, evaluation, ctr.json) of what is there."""
    for name, labels in found.items():
        for label, by in labels.items():
            for evaluation, result in by.items():
                if isinstance(result, Mapping):
                    yield name, label, evaluation, result


def _introduction(command: str, done: list[Any]) -> list[str]:
    machines = sorted({str(r.get("machine")) for *_, r in done})
    hours = sum(r.get("seconds", 0.0) for *_, r in done) / 3600
    return [
        "What a recommender gains from knowing a user by a few codes, against what anyone would try"
        " without an LM. Written by",
        "",
        f"    {command}",
        "",
        "which keeps a file per piece of work and goes on where it was stopped. AUC on test rows,"
        " mean over the seeds ± their standard deviation; differences with a 95 % interval and a"
        " two-sided p from resampling test users and seeds together, paired. Every feature, `none`"
        " included, comes with statistics of the item and of the user's profile events. Splits,"
        " leaks and features are explained in [usage.md](usage.md#does-it-help-a-recommender). No"
        " feature was tuned on these rows; all codes of a table have the same number of fields and"
        " sizes.",
        "",
        f"Evaluations: {len(done)}, their last runs together {hours:.1f} h of one core"
        + (f", on {'; '.join(machines)}" if machines else "")
        + " (beside other work; what earlier runs had kept was read).",
        "",
    ]


def _headline(done: list[Any]) -> list[str]:
    """New users of 10 events: what each step adds, in one recommender."""
    columns = (
        "none", "best cluster", "mixture", "mixture_words", "foldin", "text", "ids", "affinity",
        "theta", "all", "all+ids",
    )  # fmt: skip
    lines = [
        f"New users known by 10 events, AUC in {BACKBONE}; *item alone* is the better of its rate"
        " and its popularity, without any model.",
        "",
        "| data set | label | item alone | "
        + " | ".join(columns)
        + " | ids - best cluster | affinity - mixture | all+ids - all |",
        "|---" * (len(columns) + 6) + "|",
    ]
    found = False
    for name, label, evaluation, r in done:
        compared = r["paired"].get(BACKBONE)
        if evaluation != HEADLINE or not compared:
            continue
        found = True
        area = {f: by[BACKBONE]["mean"] for f, by in r["auc"].items() if by and BACKBONE in by}
        best = max((f for f in CLUSTERS if f in area), key=lambda f: area[f], default=None)
        shown = {**area, **({"best cluster": area[best]} if best else {})}
        cells = [f"{shown[c]:.4f}" if c in shown else "" for c in columns]
        if best:
            cells[1] += f" ({_short(best)})"
        against = compared.get("against", {}).get(best)
        others = (compared.get(name) for name in ("affinity - mixture", "all+ids - all"))
        differences = [_difference(d) for d in (against, *others)]
        floor = max(r["floor"].values())
        lines.append(
            f"| {name} | {label} | {floor:.4f} | " + " | ".join(cells + differences) + " |"
        )
    return [*lines, ""] if found else []


def _difference(d: Mapping[str, Any] | None) -> str:
    if d is None:
        return ""
    low, high = d["ci95"]
    return f"{d['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _short(feature: str) -> str:
    return feature.removeprefix("kmeans_").removesuffix("_clusters")


def _verdict(done: list[Any]) -> list[str]:
    """Claims by data set and label: how many pairs of protocol and recommender bear them out."""
    claims: dict[str, dict[str, list[bool]]] = {
        "`none` is no worse than the item alone (by 0.005)": {},
        "new and cold users: IDs better than no user feature (interval above 0)": {},
        f"the same, IDs at least the best cluster of equal capacity + {TOP}": {},
        "new and cold users: `affinity` at least the mixture without an LM - 0.01": {},
        "items never met: `affinity` better than `text` and attributes (interval above 0)": {},
        "new and cold users: `all+ids` better than `all` (interval above 0)": {},
        f"nowhere `all+ids` below `all` by more than {-NO_HARM} (lower bound)": {},
        f"warm users not hurt by IDs (lower bound at least {UNHURT})": {},
    }
    floor, over_none, by_top, by_mixture, unseen, over_all, no_harm, unhurt = claims.values()
    names, left = [], []
    for name, label, _, r in done:
        if r["settings"]["damage"] or r["settings"]["period"] != "same":
            continue
        key = f"{name}, {label}"
        names.append(key)
        for backbone, by in (r["auc"].get("none") or {}).items():
            held = by["mean"] >= max(r["floor"].values()) - 0.005
            floor.setdefault(key, []).append(held)
            compared = r["paired"].get(backbone, {})
            against = compared.get("against", {})
            if "none" in against:
                low = against["none"]["ci95"][0]
                if r["protocol"] == "warm":
                    unhurt.setdefault(key, []).append(low >= UNHURT)
                    if told := r.get("left_out"):
                        left.append(told["ids"][backbone]["left_out"])
                else:
                    over_none.setdefault(key, []).append(low > 0)
                    best = against.get(compared["best_cluster"])
                    by_top.setdefault(key, []).append(
                        best is not None and best["difference"] >= TOP
                    )
            if r["protocol"] != "warm" and (d := compared.get("affinity - mixture")):
                by_mixture.setdefault(key, []).append(d["difference"] >= -TOP)
            apart = r.get("paired_unseen", {}).get(backbone, {})
            rivals = [apart.get(f"affinity - {f}") for f in ("text", "kmeans_attributes")]
            if told := [d for d in rivals if d]:
                unseen.setdefault(key, []).append(all(d["ci95"][0] > 0 for d in told))
            if d := compared.get("all+ids - all"):
                no_harm.setdefault(key, []).append(d["ci95"][0] > NO_HARM)
                if r["protocol"] != "warm":
                    over_all.setdefault(key, []).append(d["ci95"][0] > 0)
    names = list(dict.fromkeys(names))
    lines = [
        "## The aims, and where they stand",
        "",
        "Pairs of protocol and recommender that bear a claim out.",
        "",
        "| claim | " + " | ".join([*names, "all"]) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for claim, by in claims.items():
        every = [by.get(name, []) for name in names]
        every.append([held for part in every for held in part])
        cells = [f"{sum(x)} of {len(x)}" if x else "" for x in every]
        lines.append(f"| {claim} | " + " | ".join(cells) + " |")
    if left:
        lines += [
            "",
            f"Of {len(left)} pairs of warm users codes are left out in {sum(left)}, where"
            " held-out training rows do not show that they help: these are level by construction.",
        ]
    return [*lines, ""]


def _table(r: Mapping[str, Any]) -> list[str]:
    rows = r["rows"]
    backbones = list(dict.fromkeys(b for by in r["auc"].values() if by for b in by))
    capped = r["settings"]["max_users"]
    floor = ", ".join(f"{n.replace('_', ' ')} {x:.4f}" for n, x in r["floor"].items())
    lines = [
        f"{r['label']}; {rows['train']:,} training rows of {rows['train_users']:,} users,"
        f" {rows['test']:,} test rows of {rows['test_users']:,} ({rows['test_positive']:.0%}"
        f" positive); codes of sizes {r['sizes']} learned on {rows['learn_users']:,} others"
        + (f"; at most {capped:,} users on either side" if capped else "")
        + f". Item alone: {floor}. Never met in training: {r['unseen']['positives']:.1%} of"
        f" positives, {r['unseen']['negatives']:.1%} of negatives"
        + (f"; {rows['repeats']:,} repeats stand apart." if rows["repeats"] else "."),
        "",
        "| feature | " + " | ".join(backbones) + " |",
        "|---" * (len(backbones) + 1) + "|",
    ]
    best = {b: max(by[b]["mean"] for by in r["auc"].values() if by and b in by) for b in backbones}
    for feature in r["settings"]["features"]:  # a file keeps no order
        by = r["auc"][feature]
        if by is None:
            why = "n/a: " + r["reasons"][feature].replace("|", "\\|")
            cells = [why, *[""] * (len(backbones) - 1)]
        else:
            cells = []
            for b in backbones:
                text = in_words(by[b]) if b in by else ""
                top = text and b != DIN and by[b]["mean"] == best[b]
                cells.append(f"**{text}**" if top else text)
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    for title in ("ids - none", "ids - best cluster", "all+ids - all"):
        cells = [_compared(title, r["paired"].get(b, {})) for b in backbones]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append("")
    numbers = ", ".join(f"{n} {x:.4f}" for n, x in r["numbers"].items())
    lines += [f"- Single numbers: {numbers}."] if numbers else []
    lines += [f"- {line}." for line in left_out_in_words(r.get("left_out"))]
    lines += _apart(r)
    if r["ranking"]:
        ranked = "; ".join(
            f"{n.replace('_', '-')} {by['recall20']:.4f} / {by['ndcg100']:.4f}"
            for n, by in r["ranking"].items()
        )
        lines.append(f"- Whole catalogue, Recall@20 / NDCG@100: {ranked}.")
    lines += [f"- Codes, seed {s}: {codes_in_words(c)}." for s, c in r["codes"].items()]
    lines += [f"- **Warning:** {warning}." for warning in r["warnings"]]
    return [*lines, ""]


def _compared(title: str, compared: Mapping[str, Any]) -> str:
    against = compared.get("against", {})
    if title == "ids - none":
        return _difference(against.get("none"))
    if title == "all+ids - all":
        return _difference(compared.get(title))
    best = compared.get("best_cluster")
    return f"{_difference(against[best])} ({_short(best)})" if best else ""


def _apart(r: Mapping[str, Any]) -> list[str]:
    """AUC of rows that stand apart, of a few features, the mean over recommenders."""
    lines = []
    for name, what in (
        ("unseen", "Items never met in training"),
        ("repeats", "Repeats against sampled items"),
        ("matched", "Against items as popular"),
    ):
        told, rows = [], 0
        for feature in (
            "none", "mixture", "mixture_words", "foldin", "text", "ids", "affinity", "theta",
            "all", "all+ids",
        ):  # fmt: skip
            by = r["slices"].get(feature) or {}
            areas = [s[name]["mean"] for s in by.values() if s.get(name)]
            if areas:
                rows = next(s[name]["rows"] for s in by.values() if s.get(name))
                told.append(f"{feature} {sum(areas) / len(areas):.4f}")
        if told:
            lines.append(f"- {what} ({rows:,} rows): {', '.join(told)}.")
    for backbone, by in r.get("paired_unseen", {}).items():
        told = [f"{name} {_difference(d)}" for name, d in by.items()]
        lines.append(f"- The same, differences in {backbone}: {', '.join(told)}.")
    return lines

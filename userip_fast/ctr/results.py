"""The results table: every evaluation of a plan, resumable, and the page that tells what came out.

A plan is a YAML file; `benchmarks/results.yaml` is the one behind docs/results.md:

    ctr: {seeds: 3, max_users: 800}           settings of every evaluation (CTRConfig)
    config: {em: {estep: posterior}}          of every profile model (Config)
    quick: {ctr: {...}, config: {...},        laid over both by --quick
            evaluations: [name]}              and which of them it runs
    evaluations: {name: {protocol: cold}}     one table each, further CTRConfig settings
    datasets:
      name:
        interactions: FILE                    below the data folder
        items: FILE
        about: one sentence, with the licence
        data: {rating: rating}                DataConfig; `fields`, `config`, `ctr` if need be
        evaluations: [cold]                   those of the plan to run; all without it
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from userip_fast._version import __version__
from userip_fast.config import Config
from userip_fast.ctr.config import CTRConfig
from userip_fast.ctr.evaluate import evaluate_ctr
from userip_fast.data import read_interactions
from userip_fast.errors import ConfigError, DataError
from userip_fast.files import atomic_file, read_json, write_json

TOP = 0.005
"""The aim: AUC over the best cluster baseline, for new and cold users."""
UNHURT = -0.001
"""The aim for warm users: lower bound of the difference to no user feature."""


def run_plan(
    plan: Mapping[str, Any],
    data_root: Path,
    out: Path,
    *,
    quick: bool = False,
    only: tuple[str, ...] = (),
    seconds: float = float("inf"),
    show: bool = True,
) -> dict[str, dict[str, Any]]:
    """Runs what is not yet there of a plan.

    Args:
        data_root: Folder that the plan's files lie below.
        out: Gets `<data set>/<evaluation>/ctr.json` and `cells/`; run again, it goes on from there.
        only: Names of data sets, of evaluations or of both; empty for all.
        seconds: No evaluation is begun after so long.

    Returns:
        Data set -> evaluation -> ctr.json, or None for what is still to do, or a text: why it
        cannot be.
    """
    started = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    for name, dataset in plan["datasets"].items():
        found[name] = {}
        asked = _settings(plan, dataset, quick)
        config = Config.from_dict(asked)
        data = None
        short = plan.get("quick", {}) if quick else {}
        wanted = short.get("evaluations") or dataset.get("evaluations") or plan["evaluations"]
        for evaluation in wanted:
            settings, over = plan["evaluations"][evaluation], short.get("ctr", {})
            merged = {**plan.get("ctr", {}), **dataset.get("ctr", {}), **settings, **over}
            ctr = CTRConfig(**_tuples(merged))
            folder = out / name / evaluation
            want = {"ctr": merged, "config": asked}  # what the plan says, not a version's defaults
            stamp = folder / "settings.json"
            if (folder / "ctr.json").is_file() and stamp.is_file() and read_json(stamp) == want:
                found[name][evaluation] = read_json(folder / "ctr.json")
                continue
            skipped = any(
                chosen and one not in chosen
                for one, chosen in (
                    (name, set(only) & set(plan["datasets"])),
                    (evaluation, set(only) & set(plan["evaluations"])),
                )
            )
            if skipped or time.monotonic() - started > seconds:
                found[name][evaluation] = None
                continue
            if data is None:
                d = config.data
                data = read_interactions(
                    data_root / dataset["interactions"], data_root / dataset["items"],
                    user=d.user, item=d.item, rating=d.rating, time=d.time, text=d.text,
                    filter=d.filter, on_bad=d.on_bad, min_history=d.min_history,
                )  # fmt: skip
            if show:
                print(f"== {name}: {evaluation}", flush=True)
            begun = time.monotonic()
            try:
                result = evaluate_ctr(data, ctr=ctr, config=config, cells=out / "cells", show=show)
            except DataError as why:  # say, no times for an earlier period
                found[name][evaluation] = str(why)
                continue
            result["seconds"] = time.monotonic() - begun
            result["machine"] = _machine()
            write_json(folder / "ctr.json", result)
            write_json(stamp, want)
            found[name][evaluation] = result
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


def write_page(
    path: Path,
    plan: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    command: str,
    *,
    picture: str | None = None,
) -> None:
    """The results as Markdown, what is missing named as missing.

    Args:
        picture: File beside the page that draws them.
    """
    done = {(d, e): r for d, by in found.items() for e, r in by.items() if isinstance(r, Mapping)}
    lines = ["# Results", "", *_introduction(command, done)]
    if picture:
        lines += [
            f"![AUC by data set, users and feature, mean over the recommenders]({picture})",
            "",
        ]
    lines += _verdict(done)
    for name, by in found.items():
        about = " ".join(str(plan["datasets"][name].get("about", "")).split())
        lines += [f"## {name}", "", about, ""]
        for evaluation, result in by.items():
            lines += [f"### {name}: {evaluation}", ""]
            if result is None:
                lines += ["Not run yet.", ""]
            elif isinstance(result, str):
                lines += [f"n/a: {result}.", ""]
            else:
                lines += _table(result)
    if notes := plan.get("notes"):
        lines += ["## What was tried", "", notes.strip(), ""]
    with atomic_file(path) as tmp:
        tmp.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _introduction(command: str, done: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    machines = sorted({str(r.get("machine")) for r in done.values()})
    hours = sum(r.get("seconds", 0.0) for r in done.values()) / 3600
    return [
        "What a recommender gains from knowing a user by a few codes. Written by",
        "",
        f"    {command}",
        "",
        "which keeps a file per trained model and goes on where it was stopped. AUC on test rows,"
        " mean over the seeds ± their standard deviation; differences with a 95 % interval and a"
        " two-sided p from resampling test users and seeds together, paired. Splits, leaks and"
        " features are explained in [usage.md](usage.md#does-it-help-a-recommender). No feature was"
        " tuned on these rows; all codes of a table have the same number of fields and sizes.",
        "",
        f"Evaluations: {len(done)}, together {hours:.1f} h"
        + (f", on {'; '.join(machines)}" if machines else "")
        + " (shared with other work, so the hours are an upper bound).",
        "",
    ]


def _verdict(done: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Claims by data set: how many pairs of protocol and recommender bear them out."""
    claims: dict[str, dict[str, list[bool]]] = {
        "new and cold users: IDs better than no user feature (interval above 0)": {},
        "new and cold users: IDs better than every other feature": {},
        f"the same, by {TOP} AUC over the best cluster baseline": {},
        f"warm users not hurt (lower bound above {UNHURT})": {},
    }
    over_none, over_all, by_top, unhurt = claims.values()
    for (data, _), r in done.items():
        if r["settings"]["damage"] or r["settings"]["period"] != "same":
            continue
        for compared in r["paired"].values():
            against, best = compared["against"], compared["best_cluster"]
            above_none = against["none"]["ci95"][0]
            if r["protocol"] == "warm":
                unhurt.setdefault(data, []).append(above_none > UNHURT)
                continue
            beaten = all(d["difference"] > 0 for d in against.values())
            top = best is not None and against[best]["difference"] >= TOP
            over_none.setdefault(data, []).append(above_none > 0)
            over_all.setdefault(data, []).append(beaten)
            by_top.setdefault(data, []).append(beaten and top)
    names = list(dict.fromkeys(data for data, _ in done))
    lines = [
        "## The aim, and where it stands",
        "",
        "Pairs of protocol and recommender that bear a claim out.",
        "",
        "| claim | " + " | ".join([*names, "all"]) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for claim, by in claims.items():
        every = [by.get(name, []) for name in names]
        every.append([held for part in every for held in part])
        lines.append(f"| {claim} | " + " | ".join(f"{sum(x)} of {len(x)}" for x in every) + " |")
    return [*lines, ""]


def _table(r: Mapping[str, Any]) -> list[str]:
    backbones = r["settings"]["backbones"]
    rows = r["rows"]
    lines = [
        f"{r['label']}; {rows['train']:,} training rows, {rows['test']:,} test rows of"
        f" {rows['test_users']:,} users ({rows['test_positive']:.0%} positive); at most"
        f" {r['settings']['max_users']:,} users and {r['settings']['rows_per_user']} events of each"
        f" as rows; codes of sizes {r['sizes']} learned on {rows['learn_users']:,} users;"
        f" {r['settings']['seeds']} seeds.",
        "",
        "| feature | " + " | ".join(backbones) + " |",
        "|---" * (len(backbones) + 1) + "|",
    ]
    best = {b: max(by[b]["mean"] for by in r["auc"].values() if by is not None) for b in backbones}
    for feature in r["settings"]["features"]:  # a file keeps no order
        by = r["auc"][feature]
        if by is None:
            cells = [
                "n/a: " + r["reasons"][feature].replace("|", "\\|"),
                *[""] * (len(backbones) - 1),
            ]
        else:
            cells = []
            for b in backbones:
                text = f"{by[b]['mean']:.4f} ± {by[b]['std']:.4f}"
                cells.append(f"**{text}**" if by[b]["mean"] == best[b] else text)
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    for title, pick in (("none", "none"), ("best cluster", None)):
        cells = []
        for b in backbones:
            compared = r["paired"].get(b, {"against": {}, "best_cluster": None})
            other = pick or compared["best_cluster"]
            d = compared["against"].get(other)
            if d is None:
                cells.append("")
                continue
            low, high = d["ci95"]
            named = "" if pick else f" ({other.removeprefix('kmeans_').removesuffix('_clusters')})"
            cells.append(f"{d['difference']:+.4f} [{low:+.4f}, {high:+.4f}] p {d['p']:.3f}{named}")
        if any(cells):
            lines.append(f"| ids - {title} | " + " | ".join(cells) + " |")
    return [*lines, ""]

"""docs/results.md: what the IDs add to recommenders, on every data set of a plan.

    python benchmarks/results_table.py --data DATA            the whole table, hours; resumable
    python benchmarks/results_table.py --data DATA --quick    a small one: runs/results-quick
    python benchmarks/results_table.py --data DATA --minutes 30 --only warm goodbooks-10k-sample

DATA holds the folders that the plan names; another plan (`--plan`, see `userip_fast.ctr.results`)
takes any data sets. Each piece of work is a file below --out, so that the command goes on where it
was stopped. Models are small: processes of one thread (--jobs, one per core), each with one label
of one data set, beat one process of more threads. Beside the page lie its picture and its figures
(results.json).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
PLAN = HERE / "results.yaml"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, help="runs/results, or runs/results-quick")
    parser.add_argument("--page", type=Path, help="docs/results.md; quick: results.md in --out")
    parser.add_argument("--quick", action="store_true", help="the plan's small settings")
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of data sets, labels, evaluations"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing later")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--render", action="store_true", help="write the page of what is there")
    args = parser.parse_args(arguments)

    from userip_fast.ctr.results import LABELS, parts_of, run_plan, write_figures, write_page

    out = args.out or Path("runs/results-quick" if args.quick else "runs/results")
    page = args.page or (out / "results.md" if args.quick else HERE.parent / "docs" / "results.md")
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    run = partial(run_plan, plan, args.data, out, quick=args.quick)
    evaluations = [e for e in plan["evaluations"] if e in args.only]
    asked = [
        (name, label, *evaluations)
        for name, label in parts_of(plan)
        if name in args.only or not set(args.only) & set(plan["datasets"])
        if label in args.only or not set(args.only) & set(LABELS)
    ]
    if args.quick:
        print(f"quick, with caps: {plan.get('quick', {}).get('ctr', {})}")
    if not args.render:
        _run_each(partial(run, seconds=60 * args.minutes), asked, args.jobs)
    found = run(seconds=0, show=False)
    command = "python benchmarks/results_table.py --data DATA" + " --quick" * args.quick
    picture = _draw(found, page.with_suffix(".png"))
    further = _real_lm() if args.plan == PLAN and not args.quick else []
    write_page(page, plan, found, command, picture=picture, further=further)
    write_figures(page.with_suffix(".json"), found)
    every = [r for labels in found.values() for by in labels.values() for r in by.values()]
    missing = sum(r is None for r in every)
    print(f"{page}: {len(every) - missing} evaluations, {missing} to do")
    return 0


def _real_lm() -> list[str]:
    """What `real_lm.py` measured on the same rows."""
    result = HERE / "results" / "cpu" / "real_lm.json"
    if not result.is_file():
        return []
    from _real_lm_section import section

    return section(json.loads(result.read_text(encoding="utf-8")))


def _run_each(run, asked: list[tuple[str, ...]], jobs: int) -> None:  # type: ignore[no-untyped-def]
    """All parts, in processes of one thread where there are several."""
    if min(jobs, len(asked)) == 1:
        for only in asked:
            run(only=only)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_one_thread) as pool:
        for one in [pool.submit(run, only=only) for only in asked]:
            one.result()


def _draw(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> str | None:
    """A panel per data set and label, of the headline's users: its file's name.

    None where nothing is there to draw, or no matplotlib to draw it with.
    """
    from userip_fast.ctr.results import HEADLINE

    panels = []
    for data, labels in found.items():
        for label, by in labels.items():
            there = {e: r for e, r in by.items() if isinstance(r, dict)}
            if r := there.get(HEADLINE) or next(iter(there.values()), None):
                panels.append((f"{data}\n{label}", r))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), facecolor="white")
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for one, (title, r) in zip(axes, panels):
        _dots(one, r)
        one.set_title(title, fontsize=9)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    figure.savefig(path, dpi=110)
    return path.name


def _dots(axes: Any, result: dict[str, Any]) -> None:
    """A dot with interval for each feature, the mean over its recommenders, sorted."""
    from userip_fast.report.pictures import OURS, ctr_points

    ink, accent = "#606060", "#1f6fb2"
    points = ctr_points(result)
    for y, (mean, low, high, feature) in enumerate(points):
        ours = feature in OURS
        color = accent if ours else ink
        axes.plot([low, high], [y, y], color=color, lw=1.6, alpha=0.55)
        axes.plot(mean, y, "D" if ours else "o", color=color, ms=4.5)
        if feature == "none":
            axes.axvline(mean, color=ink, lw=0.8, ls="--")
    if floor := result.get("floor"):
        axes.axvline(max(floor.values()), color=ink, lw=0.8, ls=":", alpha=0.6)
    axes.set_yticks(range(len(points)), [p[-1] for p in points], fontsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("AUC (dashed: none; dotted: item alone)", fontsize=8)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())

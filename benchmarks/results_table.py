"""docs/results.md: what the IDs add to recommenders, on every data set of a plan.

    python benchmarks/results_table.py --data DATA            the whole table, hours; resumable
    python benchmarks/results_table.py --data DATA --quick    a small one: runs/results-quick
    python benchmarks/results_table.py --data DATA --minutes 30 --only warm goodbooks-10k-sample

DATA holds the folders that the plan names; another plan (`--plan`, see `userip_fast.ctr.results`)
takes any data sets. Each trained model is a file below --out, so that the command goes on where it
was stopped. Models are small: a process of one thread per data set (--jobs, one per core) beats
one process of more threads.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", type=Path, default=HERE / "results.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, help="runs/results, or runs/results-quick")
    parser.add_argument("--page", type=Path, help="docs/results.md; quick: results.md in --out")
    parser.add_argument("--quick", action="store_true", help="the plan's small settings")
    parser.add_argument("--only", nargs="*", default=[], help="names of data sets, of evaluations")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing later")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="data sets at a time")
    parser.add_argument("--render", action="store_true", help="write the page of what is there")
    args = parser.parse_args(arguments)

    from userip_fast.ctr.results import run_plan, write_page

    out = args.out or Path("runs/results-quick" if args.quick else "runs/results")
    page = args.page or (out / "results.md" if args.quick else HERE.parent / "docs" / "results.md")
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    run = partial(run_plan, plan, args.data, out, quick=args.quick)
    names = [n for n in plan["datasets"] if n in args.only] or list(plan["datasets"])
    evaluations = [e for e in plan["evaluations"] if e in args.only]
    found = run(seconds=0)
    if not args.render:
        more = partial(run, seconds=60 * args.minutes)
        for name, part in _each(more, [(n, *evaluations) for n in names], args.jobs):
            found[name] = part[name]
    command = "python benchmarks/results_table.py --data DATA" + " --quick" * args.quick
    write_page(page, plan, found, command, picture=_draw(found, page.with_suffix(".png")))
    missing = sum(r is None for by in found.values() for r in by.values())
    print(f"{page}: {sum(map(len, found.values())) - missing} evaluations, {missing} to do")
    return 0


def _each(run, asked: list[tuple[str, ...]], jobs: int):  # type: ignore[no-untyped-def]
    """(data set, results) of each, in processes of one thread where there are several."""
    names = [name for name, *_ in asked]
    if min(jobs, len(asked)) == 1:
        return zip(names, [run(only=only) for only in asked])
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_one_thread) as pool:
        waiting = [pool.submit(run, only=only) for only in asked]
        return zip(names, [one.result() for one in waiting])


def _draw(found: dict[str, dict[str, Any]], path: Path) -> str | None:
    """A panel per data set: AUC of every feature, mean over the recommenders; its file's name.

    None where nothing is there to draw, or no matplotlib to draw it with.
    """
    rows = {
        data: {e: r for e, r in by.items() if isinstance(r, dict) and not r["settings"]["damage"]}
        for data, by in found.items()
    }
    rows = {data: by for data, by in rows.items() if by}
    names = list(dict.fromkeys(e for by in found.values() for e in by))
    names = [e for e in names if any(e in by for by in rows.values())]
    try:
        from matplotlib.figure import Figure

        from userip_fast.ctr.config import FEATURES
    except ImportError:
        return None
    if not rows:
        return None
    figure = Figure(figsize=(2.2 + 2.8 * len(rows), 1.3 + 0.45 * len(names)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    shown = {"none": "x", "random": "+", "paper": "s", "ids": "D"}
    for axes, (data, by) in zip(panels, rows.items()):
        for i, feature in enumerate(FEATURES):
            points = [
                (sum(b["mean"] for b in areas.values()) / len(areas), y)
                for y, e in enumerate(names)
                if e in by and (areas := by[e]["auc"].get(feature))
            ]
            front = feature == "ids"
            style = {"s": 60 if front else 28, "color": "black" if front else f"C{i}"}
            x, y = zip(*points) if points else ((), ())
            axes.scatter(x, y, marker=shown.get(feature, "o"), label=feature, zorder=3, **style)
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(data, fontsize=9)
        axes.set_xlabel("AUC")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=120)
    return path.name


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())

"""docs/results.md: what the IDs add to recommenders, on every data set of a plan.

    python benchmarks/results_table.py --data DATA            the whole table, hours; resumable
    python benchmarks/results_table.py --data DATA --quick    a small one: runs/results-quick
    python benchmarks/results_table.py --data DATA --minutes 30 --only warm goodbooks-10k-sample

DATA holds the folders that the plan names; another plan (`--plan`, see `userip_fast.ctr.results`)
takes any data sets. Each trained model is a file below --out, so that the command goes on where it
was stopped. One thread is best on a busy machine: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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
    parser.add_argument("--render", action="store_true", help="write the page of what is there")
    args = parser.parse_args(arguments)

    from userip_fast.ctr.results import run_plan, write_page

    out = args.out or Path("runs/results-quick" if args.quick else "runs/results")
    page = args.page or (out / "results.md" if args.quick else HERE.parent / "docs" / "results.md")
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    found = run_plan(
        plan, args.data, out, quick=args.quick, only=tuple(args.only),
        seconds=0 if args.render else 60 * args.minutes,
    )  # fmt: skip
    command = "python benchmarks/results_table.py --data DATA" + " --quick" * args.quick
    write_page(page, plan, found, command)
    missing = sum(r is None for by in found.values() for r in by.values())
    print(f"{page}: {sum(map(len, found.values())) - missing} evaluations, {missing} to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())

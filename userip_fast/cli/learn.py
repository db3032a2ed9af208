"""`userip demo`, `fit`, `infer`, `profiles`: codes learned, and read."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from userip_fast.cli.flags import settings_of
from userip_fast.cli.log import read_or_stream, settings_like
from userip_fast.cli.options import EM, FROM, LOG, PROFILE, RUN, TOLD, said, takes
from userip_fast.cli.shell import app, die, say


@app.command()
@takes(
    "out",
    "seed",
    out={"help": "Run folder.", "default": Path("runs/demo"), "panel": None},
    seed={
        "kind": int,
        "help": "Of the world, the LM and everything else.",
        "default": 0,
        "panel": None,
    },
)
def demo(
    out: Path,
    seed: int,
    full: Annotated[bool, typer.Option("--full", help="Three seeds instead of one.")] = False,
) -> None:
    """Infer traits of a planted world's users and compare them with the truth. Minutes on a CPU."""
    from userip_fast.cli.terminal import print_cards, print_scores
    from userip_fast.core.files import read_json
    from userip_fast.demo import run_demo

    metrics = run_demo(out=out, full=full, seed=seed, show=True)
    print_scores(metrics)
    print_cards(read_json(out / "model" / "codes.json"))
    say(f"{out}: model, bank, metrics.json, report.html")


@app.command()
@takes(
    *LOG, "stream", *TOLD, *PROFILE, "verify", "out", *EM, *FROM, "max_users", "probabilities",
    "profiles", "quiet", out={"help": "Run folder: model/ bank/ metrics.json report.html ..."},
)  # fmt: skip
def fit(
    ctx: typer.Context,
    out: Path,
    probabilities: bool,
    profiles: bool,
    quiet: bool,
    like: Annotated[
        Path | None, said("Model folder of an earlier fit whose code numbers are kept.", RUN)
    ] = None,
    resume: Annotated[bool, said("Go on after the last checkpoint of --out.", RUN)] = False,
) -> None:
    """Learn profile codebooks from an interaction log; write model, bank and report to --out."""
    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of torchrun's processes, one speaks
    settings = settings_of(ctx.params)
    data = read_or_stream({**ctx.params, "quiet": quiet}, settings)
    from userip_fast.bank import FeatureBank
    from userip_fast.cli.terminal import print_results
    from userip_fast.core.files import read_json
    from userip_fast.jobs.fit import fit as run_fit
    from userip_fast.jobs.run_folder import Run

    model = run_fit(
        data,
        config=settings,
        out=out,
        resume=resume,
        probabilities=probabilities,
        profiles=profiles,
        like=like,
        show=not quiet,
    )
    if not quiet:
        run = Run(out)
        metrics = read_json(run.metrics)
        fitted = metrics["fit"]
        print_results(
            f"userip fit: {out}",
            data,
            model,
            FeatureBank.open(run.bank),
            fitted["seconds"],
            fitted["nll_per_weight"],
            metrics["data"]["told"],
            {"model": run.model, "bank": run.bank, "report": run.report, "metrics": run.metrics},
        )


@app.command()
@takes(
    *LOG, "stream", "device", "verify", "model", "out", "max_users", "probabilities", "profiles",
    "quiet",
    out={"help": "Bank folder."},
)  # fmt: skip
def infer(
    ctx: typer.Context,
    model: Path,
    out: Path,
    device: str | None,
    verify: bool | None,
    probabilities: bool,
    profiles: bool,
    quiet: bool,
    shard: Annotated[
        str | None, said("I/N: only this share of the users, as a file in the folder --out.", RUN)
    ] = None,
    update: Annotated[
        bool, said("Keep the bank's other users instead of replacing all.", RUN)
    ] = False,
) -> None:
    """Read users' codes with a fitted model; write a bank of exactly these users.

    After an interrupt or a kill the same command goes on after the last finished block of users.
    Column names, text, filter and rules default to those the model was fitted with.
    """
    from userip_fast.bank import FeatureBank
    from userip_fast.cli.terminal import print_results
    from userip_fast.model.fitted import Model

    fitted = Model.load(model, device=device, verify=bool(verify))
    settings = settings_like(fitted, ctx.params)
    data = read_or_stream(ctx.params, settings)
    rule = settings.data.on_bad
    if shard is not None:
        if probabilities:
            die("--probabilities is not kept by --shard files; --profiles, which tells more, is", 2)
        from userip_fast.jobs.shards import infer_shard, parse_shard

        index, count = parse_shard(shard)
        file = infer_shard(
            fitted, data, index, count, out, on_bad=rule, profiles=profiles, show=not quiet
        )
        say(f"{file}: done")
        return
    found: dict[str, Any] = {}
    started = monotonic()
    fitted.infer(
        data,
        out,
        on_bad=rule,
        update=update,
        probabilities=probabilities,
        profiles=profiles,
        show=not quiet,
        log=found.update,
    )
    if not quiet:
        print_results(
            f"userip infer: {out}",
            data,
            fitted,
            FeatureBank.open(out),
            monotonic() - started,
            found["nll_per_weight"],
            found["told"],
            {"bank": out},
        )


@app.command()
@takes(
    *LOG, "stream", "device", "model", "out", "max_users", "quiet",
    out={"help": "Parquet file that gets the profiles."},
)  # fmt: skip
def profiles(
    ctx: typer.Context,
    model: Path,
    out: Path,
    device: str | None,
    quiet: bool,
    top: Annotated[int, said("Best items of each user, so many.", RUN)] = 0,
) -> None:
    """Write users' codes, the probabilities of all codes, and their best items as a table.

    What a recommender takes beside the codes. A bank holds the same with --profiles, and `bank
    export` adds best items.
    """
    from userip_fast.jobs.profiles import export_profiles
    from userip_fast.model.fitted import Model

    fitted = Model.load(model, device=device)
    settings = settings_like(fitted, ctx.params)
    data = read_or_stream(ctx.params, settings)
    rule = settings.data.on_bad
    users = export_profiles(fitted, data, out, top=top, on_bad=rule, show=not quiet)
    say(f"{out}: profiles of {users:,} users")

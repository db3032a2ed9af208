"""`userip ctr`, `tune`, `explain`, `report`, `show`: what codes are worth, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from userip_fast.cli.flags import FORM, settings_of
from userip_fast.cli.log import names, read_log, settings_like
from userip_fast.cli.options import (
    DATA,
    EVALUATION,
    FIELDS,
    FILES,
    FROM,
    LOG,
    PROFILE,
    PROTOCOL,
    RUN,
    Run,
    said,
    takes,
)
from userip_fast.cli.shell import app, say
from userip_fast.ctr.config import CTRConfig


@app.command()
@takes(
    *LOG, "max_tokens", *PROTOCOL, "max_users", *PROFILE, "out", "estep", "behaviour_context",
    "rounds", *FROM, "quiet",
    max_users={"help": "Users on either side, at most, in hash order (all).", "panel": EVALUATION},
    out={"help": "Folder that gets ctr.json, and cells/ to go on from."},
)  # fmt: skip
def ctr(ctx: typer.Context, out: Path, quiet: bool) -> None:
    """Measure what the IDs add to recommenders, against what anyone would try without an LM.

    Splits the users into those from whom profiles are learned, those whose rows train recommenders,
    and new ones; trains torch-rechub's models and LightGBM with each feature, and writes AUC, log
    loss, intervals and paired tests to ctr.json. Stopped, it goes on where it was.
    """
    from userip_fast.ctr import evaluate_ctr

    settings, asked = settings_of(ctx.params), _protocol(ctx.params)
    data = read_log({**ctx.params, "max_users": None}, settings)
    from userip_fast.cli.terminal import print_ctr

    result = evaluate_ctr(data, ctr=asked, config=settings, out=out, show=not quiet)
    if not quiet:
        print_ctr(result)
        say(f"{out}: ctr.json")


def _protocol(params: Mapping[str, Any]) -> CTRConfig:
    given = {n: params[n] for n in ("max_users", *PROTOCOL) if params[n] is not None}
    for name in {"attributes", "features", "backbones"} & set(given):
        given[name] = names(given[name])
        if name != "attributes" and not given[name]:  # which may be none
            del given[name]
    return CTRConfig(**given)


@app.command()
@takes(
    *LOG, "max_tokens", *PROFILE, "seeds", "rounds", *FROM, "max_users", "out", "quiet",
    seeds={"kind": int, "help": "Runs per choice; two or more tell stability.", "default": 2,
           "panel": RUN},
    max_users={"kind": int, "help": "Users, in hash order.", "default": 600},
    out={"kind": Path | None, "help": "JSON file that gets the table.", "default": None},
)  # fmt: skip
def tune(
    ctx: typer.Context,
    seeds: int,
    out: Path | None,
    quiet: bool,
    codes: Annotated[
        str | None,
        said("Numbers of codes to try in every field (4 to 256, by the number of users).", FIELDS),
    ] = None,
    levels: Annotated[
        int, said("Fields of one prompt, at most: each begins at what those before leave.", FIELDS)
    ] = 1,
) -> None:
    """Compare numbers of codes, and fields, by users held out: likelihood, usage, stability."""
    settings = settings_of(ctx.params).override({"em.estep": "posterior"})
    sizes = None
    if codes is not None:
        numbers = [k.strip() for k in codes.split(",")]
        sizes = [int(k) if k.isdecimal() and len(k) < 10 else 0 for k in numbers]
    data = read_log(ctx.params, settings)
    from userip_fast.cli.terminal import print_choices
    from userip_fast.core.files import write_json
    from userip_fast.jobs.tune import Choice
    from userip_fast.jobs.tune import tune as run_tune

    judged: list[Choice] = []

    def keep(choice: Choice) -> None:
        judged.append(choice)
        judged.sort(key=lambda c: -c.elbo)
        if out is not None:
            write_json(out, [c.to_dict() for c in judged])

    try:
        run_tune(data, settings, sizes, levels=levels, seeds=seeds, show=not quiet, each=keep)
    finally:  # after an interrupt too, which may have cost an hour
        if judged:
            print_choices(judged)


@app.command()
@takes(*FILES, *FORM, "device", "max_users", "quiet")
def explain(
    ctx: typer.Context,
    run: Run,
    device: str | None,
    quiet: bool,
    users: Annotated[
        Path | None, said("Table of users with traits that the codes never saw.", DATA)
    ] = None,
    traits: Annotated[str | None, said("Its columns A,B (those of few values).", DATA)] = None,
    permutations: Annotated[int, said("For the p of an association.", RUN)] = 1000,
) -> None:
    """Explain the codes of a run: items, users who stand for them, association with traits.

    The codes are those of RUN/bank. Writes explain.json into the run and renews its report.
    """
    from userip_fast.bank import FeatureBank
    from userip_fast.jobs.explain import explain as run_explain
    from userip_fast.model.fitted import Model
    from userip_fast.report.write import report_run

    model = Model.load(run / "model", device=device)
    data = read_log(ctx.params, settings_like(model, ctx.params))
    bank = FeatureBank.open(run / "bank")
    found = run_explain(
        model, data, users, bank=bank, traits=names(traits), permutations=permutations, out=run,
        show=not quiet,
    )  # fmt: skip
    for field, by in found["associations"].items():
        for trait, a in by.items():
            say(
                f"{field} and {trait}: {a['bits']:.3f} bits, by chance {a['chance_bits']:.3f}, "
                f"p {a['p']:.3f} ({a['users']:,} users)"
            )
    say(f"{report_run(run)}: explained on {data.num_users:,} users")


@app.command()
def report(run: Run) -> None:
    """Write RUN/report.html anew from all that the run folder holds, ctr.json files included."""
    from userip_fast.report.write import report_run

    say(report_run(run))


@app.command()
def show(
    run: Run,
    users: Annotated[int, typer.Option(help="Users of the bank, in hash order.")] = 1000,
    items: Annotated[int, typer.Option(help="The most frequent items.")] = 3000,
    open: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Write RUN/explore.html: the report with a search over codes, items and users, in one file."""
    from userip_fast.report.show import show_run

    path = show_run(run, users=users, items=items)
    say(path)
    if open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())

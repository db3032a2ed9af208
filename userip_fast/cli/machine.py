"""`userip lm`, `doctor`, `env`: what runs here, and whether it is right."""

from __future__ import annotations

from typing import Annotated

import typer

from userip_fast.cli.flags import settings_of
from userip_fast.cli.options import takes
from userip_fast.cli.shell import app, die
from userip_fast.core.visible import visible


@app.command(name="lm")
@takes("quantization", "device", "verify", "set")
def describe_lm(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id or 'small'.")],
) -> None:
    """Say what a language model is, what of it is run, and how much memory and time it takes."""
    settings = settings_of({**ctx.params, "lm": path})
    from userip_fast.lm.describe import describe

    for name, value in describe(path, settings.lm):
        typer.echo(f"{name:12} {visible(value)}")


@app.command()
@takes(
    "lm", "quantization", "device", "verify", "seed", "set",
    seed={"kind": int, "help": "Of the random users.", "default": 0},
)  # fmt: skip
def doctor(ctx: typer.Context, seed: int) -> None:
    """Check packing and masks on your own LM: the packed engine against the plain model."""
    settings = settings_of(ctx.params)
    from userip_fast.cli.doctor import diagnose, load
    from userip_fast.cli.terminal import print_checks

    checks = diagnose(load(settings), seed=seed)
    print_checks(checks)
    if failed := sum(not c.passed for c in checks):
        die(f"{failed} of {len(checks)} checks failed on {settings.lm.path}", 1)


@app.command()
def env() -> None:
    """Print what this machine has and which implementation of each op it can run."""
    from userip_fast.cli.env import format_report

    print(format_report())

"""`userip bank ...`: look into a feature bank, and keep it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from userip_fast.cli.options import Bank, Keys, MaybeKeys, takes
from userip_fast.cli.shell import app, die, say

if TYPE_CHECKING:
    from userip_fast.bank.parquet import Best

banks = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(banks, name="bank", help="Look into a feature bank, and keep it.")


_MODEL = typer.Option("--model", help="Model folder of the bank, for --top.")
_TOP = typer.Option("--top", help="Best items of each user, so many, of a bank with profiles.")
Model = Annotated[Path | None, _MODEL]
Top = Annotated[int, _TOP]


@banks.command()
@takes("on_unknown", on_unknown={"help": "'error', or 'code': the reserved code of each field."})
def lookup(bank: Bank, users: Keys, on_unknown: str, model: Model = None, top: Top = 0) -> None:
    """Print the codes of users, and what they mean; of a bank with profiles their probabilities."""
    from userip_fast.bank import FeatureBank
    from userip_fast.cli.terminal import print_codes

    print_codes(FeatureBank.open(bank), users, on_unknown, _best(bank, model, top))


def _best(bank: Path, model: Path | None, top: int) -> Best | None:
    """Users' best items by the model's event table; None where none are asked for."""
    if (top == 0) != (model is None):
        die("--top N and --model MODEL go together: best items are the event table's answer", 2)
    if model is None:
        return None
    from userip_fast.serve import Server

    return Server.open(model, bank=bank, events=_events(bank)).best_items(top)


def _events(bank: Path) -> list[Path]:
    """What `infer` read into the event table of a model that is read-only."""
    beside = Path(f"{bank}.events")
    return [beside] if beside.is_dir() else []


@banks.command()
def export(
    bank: Bank,
    out: Annotated[Path | None, typer.Argument(help="File to write, .parquet or .csv.")] = None,
    layout: Annotated[
        str, typer.Option(help="Of a Parquet file: plain, or feast (with event_timestamp).")
    ] = "plain",
    redis: Annotated[
        str | None,
        typer.Option(
            help="Write to a Redis instead: redis://host:6379/0. A password is better given by "
            "USERIP_FAST_REDIS_URL with --redis env.",
        ),
    ] = None,
    namespace: Annotated[str, typer.Option(help="Prefix of the keys in Redis.")] = "userip",
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Feast and Redis: with those that the bank holds."),
    ] = False,
    model: Model = None,
    top: Top = 0,
) -> None:
    """Write a bank as one Parquet or CSV file, or into Redis: users and their codes.

    Plain files have everything that the bank holds. --top adds users' best items, made of the
    bank's profiles and the model's event table.
    """
    from userip_fast.bank import FeatureBank

    writers: dict[tuple[str, str], Callable[..., None]] = {
        ("plain", ".parquet"): FeatureBank.to_parquet,
        ("plain", ".csv"): FeatureBank.to_csv,
        ("feast", ".parquet"): partial(FeatureBank.to_feast, probabilities=probabilities),
    }
    if layout not in ("plain", "feast"):
        die(f"--layout {layout}: must be plain or feast", 2)
    if (out is None) == (redis is None):
        die("name either a file to write or --redis URL", 2)
    if out is not None and (layout, out.suffix.lower()) not in writers:
        ends = ".parquet" if layout == "feast" else ".parquet or .csv"
        die(f"{out}: with --layout {layout} its name must end in {ends}", 2)
    opened, best = FeatureBank.open(bank), _best(bank, model, top)
    where = str(out)
    if redis is not None:
        from userip_fast.bank.redis_export import export_redis, redacted

        url = os.environ.get("USERIP_FAST_REDIS_URL", "") if redis == "env" else redis
        version = export_redis(
            opened, url, namespace=namespace, probabilities=probabilities, best=best
        )
        where = f"{redacted(url)}, {namespace}:{version}"
    elif out is not None:
        writers[layout, out.suffix.lower()](opened, out, best=best)
    say(f"{where}: {len(opened):,} users, fields {[f['name'] for f in opened.fields]}")


@banks.command()
def merge(
    shards: Annotated[Path, typer.Argument(help="Folder that `infer --shard` wrote to.")],
    bank: Bank,
    update: Annotated[bool, typer.Option(help="Keep the bank's other users.")] = False,
) -> None:
    """Merge the files of all shards into one bank."""
    from userip_fast.jobs.shards import merge_shards

    say(f"{bank}: {len(merge_shards(shards, bank, update)):,} users")


@banks.command()
@takes("on_unknown", on_unknown={"help": "Users who are not in the bank: 'error' or 'skip'."})
def remove(
    bank: Bank,
    on_unknown: str,
    users: MaybeKeys = None,
    file: Annotated[
        Path | None, typer.Option(help="File of further user keys, one a line.")
    ] = None,
) -> None:
    """Remove users from a bank: its next generation is without them."""
    from userip_fast.bank import FeatureBank

    keys = list(users or [])
    if file is not None:
        try:
            keys += file.read_text(encoding="utf-8").splitlines()
        except ValueError as e:
            die(f"--file {file}: is not UTF-8 text ({e})", 2)
    if not keys:
        die("name users to remove, or a --file of them", 2)
    opened = FeatureBank.open(bank)
    left = opened.remove(opened.coerce_keys(keys), on_unknown)
    say(f"{bank}: {len(opened) - len(left):,} users removed, {len(left):,} left")


@banks.command()
def drift(
    old: Annotated[Path, typer.Argument(help="Bank folder, before.")],
    new: Annotated[Path, typer.Argument(help="Bank folder, after.")],
) -> None:
    """Print how far two banks are apart, as JSON: shares, users who changed, where they went."""
    import json

    from userip_fast.bank import FeatureBank
    from userip_fast.bank.drift import drift as compare

    say(json.dumps(compare(FeatureBank.open(old), FeatureBank.open(new)), indent=2))


@banks.command()
def info(bank: Bank) -> None:
    """Print what a bank holds and what it costs, as JSON."""
    import json

    from userip_fast.bank import FeatureBank

    say(json.dumps(FeatureBank.open(bank).info(), indent=2, ensure_ascii=False))


@banks.command()
def verify(bank: Bank) -> None:
    """Read the whole bank and check every checksum, key and code."""
    from userip_fast.bank import FeatureBank

    opened = FeatureBank.open(bank, verify=True)
    say(f"{bank}: {len(opened):,} users, every file as it was written")

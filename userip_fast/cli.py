"""`userip`: the main job and its tools on the command line.

Exit codes: 0 done; 1 `doctor` found a failure; 2 wrong use, bad input or bad
configuration, or a disk that cannot be written to, told in one message; 70 a bug, with a traceback
and how to report it, which nothing else shows; 130 interrupted (SIGINT or SIGTERM): the block of
users at hand was finished and kept, nothing is half-written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import traceback
from collections import namedtuple
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, overload

import typer
from typer.core import TyperGroup

from userip_fast._version import __version__
from userip_fast.errors import UserIPError
from userip_fast.interrupts import keep_interrupts
from userip_fast.visible import visible

if TYPE_CHECKING:
    from userip_fast.config import Config
    from userip_fast.data import Interactions, InteractionStream


class _Group(TyperGroup):
    """Turns whatever ends a command into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _die("interrupted; nothing half-written", 130)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()  # a full disk shows here at the latest
        except KeyboardInterrupt:  # before a command began
            code = 130
        except UserIPError as e:
            code = _tell(_as_typed(str(e), _flag_names(self)), 2)
        except MemoryError as e:
            code = _tell(f"out of memory ({e}): stream the log, or lower em.pack_tokens", 2)
        except OSError as e:  # of the system: a full disk behind standard output, a lost folder
            code = _tell(str(e), 2)
            _forget_output()
        except Exception as e:
            code = _wrong_use(e)
        sys.exit(code if isinstance(code, int) else 0)


def _flag_names(group: Any) -> dict[str, str]:
    """Argument -> flag, of all commands."""
    flags: dict[str, str] = {}
    for command in group.commands.values():
        if hasattr(command, "commands"):
            flags |= _flag_names(command)
        for parameter in command.params:
            if long := [name for name in parameter.opts if name.startswith("--")]:
                flags[parameter.name] = long[0]
    return flags


_ARGUMENT = re.compile(
    r"(?<![\w.\"'])(on_bad|on_unknown|out|encoding|sep|resume)=(?:'([^']*)'|\"([^\"]*)\"|True\b)"
)
_RULE = re.compile(r"(?<![\w.\"'-])(?:config\.)?(?:(data|lm|em)\.)?([a-z_]+)(?= must | needs )")
_TWICE = re.compile(r"(--[a-z-]+ \S+) \(\1\)")


def _as_typed(message: str, flags: Mapping[str, str]) -> str:
    """A message about arguments and settings in the words of the command line."""
    from userip_fast.flags import FLAGS

    def argument(found: re.Match[str]) -> str:
        value = found[2] or found[3] or ""
        return f"{flags[found[1]]} {value}".strip() if found[1] in flags else found[0]

    def rule(found: re.Match[str]) -> str:
        section, name = found[1], found[2]
        if section is None:
            return flags[name] if found.start() == 0 and name in flags else found[0]
        setting = f"{section}.{name}"
        flag = next((flag for flag, known in FLAGS.items() if known == setting), None)
        return setting if flag is None else f"{flags[flag]} ({setting})"

    return _TWICE.sub(r"\1", _RULE.sub(rule, _ARGUMENT.sub(argument, message)))


def _wrong_use(e: Exception) -> int:
    """Exit code of what the command line library found; anything else is raised again: a bug."""
    # By their looks: some versions of typer bring a click of their own.
    if type(e).__name__ == "NoArgsIsHelpError":
        e.show()  # type: ignore[attr-defined]
        return 2
    if hasattr(e, "format_message"):
        return _tell(" ".join(e.format_message().split()), 2)
    if type(e).__name__ == "Abort":
        return 130
    raise e


_BUG = (
    "this is a bug. Please report it with the lines above, the command, and what `userip env` "
    "prints, to whom you have userip_fast from"
)


def _tell(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # standard error may be gone too
        print(visible(f"userip: {message}"), file=sys.stderr)
    return code


def _forget_output() -> None:
    """Leaves nothing in standard output's buffer that would fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _die(message: str, code: int) -> NoReturn:
    raise typer.Exit(_tell(message, code))


def _say(text: object) -> None:
    print(visible(text))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


app = typer.Typer(
    name="userip",
    cls=_Group,
    help="Interaction logs to per-user collaborative IDs, through a frozen language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bank_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(bank_app, name="bank", help="Look into a feature bank, and keep it.")


def main() -> None:
    """Entry point of `userip`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_interrupts()
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(_tell(_BUG, 70))
    finally:
        # CPython remembers that one left an exec() of text (an import that makes a dataclass), even
        # if it was caught since, and `python -m` then dies of SIGINT, whatever its exit code. The
        # next evaluation of text, which is how a namedtuple is made, clears that.
        namedtuple("Cleared", ())


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("userip: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if version:
        print(__version__)
        raise typer.Exit


def _panel(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


_DATA, _TEXT, _FIELDS, _RUN = "Data", "Behaviour text and loss", "Profile and LM", "Run"
_EVAL = "Evaluation"

Log = Annotated[
    list[Path],
    _panel(
        _DATA,
        "Interactions: CSV, Parquet, JSON lines, packed by gzip or zstd, RecBole's .inter, a "
        "folder of such, or reviews.pickle; given more than once, one log.",
    ),
]
Items = Annotated[
    list[Path] | None,
    _panel(_DATA, "Item table; without it the text columns are in the interactions."),
]
Sep = Annotated[
    str | None, _panel(_DATA, "Between the columns of a CSV log, say ';' or '::' (found out).")
]
Encoding = Annotated[str | None, _panel(_DATA, "Of text files, say latin-1 (utf-8).")]
Header = Annotated[
    str | None, _panel(_DATA, "Columns A,B,... of a CSV log that has no header line.")
]
ItemsHeader = Annotated[str | None, _panel(_DATA, "The same for the item table.")]
User = Annotated[str | None, _panel(_DATA, "Column of user keys (user_id).")]
Item = Annotated[str | None, _panel(_DATA, "Column of item keys (item_id).")]
Rating = Annotated[str | None, _panel(_DATA, "Column of ratings, if there is one.")]
Time = Annotated[
    str | None, _panel(_DATA, "Column of times, if there is one: dates, or numbers since 1970.")
]
ItemText = Annotated[
    str | None,
    _panel(_DATA, "Item text ({title}), say '{title}[[ ({genres})]]'; [[...]] may vanish."),
]
Filter = Annotated[str | None, _panel(_DATA, "Rows to keep, for example 'not cancelled'.")]
OnBad = Annotated[str | None, _panel(_DATA, "Bad rows: error (refuse and list them) or skip.")]
MinHistory = Annotated[int | None, _panel(_DATA, "Fewest events of a user (1).")]
Stream = Annotated[
    Path | None,
    _panel(
        _DATA,
        "For a Parquet log larger than memory: folder to sort it in first, about as large; kept.",
    ),
]
MaxUsers = Annotated[int | None, _panel(_RUN, "Only so many users, in hash order.")]
Quiet = Annotated[bool, _panel(_RUN, "No progress and no table.", "--quiet", "-q")]
Device = Annotated[str | None, _panel(_FIELDS, "auto, cpu, cuda, cuda:1, ... (auto).")]
Template = Annotated[
    str | None,
    _panel(
        _FIELDS, "Ready-made fields: generic, paper, books, movies, grocery or gifts (generic)."
    ),
]
Lm = Annotated[
    str | None,
    _panel(
        _FIELDS,
        "Folder, GGUF file, hub id, 'small'; 'default': a Llama trained on this log.",
    ),
]
Settings = Annotated[
    list[str] | None, _panel(_RUN, "Any setting: em.lr=0.02, lm.dtype=bfloat16, ...")
]
Fields = Annotated[
    list[str] | None,
    _panel(
        _FIELDS,
        "NAME:PROMPT:CODES[:TOKENS[:WORD WORD ...]], once per field, for example "
        '"hobby:The user\'s hobby is:16:1:sports music".',
    ),
]
MaxTokens = Annotated[int | None, _panel(_TEXT, "Behaviour tokens per user (256).")]
ConfigFile = Annotated[
    Path | None, _panel(_RUN, "YAML or JSON file of settings; flags win over it.")
]
Probabilities = Annotated[
    bool, _panel(_RUN, "The bank keeps the probability of each code (posterior E-step).")
]
Verify = Annotated[
    bool | None,
    _panel(_FIELDS, "Read every byte of the LM again, whatever sums are kept.", "--verify"),
]
Quantization = Annotated[str | None, _panel(_FIELDS, "auto, none, nf4 or nf4-double (auto).")]


@app.command()
def demo(
    full: Annotated[bool, typer.Option("--full", help="Three seeds instead of one.")] = False,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the world, the LM and everything else.")] = 0,
) -> None:
    """Infer traits of a planted world's users and compare them with the truth. Minutes on a CPU."""
    from userip_fast.demo import run_demo
    from userip_fast.files import read_json
    from userip_fast.terminal import print_cards, print_scores

    metrics = run_demo(out=out, full=full, seed=seed, show=True)
    print_scores(metrics)
    print_cards(read_json(out / "model" / "codes.json"))
    _say(f"{out}: model, bank, metrics.json, report.html")


@app.command()
def fit(
    ctx: typer.Context,
    interactions: Log,
    out: Annotated[Path, _panel(_RUN, "Run folder: model/ bank/ metrics.json report.html ...")],
    items: Items = None,
    user: User = None,
    item: Item = None,
    rating: Rating = None,
    time: Time = None,
    text: ItemText = None,
    filter: Filter = None,
    sep: Sep = None,
    encoding: Encoding = None,
    header: Header = None,
    items_header: ItemsHeader = None,
    on_bad: OnBad = None,
    min_history: MinHistory = None,
    stream: Stream = None,
    behaviour: Annotated[
        str | None, _panel(_TEXT, "One event, say '{text}: {feedback}' (auto).")
    ] = None,
    separator: Annotated[str | None, _panel(_TEXT, "Text between events ('; ').")] = None,
    behaviour_context: Annotated[
        str | None, _panel(_TEXT, "sequence or independent (auto: by the E-step).")
    ] = None,
    max_tokens: MaxTokens = None,
    negatives: Annotated[
        int | None, _panel(_TEXT, "Items passed over per event of a log without ratings (0).")
    ] = None,
    loss: Annotated[
        str | None, _panel(_TEXT, "feedback, all, or weights TEXT,FEEDBACK such as 0.1,1 (auto).")
    ] = None,
    template: Template = None,
    field: Fields = None,
    lm: Lm = None,
    quantization: Quantization = None,
    device: Device = None,
    verify: Verify = None,
    estep: Annotated[
        str | None, _panel(_RUN, "posterior, amortised or gradient, as published (posterior).")
    ] = None,
    recipe: Annotated[str | None, _panel(_RUN, "userip, or paper, as published (userip).")] = None,
    rounds: Annotated[int | None, _panel(_RUN, "EM rounds, at most.")] = None,
    steps: Annotated[int | None, _panel(_RUN, "Adam steps of an E-step, at most.")] = None,
    seed: Annotated[int | None, _panel(_RUN, "A run repeats with its seed (0).")] = None,
    config: ConfigFile = None,
    set: Settings = None,
    max_users: MaxUsers = None,
    probabilities: Probabilities = False,
    like: Annotated[
        Path | None, _panel(_RUN, "Model folder of an earlier fit whose code numbers are kept.")
    ] = None,
    resume: Annotated[bool, _panel(_RUN, "Go on after the last checkpoint of --out.")] = False,
    quiet: Quiet = False,
) -> None:
    """Learn profile codebooks from an interaction log; write model, bank and report to --out."""
    from userip_fast.flags import settings_of

    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of torchrun's processes, one speaks
    settings = settings_of(ctx.params)
    data = _read(interactions, items, settings, max_users, quiet, stream)
    from userip_fast.api import Run
    from userip_fast.api import fit as run_fit
    from userip_fast.bank import FeatureBank
    from userip_fast.files import read_json
    from userip_fast.terminal import print_results

    model = run_fit(
        data,
        config=settings,
        out=out,
        resume=resume,
        probabilities=probabilities,
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
def infer(
    ctx: typer.Context,
    model: Annotated[Path, _panel(_RUN, "Model folder that fit wrote, RUN/model.")],
    interactions: Log,
    out: Annotated[Path, _panel(_RUN, "Bank folder.")],
    items: Items = None,
    user: User = None,
    item: Item = None,
    rating: Rating = None,
    time: Time = None,
    text: ItemText = None,
    filter: Filter = None,
    sep: Sep = None,
    encoding: Encoding = None,
    header: Header = None,
    items_header: ItemsHeader = None,
    on_bad: OnBad = None,
    min_history: MinHistory = None,
    stream: Stream = None,
    shard: Annotated[
        str | None,
        _panel(_RUN, "I/N: only this share of the users, as a file in the folder --out."),
    ] = None,
    update: Annotated[
        bool, _panel(_RUN, "Keep the bank's other users instead of replacing all.")
    ] = False,
    device: Device = None,
    verify: Verify = None,
    max_users: MaxUsers = None,
    probabilities: Probabilities = False,
    quiet: Quiet = False,
) -> None:
    """Read users' codes with a fitted model; write a bank of exactly these users.

    After an interrupt or a kill the same command goes on after the last finished block of users.
    Column names, text, filter and rules default to those the model was fitted with.
    """
    from userip_fast.bank import FeatureBank
    from userip_fast.flags import FORM_OF_FILES, flag_values
    from userip_fast.model import Model
    from userip_fast.terminal import print_results

    fitted = Model.load(model, device=device, verify=bool(verify))
    settings = fitted.config.override({**FORM_OF_FILES, **flag_values(ctx.params)})
    data = _read(interactions, items, settings, max_users, quiet, stream)
    if shard is not None:
        if probabilities:
            _die("--probabilities is not kept by --shard files; infer without --shard", 2)
        from userip_fast.shards import infer_shard, parse_shard

        rule = settings.data.on_bad
        file = infer_shard(fitted, data, *parse_shard(shard), out, on_bad=rule, show=not quiet)
        _say(f"{file}: done")
        return
    found: dict[str, Any] = {}
    started = monotonic()
    fitted.infer(
        data,
        out,
        on_bad=settings.data.on_bad,
        update=update,
        probabilities=probabilities,
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
def profiles(
    ctx: typer.Context,
    model: Annotated[Path, _panel(_RUN, "Model folder that fit wrote, RUN/model.")],
    interactions: Log,
    out: Annotated[Path, _panel(_RUN, "Parquet file that gets the profiles.")],
    items: Items = None,
    user: User = None,
    item: Item = None,
    rating: Rating = None,
    time: Time = None,
    text: ItemText = None,
    filter: Filter = None,
    sep: Sep = None,
    encoding: Encoding = None,
    header: Header = None,
    items_header: ItemsHeader = None,
    on_bad: OnBad = None,
    min_history: MinHistory = None,
    stream: Stream = None,
    top: Annotated[int, _panel(_RUN, "Best items of each user, so many.")] = 0,
    device: Device = None,
    max_users: MaxUsers = None,
    quiet: Quiet = False,
) -> None:
    """Write users' codes, the probabilities of all codes, and their best items as a table.

    What a recommender takes beside the codes; a bank holds codes alone.
    """
    from userip_fast.flags import FORM_OF_FILES, flag_values
    from userip_fast.model import Model
    from userip_fast.profile_export import export_profiles

    fitted = Model.load(model, device=device)
    settings = fitted.config.override({**FORM_OF_FILES, **flag_values(ctx.params)})
    data = _read(interactions, items, settings, max_users, quiet, stream)
    rule = settings.data.on_bad
    users = export_profiles(fitted, data, out, top=top, on_bad=rule, show=not quiet)
    _say(f"{out}: profiles of {users:,} users")


@app.command()
def ctr(
    ctx: typer.Context,
    interactions: Log,
    out: Annotated[Path, _panel(_RUN, "Folder that gets ctr.json, and cells/ to go on from.")],
    items: Items = None,
    user: User = None,
    item: Item = None,
    rating: Rating = None,
    time: Time = None,
    text: ItemText = None,
    filter: Filter = None,
    sep: Sep = None,
    encoding: Encoding = None,
    header: Header = None,
    items_header: ItemsHeader = None,
    on_bad: OnBad = None,
    min_history: MinHistory = None,
    max_tokens: MaxTokens = None,
    protocol: Annotated[str, _panel(_EVAL, "new-users, cold or warm.")] = "new-users",
    first: Annotated[int, _panel(_EVAL, "new-users: events that give a profile.")] = 10,
    seeds: Annotated[int, _panel(_EVAL, "Trainings of codes and recommenders.")] = 2,
    label: Annotated[
        str | None,
        _panel(
            _EVAL, "'rating>=Q' (above the training median), or 'chosen' against sampled items."
        ),
    ] = None,
    attributes: Annotated[
        str | None, _panel(_EVAL, "Item columns A,B (those of text whose values recur).")
    ] = None,
    features: Annotated[
        str | None, _panel(_EVAL, "User features A,B,... (all but random and paper).")
    ] = None,
    backbones: Annotated[
        str | None,
        _panel(_EVAL, "Of dcn,dcnv2,deepfm,autoint,lr,lightgbm (dcn,deepfm,lightgbm)."),
    ] = None,
    rows_per_user: Annotated[int, _panel(_EVAL, "Rows of a user, at most.")] = 40,
    hold_items: Annotated[
        float, _panel(_EVAL, "Share of the items that nothing but test rows knows.")
    ] = 0.0,
    user_statistics: Annotated[
        bool, _panel(_EVAL, "Statistics of the user beside every feature.")
    ] = True,
    damage: Annotated[str, _panel(_EVAL, "To test histories: drop:P, noise:P or shuffle.")] = "",
    period: Annotated[
        str, _panel(_EVAL, "earlier: learn profiles on the log's earlier half.")
    ] = "same",
    template: Template = None,
    field: Fields = None,
    lm: Lm = None,
    quantization: Quantization = None,
    device: Device = None,
    estep: Annotated[
        str | None, _panel(_RUN, "gradient, posterior or amortised (posterior).")
    ] = None,
    behaviour_context: Annotated[
        str | None, _panel(_TEXT, "sequence or independent (independent).")
    ] = None,
    rounds: Annotated[int | None, _panel(_RUN, "EM rounds, at most (1).")] = None,
    config: ConfigFile = None,
    set: Settings = None,
    max_users: Annotated[
        int | None, _panel(_EVAL, "Users on either side, at most, in hash order (all).")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure what the IDs add to recommenders, against what anyone would try without an LM.

    Splits the users into those from whom profiles are learned, those whose rows train recommenders,
    and new ones; trains torch-rechub's models and LightGBM with each feature, and writes AUC, log
    loss, intervals and paired tests to ctr.json. Stopped, it goes on where it was.
    """
    from userip_fast.ctr import (
        DEFAULT_BACKBONES,
        DEFAULT_FEATURES,
        PROFILES,
        CTRConfig,
        evaluate_ctr,
    )
    from userip_fast.flags import settings_of

    settings = settings_of(ctx.params, PROFILES)
    ctr_settings = CTRConfig(
        protocol=protocol,  # type: ignore[arg-type]  # checked when made
        first=first,
        label=label,
        attributes=_names(attributes),
        features=_names(features) or DEFAULT_FEATURES,
        backbones=_names(backbones) or DEFAULT_BACKBONES,
        seeds=seeds,
        max_users=max_users,
        rows_per_user=rows_per_user,
        hold_items=hold_items,
        user_statistics=user_statistics,
        damage=damage,
        period=period,  # type: ignore[arg-type]
    )
    data = _read(interactions, items, settings, None, quiet, None)
    from userip_fast.terminal import print_ctr

    result = evaluate_ctr(data, ctr=ctr_settings, config=settings, out=out, show=not quiet)
    if not quiet:
        print_ctr(result)
        _say(f"{out}: ctr.json")


@app.command()
def tune(
    ctx: typer.Context,
    interactions: Log,
    items: Items = None,
    user: User = None,
    item: Item = None,
    rating: Rating = None,
    time: Time = None,
    text: ItemText = None,
    filter: Filter = None,
    sep: Sep = None,
    encoding: Encoding = None,
    header: Header = None,
    items_header: ItemsHeader = None,
    on_bad: OnBad = None,
    min_history: MinHistory = None,
    max_tokens: MaxTokens = None,
    codes: Annotated[str, _panel(_FIELDS, "Numbers of codes to try in every field.")] = "4,8,16",
    seeds: Annotated[int, _panel(_RUN, "Runs per choice; two or more tell stability.")] = 2,
    template: Template = None,
    field: Fields = None,
    lm: Lm = None,
    quantization: Quantization = None,
    device: Device = None,
    rounds: Annotated[int | None, _panel(_RUN, "EM rounds, at most.")] = None,
    config: ConfigFile = None,
    set: Settings = None,
    max_users: Annotated[int, _panel(_RUN, "Users, in hash order.")] = 600,
    out: Annotated[Path | None, _panel(_RUN, "JSON file that gets the table.")] = None,
    quiet: Quiet = False,
) -> None:
    """Compare numbers of codes, and fields, by users held out: likelihood, usage, stability."""
    from userip_fast.flags import settings_of

    settings = settings_of(ctx.params).override({"em.estep": "posterior"})
    numbers = [k.strip() for k in codes.split(",")]
    sizes = [int(k) if k.isdecimal() and len(k) < 10 else 0 for k in numbers]
    data = _read(interactions, items, settings, max_users, quiet, None)
    from userip_fast.files import write_json
    from userip_fast.terminal import print_choices
    from userip_fast.tune import Choice
    from userip_fast.tune import tune as run_tune

    judged: list[Choice] = []

    def keep(choice: Choice) -> None:
        judged.append(choice)
        judged.sort(key=lambda c: -c.elbo)
        if out is not None:
            write_json(out, [c.to_dict() for c in judged])

    try:
        run_tune(data, settings, sizes, seeds=seeds, show=not quiet, each=keep)
    finally:  # after an interrupt too, which may have cost an hour
        if judged:
            print_choices(judged)


@app.command()
def explain(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="Run folder of fit.")],
    interactions: Log,
    items: Items = None,
    sep: Sep = None,
    encoding: Encoding = None,
    header: Header = None,
    items_header: ItemsHeader = None,
    users: Annotated[
        Path | None, _panel(_DATA, "Table of users with traits that the codes never saw.")
    ] = None,
    traits: Annotated[str | None, _panel(_DATA, "Its columns A,B (those of few values).")] = None,
    permutations: Annotated[int, _panel(_RUN, "For the p of an association.")] = 1000,
    device: Device = None,
    max_users: MaxUsers = None,
    quiet: Quiet = False,
) -> None:
    """Explain the codes of a run: items, users who stand for them, association with traits.

    The codes are those of RUN/bank. Writes explain.json into the run and renews its report.
    """
    from userip_fast.bank import FeatureBank
    from userip_fast.explain import explain as run_explain
    from userip_fast.flags import FORM_OF_FILES, flag_values
    from userip_fast.model import Model
    from userip_fast.report import report_run

    model = Model.load(run / "model", device=device)
    settings = model.config.override({**FORM_OF_FILES, **flag_values(ctx.params)})
    data = _read(interactions, items, settings, max_users, quiet, None)
    bank = FeatureBank.open(run / "bank")
    found = run_explain(
        model, data, users, bank=bank, traits=_names(traits), permutations=permutations, out=run,
        show=not quiet,
    )  # fmt: skip
    for field, by in found["associations"].items():
        for trait, a in by.items():
            _say(
                f"{field} and {trait}: {a['bits']:.3f} bits, by chance {a['chance_bits']:.3f}, "
                f"p {a['p']:.3f} ({a['users']:,} users)"
            )
    _say(f"{report_run(run)}: explained on {data.num_users:,} users")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder of fit.")]) -> None:
    """Write RUN/report.html anew from all that the run folder holds, ctr.json files included."""
    from userip_fast.report import report_run

    _say(report_run(run))


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Run folder of fit.")],
    users: Annotated[int, typer.Option(help="Users of the bank, in hash order.")] = 1000,
    items: Annotated[int, typer.Option(help="The most frequent items.")] = 3000,
    open: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Write RUN/explore.html: the report with a search over codes, items and users, in one file."""
    from userip_fast.show import show_run

    path = show_run(run, users=users, items=items)
    _say(path)
    if open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(n.strip() for n in text.split(",") if n.strip())


@overload
def _read(
    interactions: list[Path],
    items: list[Path] | None,
    settings: Config,
    max_users: int | None,
    quiet: bool,
    stream: None,
) -> Interactions: ...


@overload
def _read(
    interactions: list[Path],
    items: list[Path] | None,
    settings: Config,
    max_users: int | None,
    quiet: bool,
    stream: Path | None,
) -> Interactions | InteractionStream: ...


def _read(
    interactions: list[Path],
    items: list[Path] | None,
    settings: Config,
    max_users: int | None,
    quiet: bool,
    stream: Path | None,
) -> Interactions | InteractionStream:
    from userip_fast.data import read_interactions, stream_interactions

    d = settings.data
    read = read_interactions if stream is None else partial(stream_interactions, work=stream)
    data = read(
        _one_or_all(interactions),
        _one_or_all(items) if items else None,
        user=d.user,
        item=d.item,
        rating=d.rating,
        time=d.time,
        text=d.text,
        filter=d.filter,
        sep=d.sep,
        encoding=d.encoding,
        header=d.header,
        items_header=d.items_header,
        on_bad=d.on_bad,
        min_history=d.min_history,
        seed=settings.em.seed,
    )
    if not quiet:
        report = data.report
        if report.rows_bad or report.rows_filtered or report.short_users:
            _say(report.table())
        if data.rating_note:
            _say(data.rating_note)
    return data if max_users is None else data.head_users(max_users)


def _one_or_all(paths: list[Path]) -> Path | list[Path]:
    return paths[0] if len(paths) == 1 else paths


@app.command(name="lm")
def describe_lm(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id or 'small'.")],
    quantization: Quantization = None,
    device: Device = None,
    verify: Verify = None,
    set: Settings = None,
) -> None:
    """Say what a language model is, what of it is run, and how much memory and time it takes."""
    from userip_fast.flags import settings_of

    settings = settings_of({**ctx.params, "lm": path})
    from userip_fast.lm.describe import describe
    from userip_fast.visible import visible

    for name, value in describe(path, settings.lm):
        typer.echo(f"{name:12} {visible(value)}")


@app.command()
def doctor(
    ctx: typer.Context,
    lm: Lm = "default",
    quantization: Quantization = None,
    device: Device = None,
    verify: Verify = None,
    seed: Annotated[int, _panel(_RUN, "Of the random users.")] = 0,
    set: Settings = None,
) -> None:
    """Check packing and masks on your own LM: the packed engine against the plain model."""
    from userip_fast.flags import settings_of

    settings = settings_of(ctx.params)
    from userip_fast.doctor import diagnose, load
    from userip_fast.terminal import print_checks

    checks = diagnose(load(settings), seed=seed)
    print_checks(checks)
    if failed := sum(not c.passed for c in checks):
        _die(f"{failed} of {len(checks)} checks failed on {lm}", 1)


@bank_app.command()
def lookup(
    bank: Annotated[Path, typer.Argument(help="Bank folder.")],
    users: Annotated[list[str], typer.Argument(help="User keys; after -- where one begins with -")],
    on_unknown: Annotated[
        str, typer.Option(help="'error', or 'code': the reserved code of each field.")
    ] = "error",
) -> None:
    """Print the codes of users, and what they mean."""
    from userip_fast.bank import FeatureBank
    from userip_fast.terminal import print_codes

    print_codes(FeatureBank.open(bank), users, on_unknown)


@bank_app.command()
def export(
    bank: Annotated[Path, typer.Argument(help="Bank folder.")],
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
) -> None:
    """Write a bank as one Parquet or CSV file (user_id, codes of each field), or into Redis."""
    from userip_fast.bank import FeatureBank

    writers = {
        ("plain", ".parquet"): FeatureBank.to_parquet,
        ("plain", ".csv"): FeatureBank.to_csv,
        ("feast", ".parquet"): FeatureBank.to_feast,
    }
    if layout not in ("plain", "feast"):
        _die(f"--layout {layout}: must be plain or feast", 2)
    if (out is None) == (redis is None):
        _die("name either a file to write or --redis URL", 2)
    if out is not None and (layout, out.suffix.lower()) not in writers:
        ends = ".parquet" if layout == "feast" else ".parquet or .csv"
        _die(f"{out}: with --layout {layout} its name must end in {ends}", 2)
    opened = FeatureBank.open(bank)
    where = str(out)
    if redis is not None:
        from userip_fast.bank.redis_export import export_redis, redacted

        url = os.environ.get("USERIP_FAST_REDIS_URL", "") if redis == "env" else redis
        version = export_redis(opened, url, namespace=namespace)
        where = f"{redacted(url)}, {namespace}:{version}"
    elif out is not None:
        writers[layout, out.suffix.lower()](opened, out)
    _say(f"{where}: {len(opened):,} users, fields {[f['name'] for f in opened.fields]}")


@bank_app.command()
def merge(
    shards: Annotated[Path, typer.Argument(help="Folder that `infer --shard` wrote to.")],
    bank: Annotated[Path, typer.Argument(help="Bank folder.")],
    update: Annotated[bool, typer.Option(help="Keep the bank's other users.")] = False,
) -> None:
    """Merge the files of all shards into one bank."""
    from userip_fast.shards import merge_shards

    _say(f"{bank}: {len(merge_shards(shards, bank, update)):,} users")


@bank_app.command()
def remove(
    bank: Annotated[Path, typer.Argument(help="Bank folder.")],
    users: Annotated[
        list[str] | None, typer.Argument(help="User keys; after -- where one begins with -")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="File of further user keys, one a line.")
    ] = None,
    on_unknown: Annotated[
        str, typer.Option(help="Users who are not in the bank: 'error' or 'skip'.")
    ] = "error",
) -> None:
    """Remove users from a bank: its next generation is without them."""
    from userip_fast.bank import FeatureBank

    keys = list(users or [])
    if file is not None:
        try:
            keys += file.read_text(encoding="utf-8").splitlines()
        except ValueError as e:
            _die(f"--file {file}: is not UTF-8 text ({e})", 2)
    if not keys:
        _die("name users to remove, or a --file of them", 2)
    opened = FeatureBank.open(bank)
    left = opened.remove(opened.coerce_keys(keys), on_unknown)
    _say(f"{bank}: {len(opened) - len(left):,} users removed, {len(left):,} left")


@bank_app.command()
def drift(
    old: Annotated[Path, typer.Argument(help="Bank folder, before.")],
    new: Annotated[Path, typer.Argument(help="Bank folder, after.")],
) -> None:
    """Print how far two banks are apart, as JSON: shares, users who changed, where they went."""
    import json

    from userip_fast.bank import FeatureBank
    from userip_fast.bank.drift import drift as compare

    _say(json.dumps(compare(FeatureBank.open(old), FeatureBank.open(new)), indent=2))


@bank_app.command()
def info(bank: Annotated[Path, typer.Argument(help="Bank folder.")]) -> None:
    """Print what a bank holds and what it costs, as JSON."""
    import json

    from userip_fast.bank import FeatureBank

    _say(json.dumps(FeatureBank.open(bank).info(), indent=2, ensure_ascii=False))


@bank_app.command()
def verify(bank: Annotated[Path, typer.Argument(help="Bank folder.")]) -> None:
    """Read the whole bank and check every checksum, key and code."""
    from userip_fast.bank import FeatureBank

    opened = FeatureBank.open(bank, verify=True)
    _say(f"{bank}: {len(opened):,} users, every file as it was written")


@app.command()
def env() -> None:
    """Print what this machine has and which implementation of each op it can run."""
    from userip_fast.env import format_report

    print(format_report())


if __name__ == "__main__":
    main()

"""Every flag of the command line, written once; a command takes its own by name.

The flag of a setting is declared with the setting, in `userip_fast.core.config` and
`userip_fast.ctr.config`; what is no setting (files, folders, what is shown) is in `OPTIONS`. What
one command alone has stands in its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from userip_fast.cli.flags import FORM, SETTINGS
from userip_fast.core.fields import TEMPLATES
from userip_fast.core.settings import Flag, flags_of
from userip_fast.ctr.config import CTRConfig

DATA, TEXT, FIELDS, RUN = "Data", "Behaviour text and loss", "Profile and LM", "Run"
EVALUATION = "Evaluation"

FILES = ("interactions", "items")
LOG = (
    *FILES, "user", "item", "rating", "time", "text", "filter", *FORM, "on_bad", "min_history",
)  # fmt: skip
TOLD = ("behaviour", "separator", "behaviour_context", "max_tokens", "negatives", "loss")
PROFILE = ("template", "field", "lm", "quantization", "device")
EM = ("estep", "recipe", "rounds", "steps", "seed")
FROM = ("config", "set")
PROTOCOL = {flag.name: flag for flag in flags_of(CTRConfig)}

_PANELS = {
    **dict.fromkeys(LOG, DATA),
    **dict.fromkeys(TOLD, TEXT),
    **dict.fromkeys((*PROFILE, "verify"), FIELDS),
    **dict.fromkeys(EM, RUN),
    **dict.fromkeys(PROTOCOL, EVALUATION),
}


@dataclass(frozen=True)
class Option:
    """A flag.

    Attributes:
        kind: Type of its value, with None where it need not be given.
        panel: The part of `--help` that shows it; None is the one of typer.
        default: `...` where it must be given.
        names: Flags, where typer would make others of its name.
    """

    kind: Any
    help: str
    panel: str | None = RUN
    default: Any = None
    names: tuple[str, ...] = ()

    def parameter(self, name: str) -> inspect.Parameter:
        """What stands for it in the signature of a command."""
        told = typer.Option(*self.names, help=self.help, rich_help_panel=self.panel)
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if self.default is ... else self.default,
            annotation=Annotated[self.kind, told],
        )


def _of_setting(flag: Flag) -> Option:
    # None, so that a flag which is not given leaves the setting as a file or a model has it.
    names = (f"--{flag.name.replace('_', '-')}",) if flag.default is False else ()
    return Option(flag.kind | None, flag.help, _PANELS[flag.name], names=names)


OPTIONS: Mapping[str, Option] = {
    **{name: _of_setting(flag) for name, flag in PROTOCOL.items()},
    **{name: _of_setting(flag) for name, (_, flag) in SETTINGS.items()},
    "interactions": Option(
        list[Path],
        "Interactions: CSV, Parquet, JSON lines, packed by gzip or zstd, RecBole's .inter, a "
        "folder of such, or reviews.pickle; given more than once, one log.",
        DATA,
        ...,
    ),
    "items": Option(
        list[Path] | None, "Item table; without it the text columns are in the interactions.", DATA
    ),
    "stream": Option(
        Path | None,
        "For a Parquet log larger than memory: folder to sort it in first, about as large; kept.",
        DATA,
    ),
    "template": Option(
        str | None, f"Ready-made fields: {', '.join(TEMPLATES)} (generic).", FIELDS
    ),
    "field": Option(
        list[str] | None,
        "NAME:PROMPT:CODES[:TOKENS[:WORD WORD ...]], once per field, for example "
        '"hobby:The user\'s hobby is:16:1:sports music".',
        FIELDS,
    ),
    "model": Option(Path, "Model folder that fit wrote, RUN/model.", default=...),
    "out": Option(Path, "", default=...),  # each command writes something else
    "config": Option(Path | None, "YAML or JSON file of settings; flags win over it."),
    "set": Option(list[str] | None, "Any setting: em.lr=0.02, lm.dtype=bfloat16, ..."),
    "max_users": Option(int | None, "Only so many users, in hash order."),
    "probabilities": Option(
        bool, "The bank keeps the probability of each code (posterior E-step).", default=False
    ),
    "profiles": Option(
        bool, "The bank keeps the probabilities of all codes: exports and serving make affinities "
        "of them.", default=False
    ),
    "quiet": Option(
        bool, "No progress and no table.", default=False, names=("--quiet", "-q")
    ),
    "on_unknown": Option(str, "", None, "error"),  # what else there is, the command says
}  # fmt: skip


def said(help: str, panel: str) -> Any:
    """An option that one command alone has, for its signature."""
    return typer.Option(help=help, rich_help_panel=panel)


Run = Annotated[Path, typer.Argument(help="Run folder of fit.")]
Bank = Annotated[Path, typer.Argument(help="Bank folder.")]
_KEYS = typer.Argument(help="User keys; after -- where one begins with -")
Keys = Annotated[list[str], _KEYS]
MaybeKeys = Annotated[list[str] | None, _KEYS]


def takes(
    *names: str, **differs: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command some of `OPTIONS`, before those that are in its own signature.

    It finds their values in `ctx.params`; those that its signature names, without saying what they
    are, are handed to it as well.

    Args:
        names: In the order of `--help`.
        differs: What is different with this command, by attribute of `Option`.
    """
    options = {name: replace(OPTIONS[name], **differs.get(name, {})) for name in names}

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        named = inspect.signature(command, eval_str=True).parameters
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in named.values()
            if p.name not in options
        ]
        every = [*(option.parameter(name) for name, option in options.items()), *own]

        @wraps(command)
        def run(**values: Any) -> None:
            command(**{name: value for name, value in values.items() if name in named})

        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        return run

    return with_options

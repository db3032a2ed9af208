"""What ends a command becomes a message and an exit code: the application, and how it is run."""

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
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from userip_fast._version import __version__
from userip_fast.cli.flags import FLAGS
from userip_fast.core.errors import UserIPError
from userip_fast.core.interrupts import keep_interrupts
from userip_fast.core.visible import visible


class Group(TyperGroup):
    """Turns whatever ends a command into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            die("interrupted; nothing half-written", 130)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()  # a full disk shows here at the latest
        except KeyboardInterrupt:  # before a command began
            code = 130
        except UserIPError as e:
            code = tell(as_typed(str(e), flag_names(self)), 2)
        except MemoryError as e:
            code = tell(f"out of memory ({e}): stream the log, or lower em.pack_tokens", 2)
        except OSError as e:  # of the system: a full disk behind standard output, a lost folder
            code = tell(str(e), 2)
            forget_output()
        except Exception as e:
            code = wrong_use(e)
        sys.exit(code if isinstance(code, int) else 0)


def flag_names(group: Any) -> dict[str, str]:
    """Argument -> flag, of all commands."""
    flags: dict[str, str] = {}
    for command in group.commands.values():
        if hasattr(command, "commands"):
            flags |= flag_names(command)
        for parameter in command.params:
            if long := [name for name in parameter.opts if name.startswith("--")]:
                flags[parameter.name] = long[0]
    return flags


_ARGUMENT = re.compile(
    r"(?<![\w.\"'])(on_bad|on_unknown|out|encoding|sep|resume)=(?:'([^']*)'|\"([^\"]*)\"|True\b)"
)
_RULE = re.compile(r"(?<![\w.\"'-])(?:config\.)?(?:(data|lm|em)\.)?([a-z_]+)(?= must | needs )")
_TWICE = re.compile(r"(--[a-z-]+ \S+) \(\1\)")


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """A message about arguments and settings in the words of the command line."""

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


def wrong_use(e: Exception) -> int:
    """Exit code of what the command line library found; anything else is raised again: a bug."""
    # By their looks: some versions of typer bring a click of their own.
    if type(e).__name__ == "NoArgsIsHelpError":
        e.show()  # type: ignore[attr-defined]
        return 2
    if hasattr(e, "format_message"):
        return tell(" ".join(e.format_message().split()), 2)
    if type(e).__name__ == "Abort":
        return 130
    raise e


_BUG = (
    "this is a bug. Please report it with the lines above, the command, and what `userip env` "
    "prints, to whom you have userip_fast from"
)


def tell(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # standard error may be gone too
        print(visible(f"userip: {message}"), file=sys.stderr)
    return code


def forget_output() -> None:
    """Leaves nothing in standard output's buffer that would fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def die(message: str, code: int) -> NoReturn:
    raise typer.Exit(tell(message, code))


def say(text: object) -> None:
    print(visible(text))


class Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


app = typer.Typer(
    name="userip",
    cls=Group,
    help="Interaction logs to per-user collaborative IDs, through a frozen language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Entry point of `userip`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_interrupts()
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(tell(_BUG, 70))
    finally:
        # CPython remembers that one left an exec() of text (an import that makes a dataclass), even
        # if it was caught since, and `python -m` then dies of SIGINT, whatever its exit code. The
        # next evaluation of text, which is how a namedtuple is made, clears that.
        namedtuple("Cleared", ())


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("userip: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if version:
        print(__version__)
        raise typer.Exit

"""A setting and a flag are written once: what the command line says is what the settings say."""

import ast
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command

from userip_fast import cli
from userip_fast.cli.flags import SETTINGS
from userip_fast.cli.options import OPTIONS, PROTOCOL
from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError
from userip_fast.core.settings import POSITIVE, Flag, Rule, check, flags_of, setting


@dataclass(frozen=True)
class Example:
    speed: float | None = setting(None, "As fast as that.", POSITIVE)
    seed: int = setting(0, "Of all.", flag="start")
    words: str = setting(" ", "Between.", Rule("blank", lambda x: not x.strip()))
    safe: bool = setting(False, "On the safe side.")
    every: str | int = setting("all", "all, 1, 2, ...")
    silent: int = setting(3, rule=POSITIVE)


def test_a_flag_is_what_its_field_says():
    assert flags_of(Example) == [
        Flag("speed", "speed", float, "As fast as that.", None),
        Flag("start", "seed", int, "Of all (0).", 0),
        Flag("words", "words", str, "Between (' ').", " "),
        Flag("safe", "safe", bool, "On the safe side.", False),
        Flag("every", "every", str, "all, 1, 2, ... (all).", "all"),
    ]


def test_rules_are_told_by_name():
    check(Example(), "example.")
    with pytest.raises(ConfigError, match=r"^example\.speed must be positive, is 0$"):
        check(Example(speed=0), "example.")
    with pytest.raises(ConfigError, match=r"^example\.words must be blank, is 'x'$"):
        check(Example(words="x"), "example.")


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_every_setting_with_help_is_a_flag_of_some_command():
    flags = {p.name for _, command in commands(get_command(cli.app)) for p in command.params}
    assert set(SETTINGS) | set(PROTOCOL) <= flags
    known = Config().to_dict()
    for setting_, flag in SETTINGS.values():
        section, _, name = setting_.partition(".")
        assert known[section][name] == flag.default


def test_a_flag_that_is_not_given_leaves_a_setting_alone():
    for name, command in commands(get_command(cli.app)):
        for p in command.params:
            if p.name in SETTINGS and (name, p.name) not in {("demo", "seed"), ("doctor", "seed")}:
                assert p.default is None, (name, p.name)


def test_no_flag_is_written_twice():
    """A command's signature has what it alone takes, but for names that mean another thing there:
    users and items that `show` counts, what `infer` and `bank merge` update, and probabilities that
    `bank export` writes."""
    own = Counter()
    for file in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "command" in ast.unparse(d) for d in node.decorator_list
            ):
                arguments = (*node.args.args, *node.args.kwonlyargs)
                own.update(
                    a.arg
                    for a in arguments
                    if re.search(r"typer\.Option|said\(", ast.unparse(a.annotation))
                )
    assert {"like", "shard", "codes", "layout"} <= set(own)
    assert {name for name, n in own.items() if n + (name in OPTIONS) > 1} == {
        "users", "items", "update", "probabilities",
    }  # fmt: skip

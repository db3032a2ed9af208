"""What a setting is: a field of a frozen dataclass, with its rule and its flag, read from anywhere.

`setting` declares one: type and default as of any field, the rule that its value keeps, and the
line that the command line says of it. `build` makes such a dataclass of nested mappings, as YAML,
JSON and flags give them: unknown keys are refused, values coerced by the field's type (PyYAML reads
`1e-2` as a string). `check` holds it to its rules.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

from userip_fast.core.errors import ConfigError, shown

T = TypeVar("T")

MAX_BYTES = 1 << 20
"""Of YAML and JSON files of settings."""
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test; None, of a type with it, is always right."""

    says: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    return Rule(f"at least {least}", lambda x: bool(x >= least))


POSITIVE = Rule("positive", lambda x: bool(x > 0))
NOT_NEGATIVE = Rule("0 or more", lambda x: bool(x >= 0))


@dataclass(frozen=True)
class Flag:
    """A setting on the command line, as a parameter there.

    Attributes:
        name: Of the parameter; `max_tokens` is the flag `--max-tokens`.
        setting: Of the field.
        kind: bool, int, float or str; of the other types a flag gives the text.
        help: With what None or the default stands for.
        default: The setting's own.
    """

    name: str
    setting: str
    kind: type
    help: str
    default: Any


def setting(default: Any, help: str = "", rule: Rule | None = None, *, flag: str = "") -> Any:
    """A field of a dataclass of settings.

    Args:
        help: One line for the flag; the default is told behind it. Without it there is no flag.
        rule: What every value must be.
        flag: Its name where that is not the field's.
    """
    return dataclasses.field(default=default, metadata={"help": help, "rule": rule, "flag": flag})


def require(ok: bool, name: str, rule: str, value: object) -> None:
    """Raises a ConfigError that names the setting, the rule and the value, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} must be {rule}, is {shown(value)}")


def check(values: Any, prefix: str) -> None:
    """Holds a dataclass of settings to their rules.

    Args:
        prefix: Of their names in messages, "em.".

    Raises:
        ConfigError: A value breaks its rule.
    """
    for f in dataclasses.fields(values):
        value, rule = getattr(values, f.name), f.metadata.get("rule")
        if rule is not None and value is not None:
            require(rule.holds(value), prefix + f.name, rule.says, value)


def flags_of(cls: type) -> list[Flag]:
    """The flags of a dataclass of settings, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        if help := f.metadata.get("help"):
            name = f.metadata["flag"] or f.name
            found.append(
                Flag(name, f.name, _kind(hints[f.name]), _told(help, f.default), f.default)
            )
    return found


def _kind(hint: Any) -> type:
    options = {hint}
    if typing.get_origin(hint) in (Union, types.UnionType):
        options = set(typing.get_args(hint)) - {type(None)}
    return next((kind for kind in (bool, int, float) if options == {kind}), str)


def _told(help: str, default: Any) -> str:
    """The line with the default behind it, if that is worth a word."""
    if default is None or default is False or default == "" or isinstance(default, tuple):
        return help
    text = "on" if default is True else str(default)
    if text != text.strip():
        text = repr(text)
    return f"{help if help.endswith('...') else help.removesuffix('.')} ({text})."


def parse_yaml(text: str, what: str) -> Any:
    """YAML of up to 1 MiB and 32 levels, without aliases, which could stand for any amount.

    Raises:
        ConfigError: It is not YAML, or beyond these bounds; `what` says where it is from.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read: write the value out")
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise yaml.YAMLError(f"more than {_MAX_DEPTH} levels deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    if len(text) > MAX_BYTES:
        raise ConfigError(f"{what} is larger than {MAX_BYTES:,} characters")
    try:
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        why = " ".join(str(e).split())  # an error of PyYAML is a little drawing
        raise ConfigError(f"{what} cannot be read as YAML: {why[:200]}") from e


def build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping: unknown keys refused, values coerced to the annotated types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping, is {shown(values)}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(map(str, values)) - set(hints)):
        raise ConfigError(
            f"{where}: unknown key {shown(unknown[0])}; choose one of {sorted(hints)}"
        )
    try:
        return cls(**{k: _coerce(hints[k], v, f"{where}.{k}") for k, v in values.items()})
    except TypeError as e:
        raise ConfigError(f"{where}: {e}") from e


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in args:
            if option is not type(None):
                try:
                    return _coerce(option, value, where)
                except ConfigError as e:
                    errors.append(str(e))
        raise ConfigError("; ".join(errors))
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {list(args)}, is {shown(value)}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where} must be a list, is {shown(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} must have {len(kinds)} entries, is {shown(value)}")
        return tuple(_coerce(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if dataclasses.is_dataclass(hint):
        return (
            value
            if isinstance(value, typing.cast(type, hint))
            else build(typing.cast("type[Any]", hint), value, where)
        )
    try:
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if hint is int:
            number = int(value) if isinstance(value, str) else value
            if isinstance(number, bool) or int(number) != number:
                raise ValueError
            return int(number)
        if hint is float:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if math.isfinite(number):
                return number
            raise ConfigError(f"{where} must be finite, is {number}")
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ConfigError(f"{where} must be {hint.__name__}, is {shown(value)}") from None
    if not isinstance(value, hint):
        raise ConfigError(f"{where} must be {hint.__name__}, is {shown(value)}")
    return value

"""From flags to settings: the forms that `--set`, `--field` and `--loss` take."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.errors import ConfigError, shown
from userip_fast.core.fields import TEMPLATES, ProfileField
from userip_fast.core.settings import flags_of, parse_yaml

FORM = ("sep", "encoding", "header", "items_header")
"""Flags that say how text files are written."""

SETTINGS = {
    flag.name: (f"{section}.{flag.setting}", flag)
    for section, cls in (("data", DataConfig), ("lm", LMConfig), ("em", EMConfig))
    for flag in flags_of(cls)
}
FLAGS: Mapping[str, str] = {flag: setting for flag, (setting, _) in SETTINGS.items()}
"""Flag -> setting; `--set` reaches every other setting by its dotted name."""

FORM_OF_FILES: Mapping[str, Any] = {FLAGS[name]: None for name in FORM}
"""What the files that a model was fitted on say nothing of in others."""


def settings_of(params: Mapping[str, Any]) -> Config:
    """The defaults or --config, then flags, then --set."""
    base = Config.load(params["config"]) if params.get("config") else Config()
    values = flag_values(params)
    if loss := values.get("data.loss"):
        values["data.loss"] = loss.split(",") if "," in loss else loss
    if fields := _fields(params.get("template"), params.get("field")):
        values["fields"] = fields
    for setting in params["set"] or ():
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r} must be NAME=VALUE, for example em.lr=0.02")
        values[name.strip()] = _value(value)
    return base.override(values)


def flag_values(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[flag] for flag, name in FLAGS.items() if params.get(flag) is not None}


def _value(text: str) -> Any:
    """null, a YAML list, or text that the setting's own type reads."""
    if text == "null":
        return None
    if text.startswith("["):
        with contextlib.suppress(ConfigError):  # an item text may begin with a group, "[[...]]"
            return parse_yaml(text, "--set")
    return text


def _fields(template: str | None, specs: Sequence[str] | None) -> tuple[ProfileField, ...]:
    """Fields of --template or --field; empty when neither is given."""
    if template is not None and specs:
        raise ConfigError("--template and --field exclude each other: name the fields in one way")
    if template is not None:
        if template not in TEMPLATES:
            raise ConfigError(f"--template must be one of {sorted(TEMPLATES)}, is {template!r}")
        return TEMPLATES[template]
    fields = []
    for spec in specs or ():
        name, *rest = spec.split(":")
        rest += ["1", ""][max(len(rest) - 2, 0) :]
        if len(rest) != 4 or not all(n.isdecimal() and len(n) < 10 for n in rest[1:3]):
            raise ConfigError(
                f"--field {shown(spec)} must be NAME:PROMPT:CODES[:TOKENS[:WORD WORD ...]], for "
                'example "hobby:The user\'s hobby is:16:1:sports music"'
            )
        prompt, codes, tokens, words = rest
        fields.append(ProfileField(name, prompt, int(tokens), int(codes), tuple(words.split())))
    return tuple(fields)

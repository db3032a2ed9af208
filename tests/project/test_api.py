"""docs/api.md lists every public name with its signature; run as a script, this writes it.

A change of it is a change for whoever calls it: deprecate by a warning for a version first.
"""

import dataclasses
import inspect
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
HEAD = """# Public names

What stays as it is between versions, or warns for one before it changes: the old works until then,
with a `DeprecationWarning` that names the new ([the list](#deprecated)). Everything else is ours to
move. Written by `python tests/project/test_api.py`, which as a test holds it to the code;
settings are in [usage.md](usage.md), commands in [README](../README.md#commands).
"""


class Long:
    """Stands for a default too long to be told."""

    def __repr__(self):
        return "..."


def members():
    """(heading, object) of what is public, classes with their public methods."""
    import userip_fast as uf
    from userip_fast import serve, testing
    from userip_fast.jobs.estimator import UserProfiler

    names = [n for n in uf.__all__ if n not in ("__version__", "ops")]
    yield from ((f"userip_fast.{n}", getattr(uf, n)) for n in names)
    yield "userip_fast.UserProfiler", UserProfiler
    yield "userip_fast.serve.Server", serve.Server
    yield from ((f"userip_fast.ops.{n}", getattr(uf.ops, n)) for n in uf.ops.__all__)
    yield "userip_fast.testing.assert_close_to_oracle", testing.assert_close_to_oracle


def signature(name, thing):
    """As one would type it: without types, which the docstrings tell."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return f"{name}(message)"
    told = inspect.signature(thing)
    plain = [
        p.replace(annotation=p.empty, default=p.default if len(repr(p.default)) < 40 else Long())
        for p in told.parameters.values()
        if p.name not in ("self", "cls")
    ]
    return f"{name}{told.replace(parameters=plain, return_annotation=told.empty)}"


def first_line(thing):
    return (inspect.getdoc(thing) or "").split("\n")[0]


def line(told, thing):
    about = first_line(thing)
    return f"- `{told}`: {about}" if about else f"- `{told}`"


def page():
    lines = [HEAD]
    for name, thing in members():
        if not callable(thing):
            lines.append(f"- `{name}`")
            continue
        lines.append(line(signature(name, thing), thing))
        if not inspect.isclass(thing):
            continue
        told = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
        fields = {f.name for f in told}
        for method, found in sorted(vars(thing).items()):
            if method.startswith("_") or method in fields:
                continue
            found = getattr(found, "__func__", found)
            if inspect.isfunction(found):
                lines.append("  " + line(signature(method, found), found))
            elif isinstance(found, property):
                lines.append("  " + line(method, found))
    return "\n".join([*lines, *deprecations()]) + "\n"


def deprecations():
    """The tables of `userip_fast.core.deprecated`."""
    from userip_fast.core import deprecated as old

    yield f"\n## Deprecated\n\nUntil {old.GONE_IN}:\n"
    yield "| old | now |\n|---|---|"
    for was, now in sorted((old.MODULES | old.NAMES).items()):
        yield f"| `userip_fast.{was}` | `userip_fast.{now}` |"
    for name, default in sorted(old.SETTINGS.items()):
        yield f"| `{name}` | passed over (it was {default}) |"
    for name, values in old.VALUES.items():
        yield from (f"| `{name}={was}` | `{name}={now}` |" for was, now in values.items())


def test_public_names_are_as_documented():
    assert page() == PAGE.read_text(encoding="utf-8")


def test_every_public_name_says_what_it_is():
    assert all(first_line(thing) for _, thing in members() if callable(thing))


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    PAGE.write_text(page(), encoding="utf-8")

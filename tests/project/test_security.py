"""What must never be in the source."""

import ast
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "userip_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]

# The reader of one foreign format, whose unpickler refuses everything but plain values.
PLAIN_UNPICKLER = ROOT / "userip_fast" / "data" / "nete.py"


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_unpickled_and_nothing_is_executed():
    """By any name under which Python, torch or numpy would do it."""
    banned = {
        "torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "eval",
        "exec", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "yaml.load",
        "yaml.unsafe_load", "yaml.full_load", "dist.all_gather_object", "os.system",
        "dist.broadcast_object_list", "pd.read_pickle",
    }  # fmt: skip
    assert len(SOURCES) > 60
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for name, node in calls(tree):
            assert name not in banned, f"{path}:{node.lineno}: {name}"
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                what = f"{path}:{node.lineno}: {keyword.arg}"
                assert not (on and keyword.arg in ("allow_pickle", "trust_remote_code")), what
                assert not (on and keyword.arg == "shell"), what
        imports = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert path == PLAIN_UNPICKLER or not imports & {"pickle", "marshal", "dill", "shelve"}, (
            path
        )


# How packages' metadata say what the table calls a licence.
LICENCES = {
    "BSD-3-Clause": r"BSD-3-Clause|BSD License",
    "Apache-2.0": r"Apache",
    "MIT": r"MIT",
    "PSF-based": r"Python Software Foundation|PSF",
}


def licence_table():
    text = (ROOT / "docs" / "security.md").read_text().split("## Licences")[1]
    rows = [row.strip("| \n").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    return {
        name: licence.split(";")[0] for names, licence in rows[1:] for name in names.split(", ")
    }


def test_the_licence_table_names_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    needed += [r for e in extras if e not in ("test", "bench", "dev") for r in extras[e]]
    names = {re.match(r"[\w-]+", r)[0] for r in needed} - {"setuptools", "cmake", "ninja"}
    assert len(names) > 10
    assert names <= set(licence_table())


@pytest.mark.parametrize("name", licence_table())
def test_the_licence_table_says_what_the_package_says(name):
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    said = [about.get("License-Expression") or "", (about.get("License") or "")[:200]]
    said += [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    assert re.search(LICENCES[licence_table()[name]], " ".join(said)), said

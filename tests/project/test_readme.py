"""What README and docs show is run or checked: Python, commands and their flags, ops, links."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import small_log
import yaml
from typer.main import get_command

import userip_fast as uf
from userip_fast import cli
from userip_fast.cli import env
from userip_fast.cli.flags import settings_of
from userip_fast.core.config import Config
from userip_fast.jobs.fit import fit

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    small_log.write(tmp_path)
    tiny = Config().override(dict(s.split("=") for s in small_log.TINY))
    monkeypatch.setattr("userip_fast.jobs.fit.fit", partial(fit, config=tiny))
    names = {}
    exec(code, names)
    assert names["codes"].shape == (3, 1)
    assert (uf.FeatureBank.open("BANK").codes() == uf.FeatureBank.open("RUN/bank").codes()).all()


def commands():
    """Every `userip ...` line of the pages, continuation lines joined."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ *userip [a-z].*$", text, re.MULTILINE):
            yield pytest.param(line.strip(), id=f"{page.name}: {line.strip()[:40]}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_have_these_flags(line):
    _, *words = shlex.split(line, comments=True)
    command = get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    if command.name == "fit":
        settings_of(context.params)


def test_the_config_of_the_docs_is_one():
    (text,) = blocks((ROOT / "docs" / "usage.md").read_text(), "yaml")
    assert len(Config.from_dict(yaml.safe_load(text)).fields) == 1


def test_every_command_is_in_the_readme():
    table = README[README.index("## Commands") : README.index("## Ops")]
    for name, command in get_command(cli.app).commands.items():
        assert f"`userip {name}" in table
        for sub in getattr(command, "commands", ()):
            assert f"`{sub}`" in table or f"`userip {name} {sub}" in table


def test_the_table_of_ops_is_what_this_machine_knows():
    table = README[README.index("## Ops") : README.index("## Where things are")]
    told = {}
    for names, implementations in re.findall(r"^\| (`.*?) \|.*\| (.*?) \|$", table, re.MULTILINE):
        first, *others = re.findall(r"`(\w+)`", names)
        for name in [first, *((first + x if x.startswith("_") else x) for x in others)]:
            told[name] = {"reference", *re.findall(r"`(\w+)`", implementations)}
    assert told == {op: set(known) for op, known in env.report()["ops"]["cpu"].items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


def test_make_targets_exist():
    targets = set(re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_the_readmes_table_is_that_of_the_results():
    """Every figure of "what the codes add", from docs/results.json."""
    told = json.loads((ROOT / "docs" / "results.json").read_text())
    names = {
        "goodbooks": "goodbooks-10k-sample", "MovieTweetings": "movietweetings-142k",
        "Complete Journey": "completejourney-sample", "Online Retail II": "online-retail-ii",
    }  # fmt: skip
    clusters = ("kmeans_attributes", "kmeans_tfidf", "mf_clusters", "mixture_ids")
    rows = re.findall(r"^\| ([^|]+), (liked|chosen|bought)\? \| (.+) \|$", README, re.MULTILINE)
    assert len(rows) == 6
    for name, asked, cells in rows:
        label = "ratings" if asked == "liked" else "choices"
        found = told[names[name]][label]["new users, 10 events"]
        area = {
            f: by["lightgbm"]["mean"] for f, by in found["auc"].items() if by and "lightgbm" in by
        }
        best = max(area[f] for f in clusters if f in area)
        expected = [
            max(found["floor"].values()), area["none"], area["ids"], best, area["affinity"],
            area["mixture"], area["foldin"], area["all"], area["all+ids"],
        ]  # fmt: skip
        assert [float(c) for c in cells.split(" | ")] == pytest.approx(expected, abs=6e-4)

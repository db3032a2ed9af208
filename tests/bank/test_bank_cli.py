"""`userip bank`: what goes to the terminal, and which files an export writes."""

import json
import logging
import re

import numpy as np
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from userip_fast import cli
from userip_fast.bank import FeatureBank
from userip_fast.core.visible import visible

EVIL = [
    "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "a\rb", "\u202egnp.exe", "\x7f", "a\x08b", "\u2028",
    "\u2066x",
]  # fmt: skip
SENT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def userip(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    assert not SENT.search(result.output)
    return result.output


@pytest.fixture
def bank(tmp_path):
    fields = [{"name": f"f{EVIL[0]}", "codebook_size": len(EVIL), "code_names": EVIL}]
    codes = np.arange(len(EVIL))[:, None]
    return FeatureBank.write(tmp_path / "b", EVIL, codes, fields=fields, model_fingerprint="m")


def test_escapes_in_keys_and_names_do_not_reach_the_terminal(bank, tmp_path, capfd):
    path = bank.path
    found = userip("bank", "lookup", path, *EVIL)
    assert "\\u001b[2J" in found
    assert "\\u202egnp.exe" in found
    userip("bank", "lookup", path, *EVIL, "\x1b[31mnobody", "--on-unknown", "code")
    userip("bank", "lookup", path, "\x1b[31mnobody", code=2)
    assert json.loads(userip("bank", "info", path))["fields"] == bank.fields  # still JSON
    json.loads(userip("bank", "drift", path, path))
    userip("bank", "export", path, tmp_path / "x.parquet")
    userip("bank", "info", tmp_path / "\x1b[2Jabsent", code=2)
    try:
        cli.shell.options()
        logging.getLogger("userip_fast").warning("of %s", EVIL[1])
        assert "userip: of \\u001b[2J" in cli.shell.Formatter("userip: %(message)s").format(
            logging.LogRecord("x", logging.WARNING, "", 0, "of %s", (EVIL[1],), None)
        )
    finally:
        assert not SENT.search("".join(capfd.readouterr()))


def test_visible():
    assert visible("a\tb\n日本語 é 🎬 |") == "a\tb\n日本語 é 🎬 |"
    assert visible("\x1b[0m\x9b\ud800") == r"\u001b[0m\u009b\ud800"
    assert json.loads(visible(json.dumps(EVIL, ensure_ascii=False))) == EVIL


def test_an_export_is_what_its_name_says(bank, tmp_path):
    userip("bank", "export", bank.path, tmp_path / "x.CSV")
    table = pacsv.read_csv(
        tmp_path / "x.CSV", parse_options=pacsv.ParseOptions(newlines_in_values=True)
    )
    assert table.column_names == ["user_id", bank.fields[0]["name"]]
    codes = dict(zip(*(column.to_pylist() for column in table.columns)))
    assert codes == dict(zip(bank.keys().to_pylist(), bank.codes()[:, 0].tolist()))
    userip("bank", "export", bank.path, tmp_path / "x.parquet", "--layout", "feast")
    assert "event_timestamp" in pq.read_table(tmp_path / "x.parquet").column_names
    for name, layout, said in (
        ("x.json", "plain", "must end in .parquet or .csv"),
        ("x", "plain", "must end in .parquet or .csv"),
        ("x.csv", "feast", "must end in .parquet"),
        ("x.parquet", "fest", "--layout fest: must be plain or feast"),
    ):
        (tmp_path / "before").mkdir(exist_ok=True)
        out = userip(
            "bank", "export", bank.path, tmp_path / "before" / name, "--layout", layout, code=2
        )
        assert said in out.replace("\n", " ")
    assert not list((tmp_path / "before").iterdir())
    assert "name either a file" in userip("bank", "export", bank.path, code=2)


def test_an_export_replaces_no_link(bank, tmp_path):
    (tmp_path / "mine").write_text("x")
    (tmp_path / "x.csv").symlink_to("mine")
    assert "is a symbolic link" in userip("bank", "export", bank.path, tmp_path / "x.csv", code=2)
    assert (tmp_path / "mine").read_text() == "x"


def test_users_are_removed_by_key_and_by_file(bank, tmp_path):
    (tmp_path / "gone").write_text("x\na\n", encoding="utf-8")
    fields = [{"name": "f", "codebook_size": 3}]
    keys = ["a", "b", "x", "y"]
    FeatureBank.write(
        tmp_path / "c", keys, np.zeros((4, 1), int), fields=fields, model_fingerprint="m"
    )
    told = userip("bank", "remove", tmp_path / "c", "b", "--file", tmp_path / "gone")
    assert "3 users removed, 1 left" in told
    assert FeatureBank.open(tmp_path / "c", verify=True).keys().to_pylist() == ["y"]
    assert "are not in the bank" in userip("bank", "remove", tmp_path / "c", "b", code=2)
    told = userip("bank", "remove", tmp_path / "c", "b", "--on-unknown", "skip")
    assert "0 users removed, 1 left" in told
    userip("bank", "remove", bank.path, EVIL[0])
    (tmp_path / "gone").write_bytes(b"\xff")
    userip("bank", "remove", tmp_path / "c", "--file", tmp_path / "gone", code=2)

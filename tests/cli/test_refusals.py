"""Whatever is asked wrongly ends in one line and exit code 2: never a traceback, never a start."""

import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
from typer.testing import CliRunner

from userip_fast import cli
from userip_fast.core.config import Config
from userip_fast.core.sums import sealed
from userip_fast.data import read_interactions
from userip_fast.jobs.fit import fit

DIGITS = "9" * 5000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good log, a good run, and everything bad that the table names."""
    root = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERIP_FAST_CACHE", str(root / "cache"))
        data = read_interactions(*small_log.write(root), rating="rating", time="timestamp")
        config = Config().override(
            {**dict(s.split("=") for s in small_log.TINY), "em.steps": 1, "data.max_tokens": 60,
             "fields": [{"name": "taste", "prompt": "likes", "codebook_size": 4}]}
        )  # fmt: skip
        fit(data, config=config, out=root / "run")
        _bad_files(root)
        patch.chdir(root)
        yield root


def _bad_files(root):
    text = {
        "empty.csv": "",
        "no_rows.csv": "user_id,item_id,title\n",
        "ragged.csv": "user_id,item_id\n1,2\n1\n",
        "quote.csv": 'user_id,item_id,title\n1,2,"open',
        "twice.csv": "user_id,user_id,item_id\n1,1,2\n",
        "bare.csv": "1,2,a title\n3,4,another\n",
        "semicolon.csv": "user_id;item_id\n1;2\n",
        "log.txt": "user_id,item_id\n",
        "log.json": "[]",
        "torn.jsonl": '{"user_id": 1, "item_id"',
        "list.jsonl": "[1, 2]\n",
        "empty.jsonl": "",
        "deep.jsonl": '{"user_id": ' + "[" * 5000 + "\n",
        "mixed.jsonl": '{"user_id": 1}\n{"user_id": "a"}\n',
        "not.parquet": "PAR1 no",
        "list.yaml": "[1, 2]",
        "scalar.yaml": "7",
        "empty.yaml": "",
        "torn.yaml": "data: {rating: ",
        "tag.yaml": "data: !!python/object/apply:os.getcwd []",
        "date.yaml": "em: {steps: 2020-99-99}",
        "deep.yaml": "data: " + "[" * 3000,
        "digits.yaml": f"em: {{steps: {DIGITS}}}",
        "alias.yaml": "a: &a [x, x]\ndata: *a",
        "keys.yaml": "{1: 2, [1]: 3}",
        "nan.yaml": "em: {lr: .nan}",
        "bomb.yaml": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh"))
        + "data: *h",
        "large.yaml": "data: {text: '" + "x" * (1 << 20) + "'}",
        "unknown.yaml": "speed: 1",
        "bool.yaml": "em: {steps: true}",
        "string.yaml": "em: many",
        "dup.yaml": "fields: [{name: a, prompt: b}, {name: a, prompt: c}]",
        "utf16.yaml": "\udcff\udcfe",
        "digits.json": f'{{"em": {{"steps": {DIGITS}}}}}',
        "nofields.yaml": "fields: []",
    }
    for name, content in text.items():
        (root / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    (root / "latin.csv").write_bytes("user_id,item_id,title\n1,2,caf\xe9\n".encode("latin-1"))
    (root / "nul.csv").write_bytes(b"\0" * 100)
    (root / "cut.parquet").write_bytes((root / "interactions.parquet").read_bytes()[:-200])
    (root / "void").mkdir()
    (root / "both").mkdir()
    shutil.copy(root / "interactions.parquet", root / "both")
    (root / "both" / "a.csv").write_text("user_id,item_id\n")
    (root / "lm").mkdir()
    (root / "lm" / "config.json").write_text("{")
    tables = {
        "floats": {"user_id": [1.5, 2.0], "item_id": [1, 2]},
        "lists": {"user_id": [[1]], "item_id": [1]},
        "nulls": {"user_id": pa.array([None, None], pa.null()), "item_id": [1, 2]},
        "large_keys": {"user_id": pa.array([2**64 - 1], pa.uint64()), "item_id": [1]},
        "no_rows": {"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64())},
        "words": {
            "user_id": [1, 2],
            "item_id": [1, 2],
            "rating": ["good", "bad"],
            "timestamp": ["then", "now"],
        },
        "structs": {"user_id": [1], "item_id": [1], "title": [{"a": 1}], "rating": [1.0]},
        "strings": {"user_id": [1, 2], "item_id": ["a", "b"], "rating": [1, 2]},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), root / f"{name}.parquet")
    for name, change in {
        "torn_manifest": lambda m: (m / "manifest.json").write_text("{"),
        "no_manifest": lambda m: (m / "manifest.json").unlink(),
        "list_manifest": lambda m: (m / "manifest.json").write_text("[]"),
        "empty_manifest": lambda m: (m / "manifest.json").write_text(
            '{"format": "userip_fast.model.fitted", "version": 1}'
        ),
        "newer": lambda m: (m / "manifest.json").write_text(
            '{"format": "userip_fast.model.fitted", "version": 9}'
        ),
        "no_lm": lambda m: shutil.rmtree(m / "lm"),
        "header": lambda m: (m / "start.safetensors").write_bytes(struct.pack("<Q", 1 << 60)),
        "files": lambda m: edit(m, files=7),
        "lm_text": lambda m: edit(m, lm="default"),
        "behaviour": lambda m: edit(m, behaviour={}),
        "behaviour_list": lambda m: edit(m, behaviour=[1]),
        "digits": lambda m: (m / "manifest.json").write_text(f'{{"version": {DIGITS}}}'),
    }.items():
        shutil.copytree(root / "run" / "model", root / "models" / name)
        change(root / "models" / name)
    for name, content in {
        "no_metrics": None,
        "torn_metrics": "{",
        "list_metrics": "[]",
        "text_metrics": '{"fields": "x"}',
    }.items():
        shutil.copytree(root / "run", root / "runs" / name)
        (root / "runs" / name / "metrics.json").unlink()
        if content is not None:
            (root / "runs" / name / "metrics.json").write_text(content)
    for name, file, content in (
        ("torn_lines", "metrics.jsonl", "{\n"),
        ("number_lines", "metrics.jsonl", "7\n"),
        ("torn_ctr", "ctr.json", "{"),
        ("list_ctr", "ctr.json", "[]"),
        ("odd_ctr", "ctr.json", '{"auc": 3}'),
        ("torn_explain", "explain.json", "{"),
        ("odd_explain", "explain.json", '{"fields": []}'),
        ("odd_confusion", "confusion.json", "[1]"),
        ("odd_cards", "model/codes.json", '{"taste": 3}'),
    ):
        shutil.copytree(root / "run", root / "runs" / name)
        (root / "runs" / name / file).write_text(content)
    nete = root / "nete"
    nete.mkdir()
    (nete / "reviews.pickle").write_bytes(pickle.dumps(print))


def edit(model, **changes):
    file = model / "manifest.json"
    file.write_text(json.dumps(sealed({**json.loads(file.read_text()), **changes})))


LOG = "--interactions interactions.parquet --items items.parquet"
ABBREVIATIONS = {
    "FIT": f"fit {LOG} --out OUT --rating rating",
    "READ": "fit --out OUT --items items.parquet --interactions",
    "ALONE": "fit --out OUT --text {title} --interactions",
    "INFER": f"infer {LOG} --out OUT --model",
    "CTR": f"ctr {LOG} --out OUT --rating rating",
    "TUNE": f"tune {LOG} --rating rating",
    "EXPLAIN": f"explain {LOG} --run",
    "DIGITS": DIGITS,
    "HUGE": str(2**70),
    "BRACKETS": "(" * 300,
}
TABLE = [
    line
    for line in (Path(__file__).parent / "refusals.txt").read_text().splitlines()
    if not line.startswith("#")
]


def test_the_table_is_large_and_its_lines_differ():
    assert len(set(TABLE)) == len(TABLE) >= 150


def split(line):
    for short, whole in ABBREVIATIONS.items():
        line = re.sub(rf"\b{short}\b", lambda _, whole=whole: whole, line)
    return shlex.split(line)


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line[:90])
def test_one_line_and_exit_code_2(place, line, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setenv("USERIP_FAST_CACHE", str(place / "cache"))
    monkeypatch.setattr("userip_fast.lm.embedded.train", _must_not_start)
    args = [a.replace("OUT", str(tmp_path / "out")).replace("WORK", str(tmp_path / "work"))
            for a in split(line)]  # fmt: skip
    before = time.monotonic()
    result = CliRunner().invoke(cli.app, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2, (result.exit_code, result.output[-3000:])
    said = result.stderr
    assert said.startswith("userip: "), said
    assert len(said.encode()) < 4000, said[:1000]
    assert not re.search(r"\b(on_bad|on_unknown|out|encoding|sep)=['\"]", said), said
    if "bad row(s)" not in said and "rows read" not in said:  # which list the rows
        assert said.count("\n") == 1, said
    assert time.monotonic() - before < 20
    assert not (tmp_path / "out" / "model").exists()


def _must_not_start(*args, **kwargs):
    raise AssertionError("minutes of training began")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("FIT --on-bad x", "--on-bad (data.on_bad) must be one of ['error', 'skip'], is 'x'"),
        ("FIT --min-history 0", "--min-history (data.min_history) must be at least 1, is 0"),
        ("FIT --set em.lr=0", "em.lr must be positive, is 0.0"),
        (
            "FIT --sep ''",
            "--sep must be 1 to 8 ASCII characters without quotes and new lines, is ''",
        ),
        ("bank lookup run/bank 3 --on-unknown x", "--on-unknown x: must be 'error' or 'code'"),
        (
            "bank remove run/bank 3 --on-unknown code",
            "--on-unknown code: must be 'error' or 'skip'",
        ),
        ("bank export run/bank x.parquet --layout fest", "--layout fest: must be plain or feast"),
        ("ALONE latin.csv", "for example --encoding latin-1, or drop them with --on-bad skip"),
        ("FIT --filter \"out='x'\"", "filter \"out='x'\": cannot be parsed"),
    ],
)
def test_messages_are_in_the_words_of_the_command_line(place, line, said):
    result = CliRunner().invoke(cli.app, split(line))
    assert result.exit_code == 2
    assert said in result.stderr


def run(*args, env=(), **kwargs):
    command = [sys.executable, "-m", "userip_fast", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **dict(env)}
    return subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, text=True, check=False, **kwargs
    )


def test_a_bug_alone_shows_a_traceback_and_says_how_to_report_it(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import userip_fast.cli.env\n"
        "from userip_fast.__main__ import main\n"
        "userip_fast.cli.env.format_report = lambda: {}['a bug']\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, tmp_path / "broken.py", "env"], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 70
    assert "KeyError: 'a bug'" in done.stderr
    assert "this is a bug. Please report it with the lines above" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("args", [["--version"], ["bank", "info", "run/bank"], ["--help"]])
def test_a_full_disk_behind_the_output_is_told(place, args):
    with open("/dev/full", "w") as full:
        done = run(*args, stdout=full, cwd=place)
    assert done.returncode == 2
    assert done.stderr == "userip: [Errno 28] No space left on device\n"


def test_an_interrupt_at_the_start_ends_in_its_exit_code(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")  # while modules are imported
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = run("env", env={"PYTHONPATH": path}.items(), stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (130, "")


def test_markup_and_formulas_in_names_are_text(place, tmp_path, monkeypatch):
    """The title of the table, and words in the pictures, after the fit is done."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("USERIP_FAST_CACHE", str(place / "cache"))
    args = ["fit", "--interactions", "interactions.parquet", "--items", "items.parquet",
            "--out", "a[/b]$x", "--field", "money:The user spends:4:1:$cheap $$ dear$ [red]",
            "--max-tokens", "60"]  # fmt: skip
    for setting in (*small_log.TINY, "em.steps=1"):
        args += ["--set", setting]
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 0, result.stderr
    assert "a[/b]$x" in result.stdout
    assert (place / "a[/b]$x" / "report.html").is_file()

"""Every command, every refusal, and what an interrupt leaves behind: nothing half-written."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
from typer.main import get_command
from typer.testing import CliRunner

import userip_fast
from userip_fast import cli
from userip_fast.cli.flags import FLAGS, settings_of
from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError
from userip_fast.core.files import read_json, sha256_file, write_json
from userip_fast.core.sums import sealed

FIELD = "taste:The user likes:4:1:fantasy romance"
SET = [arg for setting in small_log.TINY for arg in ("--set", setting)]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERIP_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def userip(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fit(log, out, *more, code=0, rating="rating"):
    columns = ["--time", "timestamp", *(["--rating", rating] if rating else [])]
    return userip(
        "fit", "--interactions", log[0], "--items", log[1], "--out", out, *columns,
        "--text", "{title}[[ ({genres})]]", "--field", FIELD, *SET, *more, code=code,
    )  # fmt: skip


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return small_log.write(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def fitted(log, tmp_path_factory):
    """(run folder, what fit printed)."""
    run = tmp_path_factory.mktemp("fit") / "run"
    return run, fit(log, run)


# What it does


def test_fit_prints_and_writes(fitted):
    run, result = fitted
    assert {p.name for p in run.iterdir()} - {"tensorboard"} == {
        "model", "bank", "checkpoints", "metrics.json", "metrics.jsonl", "report.html",
        "explain.json",
    }  # fmt: skip
    table = result.stdout
    for text in ("users", " 30 ", " 24 ", "150, in time order", "embedded", "users/s", "taste"):
        assert text in table, text
    nll = read_json(run / "metrics.json")["fit"]["nll_per_weight"]
    assert f"{nll:.4f} nats" in table
    assert "inferring profiles" in result.stderr
    assert "Loading weights" not in result.stderr
    config = Config.load(run / "model" / "config.json")
    assert (config.data.time, config.data.rating, config.em.steps) == ("timestamp", "rating", 2)
    assert config.fields == (
        userip_fast.ProfileField("taste", "The user likes", 1, 4, ("fantasy", "romance")),
    )


def test_infer_takes_its_columns_from_the_model(fitted, log, tmp_path):
    run, _ = fitted
    args = ("infer", "--model", run / "model", "--interactions", log[0], "--items", log[1])
    result = userip(*args, "--out", tmp_path / "bank")
    assert "150, in time order" in result.stdout
    assert "nats per loss weight" in result.stdout
    bank = userip_fast.FeatureBank.open(tmp_path / "bank", verify=True)
    trained = userip_fast.FeatureBank.open(run / "bank")
    users = np.arange(small_log.USERS)
    np.testing.assert_array_equal(bank.lookup(users), trained.lookup(users))

    userip(*args, "--out", tmp_path / "few", "--max-users", 7, "--quiet")
    few = userip_fast.FeatureBank.open(tmp_path / "few")
    assert len(few) == 7
    np.testing.assert_array_equal(few.codes(), bank.lookup(few.keys()))


def test_bank_commands(fitted, tmp_path):
    bank = fitted[0] / "bank"
    opened = userip_fast.FeatureBank.open(bank)
    codes = opened.lookup([3, 4])[:, 0].tolist()
    lines = userip("bank", "lookup", bank, 3, 4).stdout.splitlines()
    for user, code in zip((3, 4), codes):
        (line,) = [x for x in lines if x.startswith(f"│ {user} ")]
        assert f"{code}: {opened.describe('taste', code)}" in line
    result = userip("bank", "lookup", bank, "--on-unknown", "code", "--", "-5")
    assert "4: unknown user" in result.stdout
    assert "not in the bank" in userip("bank", "lookup", bank, 999, code=2).stderr
    assert "integer keys" in userip("bank", "lookup", bank, "ann", code=2).stderr

    userip("bank", "export", bank, tmp_path / "bank.parquet")
    table = pq.read_table(tmp_path / "bank.parquet")
    assert table.column_names == ["user_id", "taste"]
    assert table.num_rows == small_log.USERS
    about = json.loads(userip("bank", "info", bank).stdout)
    assert (about["users"], about["key_type"]) == (small_log.USERS, "int64")
    assert "30 users" in userip("bank", "verify", bank).stdout
    assert "no feature bank here" in userip("bank", "verify", tmp_path / "nothing", code=2).stderr


def test_demo_prints_scores_and_codes(monkeypatch, tmp_path):
    scores = {"nmi": {"gradient": 0.941, "new": 0.5}, "ari": {"gradient": 0.9, "new": 0.4},
              "forward_equivalents": {"gradient": 12.0}}  # fmt: skip
    asked = {}

    def run_demo(**kwargs):
        asked.update(kwargs)
        card = {"code": 0, "users": 9, "words": ["fishing"], "items": ["used rod"], "lift": [3.0]}
        write_json(tmp_path / "model" / "codes.json", {"hobby": [card]})
        return {"fields": {"hobby": scores}, "users": 9, "seeds": [3]}

    monkeypatch.setattr("userip_fast.demo.run_demo", run_demo)
    printed = userip("demo", "--out", tmp_path, "--seed", 3, "--full").stdout
    assert asked == {"out": tmp_path, "full": True, "seed": 3, "show": True}
    for text in ("userip, gradient E-step", "0.941", "0.900", "12", "new", "fishing", "used rod"):
        assert text in printed, text


def test_env_doctor_and_version(monkeypatch):
    from userip_fast.cli import doctor

    assert "assign_codes: " in userip("env").stdout
    assert userip("--version").stdout.strip() == userip_fast.__version__
    printed = userip("doctor", *SET).stdout
    assert printed.count(" ok ") == 16
    monkeypatch.setattr(doctor, "diagnose", lambda lm, seed: [doctor.Check("leak", 1.0, 0.0)])
    result = userip("doctor", *SET, code=1)
    assert "FAILED" in result.stdout
    assert "1 of 1 checks failed" in result.stderr


def test_doctor_on_a_downloaded_model(shared_dir):
    (folder,) = (shared_dir / "models").iterdir()
    assert userip("doctor", "--lm", folder).stdout.count(" ok ") == 16


@pytest.mark.parametrize("args", [[], ["fit"], ["infer"], ["bank"], ["demo"], ["doctor"]])
def test_help(args):
    result = CliRunner().invoke(cli.app, [*args, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


# Settings


def test_flags_name_settings_and_are_flags_of_fit():
    commands = get_command(cli.app).commands
    known = Config().to_dict()
    for flag, name in FLAGS.items():
        section, _, key = name.partition(".")
        assert key in known[section], name
        assert flag in {p.name for p in commands["fit"].params}
    of_infer = {p.name for p in commands["infer"].params}
    assert of_infer - set(FLAGS) == {
        "model", "interactions", "items", "out", "max_users", "probabilities", "profiles", "quiet",
        "shard", "stream", "update",
    }  # fmt: skip


def settings(**params):
    return settings_of({"config": None, "set": None, "template": None, "field": None, **params})


def test_a_file_and_flags_say_the_same(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "data: {rating: stars, loss: [0.1, 1], feedback_words: [bad, good]}\n"
        "lm: {quantization: none}\nem: {lr: 2e-2, steps: 9}\n"
        "fields: [{name: taste, prompt: The user likes, codebook_size: 4,\n"
        "          candidates: [fantasy, romance]}]\n"
    )
    flags = {"rating": "stars", "loss": "0.1,1", "quantization": "none", "field": [FIELD],
             "set": ["em.lr=0.02", "em.steps=9", "data.feedback_words=[bad, good]"]}  # fmt: skip
    assert settings(config=file) == settings(**flags)
    assert settings(config=file, steps=3).em.steps == 3  # flags win
    (tmp_path / "config.json").write_text(json.dumps(settings(**flags).to_dict()))
    assert settings(config=tmp_path / "config.json") == settings(**flags)


def test_values_of_set():
    texts = ["data.text=[[{a}]] {b}", "data.filter=x == 'a=b'"]
    got = settings(set=[*texts, "data.rating=null", "em.tolerance=1e-4"])
    assert (got.data.text, got.data.rating) == ("[[{a}]] {b}", None)
    assert (got.data.filter, got.em.tolerance) == ("x == 'a=b'", 1e-4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"set": ["em.speed=3"]}, "'em.speed' is unknown"),
        ({"set": ["steps"]}, "NAME=VALUE"),
        ({"set": ["em.steps=many"]}, "must be int"),
        ({"steps": 0}, "em.steps must be at least 1, is 0"),
        ({"on_bad": "ignore"}, "must be one of ['error', 'skip'], is 'ignore'"),
        ({"loss": "1,2,3"}, "loss"),
        ({"field": ["hobby"]}, "NAME:PROMPT:CODES"),
        ({"field": ["hobby:likes:x"]}, "NAME:PROMPT:CODES"),
        ({"field": ["hobby:likes:4:1:a:b"]}, "NAME:PROMPT:CODES"),
        ({"field": ["a b:likes:4"]}, "identifier"),
        ({"field": ["a:x:4"], "template": "books"}, "exclude each other"),
        ({"template": "cars"}, "--template must be one of"),
        ({"config": "nowhere.yaml"}, "cannot be read"),
    ],
)
def test_settings_that_are_refused(params, message):
    with pytest.raises(ConfigError) as e:
        settings(**params)
    assert message in str(e.value)


# Bad input: one message, exit code 2, nothing written


class Runs:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def changed(table, column, row, value):
    values = table[column].to_pylist()
    values[row] = value
    at = table.column_names.index(column)
    return table.set_column(at, column, pa.array(values))


def unknown_item(log, items, folder):
    return changed(log, "item_id", 3, 999), items


def empty_text(log, items, folder):
    first = log["item_id"][0].as_py()
    return log, changed(changed(items, "title", first, ""), "genres", first, None)


def nan_rating(log, items, folder):
    return changed(log, "rating", 2, float("nan")), items


def duplicate_item(log, items, folder):
    return log, pa.concat_tables([items, items.slice(5, 1)])


def unreadable(log, items, folder):
    (folder / "interactions.parquet").write_bytes(b"PAR1 this is not a Parquet file")
    return None, items


def same(log, items, folder):
    return log, items


BAD = [
    (same, ["--user", "customer"], ["interactions.parquet", "'customer'", "user_id"]),
    (unknown_item, [], ["1 x unknown item", "row 4, column 'item_id'", "999", "--on-bad skip"]),
    (empty_text, [], ["x empty text", "interactions.parquet, row 1, column 'item_id'"]),
    (nan_rating, [], ["rating is not a number", "row 3, column 'rating'", "nan"]),
    (duplicate_item, [], ["1 x duplicate item", "items.parquet, row 25", "column 'item_id'"]),
    (unreadable, [], ["interactions.parquet"]),
    (same, ["--min-history", 99], ["no user with behaviour is left", "at least 99"]),
    (same, ["--max-tokens", 3], ["truncates to nothing", "data.max_tokens=3"]),
    (same, ["--field", "big:Size:31"], ["codebook_size", "'big' is 31", "30 users"]),
    (same, ["--filter", "genre =="], ["filter"]),
    (same, ["--text", "{titel}"], ["'titel'", "items.parquet"]),
    (same, ["--lm", "/no/such/model"], ["LM '/no/such/model': there is no such folder"]),
    (same, ["--set", "em.speed=1"], ["'em.speed' is unknown"]),
]


@pytest.mark.parametrize(("change", "args", "messages"), BAD)
def test_bad_input_is_refused(change, args, messages, tmp_path):
    paths = tmp_path / "interactions.parquet", tmp_path / "items.parquet"
    for table, path in zip(change(*small_log.tables(), tmp_path), paths):
        if table is not None:
            pq.write_table(table, path)
    result = fit(paths, tmp_path / "run", *args, code=2)
    for message in messages:
        assert message in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []


def test_bad_rows_are_skipped_when_asked_and_told(tmp_path):
    """Also a user who is left without behaviour."""
    log, items = small_log.tables()
    rows = np.arange(log.num_rows)
    item = np.where(rows < small_log.EVENTS, 999, log["item_id"].to_numpy())  # all of user 0
    paths = tmp_path / "log.csv", tmp_path / "items.parquet"
    pa.csv.write_csv(log.set_column(1, "item_id", pa.array(item)), paths[0])
    pq.write_table(items, paths[1])
    result = fit(paths, tmp_path / "run", "--on-bad", "skip")
    assert "unknown item" in result.stdout
    assert "users without enough events: 0" in result.stdout
    dropped = read_json(tmp_path / "run" / "metrics.json")["data"]["dropped"]
    assert (dropped["counts"], dropped["short_users"]) == ({"unknown item": 5}, 1)
    assert "not in the bank" in userip(
        "bank", "lookup", tmp_path / "run" / "bank", 0, code=2
    ).stderr  # fmt: skip


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "reviews.pickle").write_bytes(pickle.dumps([Runs(str(ran))]))
    args = ("fit", "--interactions", tmp_path / "reviews.pickle", "--out", tmp_path / "run")
    result = userip(*args, "--user", "user", "--item", "item", code=2)
    assert "reviews.pickle" in result.stderr
    assert not ran.exists()
    assert not (tmp_path / "run").exists()


def test_a_model_without_input_embeddings_is_refused(log, tmp_path, monkeypatch):
    import tiny
    from transformers import LlamaForCausalLM

    tiny.save("llama", tmp_path / "lm")
    monkeypatch.setattr(LlamaForCausalLM, "get_input_embeddings", lambda self: None)
    args = ("--lm", tmp_path / "lm", "--quantization", "none")
    result = fit(log, tmp_path / "run", *args, code=2)
    assert "no input embeddings" in result.stderr
    assert not (tmp_path / "run" / "model").exists()


def test_a_model_that_does_not_match_its_template_is_refused(fitted, log, tmp_path):
    import shutil

    model = shutil.copytree(fitted[0] / "model", tmp_path / "model")
    args = ("infer", "--model", model, "--interactions", log[0], "--items", log[1])
    config = read_json(model / "config.json")
    config["fields"][0]["codebook_size"] = 5
    write_json(model / "config.json", config)
    result = userip(*args, "--out", tmp_path / "bank", code=2)
    assert "config.json: missing or altered" in result.stderr
    manifest = read_json(model / "manifest.json")
    manifest["files"]["config.json"] = sha256_file(model / "config.json")
    write_json(model / "manifest.json", sealed(manifest))
    result = userip(*args, "--out", tmp_path / "bank", code=2)
    assert "codebook of field 'taste'" in result.stderr
    assert not (tmp_path / "bank").exists()


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken():
        raise IndexError("a bug")

    monkeypatch.setattr("userip_fast.cli.env.format_report", broken)
    with pytest.raises(IndexError):
        userip("env")


# Interrupts


def test_an_interrupted_fit_leaves_nothing_behind(log, tmp_path):
    """SIGINT and SIGTERM while the LM is being trained, which would go on for hours."""
    running = {}
    env = {**os.environ, "USERIP_FAST_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for stop in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / stop.name
        args = ["fit", "--interactions", log[0], "--items", log[1], "--out", out, "--field", FIELD]
        running[stop] = subprocess.Popen(
            [sys.executable, "-m", "userip_fast", *args, "--set", "lm.embedded_tokens=1000000000"],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background has SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    for stop, process in running.items():
        deadline = time.monotonic() + 120
        while not (tmp_path / stop.name).exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(stop)
    for process in running.values():
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert stderr.endswith("userip: interrupted; nothing half-written\n")
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert left == []


def test_an_interrupt_inside_a_finaliser_is_not_lost(tmp_path):
    """Python ignores what is raised there: the first SIGINT hits `__del__`, and yet all ends."""
    (tmp_path / "finalised.py").write_text(
        "import os, signal, time\n"
        "import userip_fast.cli.env\n"
        "from userip_fast.cli import main\n"
        "class Late:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.01)\n"
        "def report():\n"
        "    late = Late()\n"
        "    del late\n"
        "    time.sleep(60)\n"
        "userip_fast.cli.env.format_report = report\n"
        "import sys\n"
        "sys.argv[1:] = ['env']\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    begun = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "finalised"], env=env, capture_output=True, text=True, timeout=55,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert run.returncode == 130, run.stderr
    assert "interrupted" in run.stderr
    assert time.monotonic() - begun < 50


def test_an_interrupt_while_text_is_executed_exits_with_130(tmp_path):
    """As when a dataclass is being made in an import: `python -m` then dies of SIGINT by itself."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "import userip_fast.cli.env\n"
        "from userip_fast.cli import main\n"
        "userip_fast.cli.env.format_report = lambda: exec('raise KeyboardInterrupt')\n"
        "sys.argv[1:] = ['env']\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run([sys.executable, "-m", "interrupted"], env=env, stderr=subprocess.PIPE)
    assert run.returncode == 130, run.stderr


def test_shells_complete_commands(tmp_path):
    code = "from userip_fast.cli import app; app(prog_name='userip')"
    told = {"_USERIP_COMPLETE": "complete_bash", "_TYPER_COMPLETE_ARGS": "userip fi",
            "COMP_WORDS": "userip fi", "COMP_CWORD": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["fit"]


def test_several_files_of_any_form_are_one_log(tmp_path):
    log, items = small_log.tables()
    rows = log.to_pylist()
    for at, half in enumerate((rows[:70], rows[70:])):
        text = "".join(f"{r['user_id']}::{r['item_id']}::{r['rating']}\n" for r in half)
        (tmp_path / f"part{at}.dat").write_text(text)
    text = "item_id;title\n" + "".join(
        f"{r['item_id']};{r['title']} \u00e9\n" for r in items.to_pylist()
    )
    (tmp_path / "items.csv").write_text(text, encoding="latin-1")
    userip(
        "fit", "--interactions", tmp_path / "part0.dat", "--interactions", tmp_path / "part1.dat",
        "--header", "user_id,item_id,rating", "--items", tmp_path / "items.csv", "--encoding",
        "latin-1", "--rating", "rating", "--field", FIELD, "--out", tmp_path / "run", *SET, "-q",
    )  # fmt: skip
    data = read_json(tmp_path / "run" / "metrics.json")["data"]
    assert (data["events"], data["users"]) == (len(log), small_log.USERS)
    config = read_json(tmp_path / "run" / "model" / "config.json")["data"]
    assert (config["encoding"], config["header"]) == ("latin-1", "user_id,item_id,rating")
    userip(  # how another log is written, it says itself
        "infer", "--model", tmp_path / "run" / "model",
        "--interactions", small_log.write(tmp_path)[0], "--items", tmp_path / "items.csv",
        "--encoding", "latin-1", "--out", tmp_path / "bank", "-q",
    )  # fmt: skip


def test_an_interrupted_tune_keeps_what_was_judged(tmp_path, monkeypatch):
    from userip_fast.jobs import tune

    judge, calls = tune._judge, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return judge(*args)

    monkeypatch.setattr(tune, "_judge", interrupted)
    log, items = small_log.write(tmp_path)
    out = tmp_path / "tune.json"
    said = userip(
        "tune", "--interactions", log, "--items", items, "--rating", "rating", "--field", FIELD,
        "--codes", "2,3", "--seeds", "1", "--rounds", "1", "--out", out, *SET, "-q", code=130,
    )  # fmt: skip
    assert len(read_json(out)) == 2
    assert "taste" in said.stdout

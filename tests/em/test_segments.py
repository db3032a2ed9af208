"""Event tables on disk: kept in 16 bits, added to, found again, and never believed when damaged."""

import copy
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from test_resume import read
from test_table import WHOLE
from typer.testing import CliRunner

import userip_fast as uf
from userip_fast import cli
from userip_fast.core.config import LMConfig
from userip_fast.core.errors import FormatError, MismatchError, UnsupportedError
from userip_fast.core.late import Late
from userip_fast.core.segments import Part, Segments
from userip_fast.jobs.shards import infer_shard, merge_shards
from userip_fast.lm import stored
from userip_fast.ops import profile_posterior

TEXTS = ["a", "b", "c"]


def values_of(n=3, words=2, codes=4, seed=0):
    drawn = np.random.default_rng(seed).normal(size=(n, words, codes))
    return (drawn - 50).astype(np.float32)


def part_of(texts=TEXTS, seed=0):
    values = values_of(len(texts), seed=seed)
    ones = np.ones(values.shape[:2])
    return Part.of(texts, ones.astype(np.int64) * 5, ones, values)


def open_in(folder, model="v2:m", writes=True):
    return Segments([folder], model, 2, 4, writes=folder if writes else None)


def files(folder):
    return sorted(folder.rglob("*.arrow"))


def texts_in(folder):
    return [text for part in open_in(folder).new() for text in part.texts.to_pylist()]


@pytest.mark.parametrize("scale", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("codes", [16, 128])
def test_sixteen_bits_keep_the_codes(scale, codes):
    """Of events whose codes differ by `scale` nats, likely or hardly likely ones: 99.9 % of users
    have the codes that fp32 gives them, and all have their log responsibilities to 0.01 nats."""
    kinds, users, events = 2000, 20_000, 30
    draw = np.random.default_rng(0)
    level = -draw.exponential(8, (kinds, 3, 1)) - 0.1
    spread = draw.standard_t(4, (kinds, 3, codes)) * scale  # with outliers
    values = (level + spread).astype(np.float32)
    ones = np.ones((kinds, 3))
    kept = Part.of([str(i) for i in range(kinds)], ones, ones, values).values()
    rows = torch.from_numpy(draw.integers(0, kinds * 3, users * events))
    offsets = torch.arange(0, users * events + 1, events)
    prior = torch.from_numpy(draw.normal(size=codes)).log_softmax(0)
    found = [
        profile_posterior(torch.from_numpy(x).reshape(-1, codes), rows, offsets, prior)
        for x in (values, kept)
    ]
    (want, evidence), (got, evidence_kept) = found
    assert (want.argmax(1) == got.argmax(1)).float().mean() >= 0.999
    likely = want > -20
    assert float((want - got)[likely].abs().max()) < 0.01
    assert float((evidence - evidence_kept).abs().max()) < 0.01


def test_what_is_kept_is_read_back_to_the_bit(tmp_path):
    part, store = part_of(), open_in(tmp_path)
    assert list(store.new()) == []
    store.add(part)
    store.add(part_of(["d"], seed=1))
    assert list(store.new()) == []  # it knows what it wrote itself
    first, second = open_in(tmp_path, writes=False).new()
    for name in ("tokens", "weight", "mean", "step", "offset"):
        assert np.array_equal(getattr(first, name), getattr(part, name)), name
    assert np.array_equal(first.values(), part.values())
    assert (first.texts, second.texts.to_pylist()) == (part.texts, ["d"])
    both = Part.concat([first, second])
    assert both.texts.to_pylist() == [*TEXTS, "d"]
    assert np.array_equal(both.take([3, 0]).values(), both.values()[[3, 0]])
    assert np.abs(first.values() - values_of()).max() < 1e-4
    flat = Part.of(["x"], np.ones((1, 2)), np.ones((1, 2)), np.full((1, 2, 4), -3.5, np.float32))
    assert (flat.values() == -3.5).all()
    with pytest.raises(FormatError, match="finite"):
        Part.of(["x"], np.ones((1, 2)), np.ones((1, 2)), np.full((1, 2, 4), np.nan, np.float32))


def test_models_do_not_see_each_other(tmp_path):
    open_in(tmp_path, "v2:" + "a" * 64).add(part_of())
    assert list(open_in(tmp_path, "v2:" + "b" * 64).new()) == []
    (path,) = files(tmp_path)
    other = open_in(tmp_path, "v2:" + "b" * 64)
    shutil.copytree(path.parent, other.writes)
    assert list(other.new()) == []  # its own name is not enough
    assert len(list(open_in(tmp_path, "v2:" + "a" * 64).new())) == 1


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "link"])
def test_a_damaged_segment_is_passed_over_and_removed(tmp_path, caplog, how):
    store = open_in(tmp_path)
    store.add(part_of())
    store.add(part_of(["d"]))
    path = files(tmp_path)[0]
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    path.unlink()
    if how == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes({"flip": data, "cut": data[:-9], "empty": b""}[how])
    again = open_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [p.texts.to_pylist() for p in again.new()] == [["d"]]
    assert f"{path}: cannot be used" in caplog.text
    assert "read by the LM again" in caplog.text
    with again.alone():
        again.add(part_of())
    assert not os.path.lexists(path)
    caplog.clear()
    assert texts_in(tmp_path) == ["d", *TEXTS]
    assert caplog.text == ""


def changed(batch, name, column):
    at = batch.schema.names.index(name)
    columns = [column if i == at else c for i, c in enumerate(batch.columns)]
    schema = pa.schema(
        [(n, c.type) for n, c in zip(batch.schema.names, columns)], batch.schema.metadata
    )
    return pa.record_batch(columns, schema=schema)


def lists(values, size=2):
    return pa.FixedSizeListArray.from_arrays(pa.array(values), size)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda b: changed(b, "text", pa.array(["a", "a", "b"], pa.large_string())), "text twice"),
        (lambda b: changed(b, "text", pa.array(["a", None, "b"], pa.large_string())), "a null"),
        (lambda b: changed(b, "mean", lists(np.full(6, np.nan, np.float32))), "not finite"),
        (lambda b: changed(b, "step", lists(np.full(6, -1, np.float32))), "negative steps"),
        (lambda b: changed(b, "tokens", lists(np.zeros(6, np.int32))), "without tokens"),
        (lambda b: changed(b, "weight", lists(np.ones(6, np.float32))), "has columns"),
        (lambda b: changed(b, "offset", lists(np.ones(9, np.int16), 3)), "has columns"),
        (lambda b: b.replace_schema_metadata({**b.schema.metadata, b"version": b"9"}), "version"),
        (lambda b: b.replace_schema_metadata(None), "is not of this model"),
        (lambda b: b.drop_columns(["mean"]), "has columns"),
    ],
)
def test_what_is_well_formed_and_wrong_is_refused(tmp_path, caplog, change, named):
    folder = open_in(tmp_path).writes
    folder.mkdir()
    batch = change(part_of().batch("v2:m"))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    (folder / f"000001-{hashlib.sha256(data).hexdigest()}.arrow").write_bytes(data)
    assert texts_in(tmp_path) == []
    assert named in caplog.text


def test_whoever_is_killed_leaves_whole_segments(tmp_path):
    """Writers die at any moment; the next one goes on, and every segment is whole."""
    draw, kills, texts = random.Random(0), 0, []
    while kills < 40 or len(texts) < 20:
        pid = os.fork()
        if pid == 0:
            try:
                store = open_in(tmp_path)
                there = sum(len(p) for p in store.new())
                while True:
                    with store.alone():
                        there += sum(len(p) for p in store.new())
                        store.add(part_of([f"text {there}"], seed=there))
                        there += 1
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.001, 0.04) * (1 + kills // 40))  # longer on a slow machine
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the child failed, see above"
        kills += 1
        texts = texts_in(tmp_path)
        assert texts == [f"text {i}" for i in range(len(texts))], f"after {kills} kills"
    store = open_in(tmp_path)
    with store.alone():  # sweeps up
        assert [p.name for p in store.writes.iterdir() if p.name.startswith(".")] == []


def test_two_writers_read_a_text_once(tmp_path):
    store, other = open_in(tmp_path), open_in(tmp_path)
    found = []

    def wait():
        with other.alone():
            found.extend(t for p in other.new() for t in p.texts.to_pylist())

    waits = threading.Thread(target=wait)
    with store.alone():
        waits.start()
        time.sleep(0.1)
        assert found == []
        store.add(part_of())
    waits.join()
    assert found == TEXTS


# With a model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    config = replace(WHOLE, lm=LMConfig(path=str(tiny.save("llama", folder / "lm"))))
    model = uf.fit(read(60), config=config, out=folder / "run")
    return folder, model


@pytest.fixture
def own(saved, tmp_path):
    """A copy of the model folder, and of the LM's."""
    for name in ("lm", "run"):
        shutil.copytree(saved[0] / name, tmp_path / name)
    return tmp_path / "run" / "model", tmp_path / "lm"


def told_otherwise(users=60, **texts):
    data = read(users)
    titles = list(tiny.TEXTS)
    for i, text in texts.items():
        titles[int(i[1:])] = text
    return replace(data, item_text=pa.array(titles, pa.large_string()).take(data.item_keys))


def test_known_items_need_no_lm(saved, own, tmp_path, monkeypatch):
    model, lm = own
    shutil.rmtree(lm)
    monkeypatch.setattr("userip_fast.model.files.open_lm", None)
    loaded = uf.Model.load(model, lm=str(lm))
    assert loaded.fingerprint == saved[1].fingerprint
    data = read(60)
    want = saved[1].infer(data)
    assert np.array_equal(loaded.infer(data), want)
    bank = loaded.infer(data, tmp_path / "bank", probabilities=True)
    assert np.array_equal(bank.lookup(data.user_keys), want)
    loaded.infer(data.head_users(5), tmp_path / "bank", update=True, probabilities=True)
    assert not list(tmp_path.glob("bank.*"))
    assert np.array_equal(loaded.profile([0], [5]), saved[1].profile([0], [5]))
    assert loaded.affinity(loaded.profile([]), [0, 1]).shape == (2,)
    whole = uf.FeatureBank.open(saved[0] / "run" / "bank")
    assert np.array_equal(bank.codes(), whole.codes())


def test_streams_shards_and_the_command_need_no_lm_either(own, tmp_path, monkeypatch):
    model, lm = own
    want = uf.Model.load(model, lm=str(lm)).infer(read(60))
    shutil.rmtree(lm)
    monkeypatch.setattr("userip_fast.model.files.open_lm", None)
    data = read(60)
    user, item, rating = data.user_keys, data.item_keys.to_pylist(), data.rating
    log = pa.table(
        {
            "user_id": np.repeat(user.to_numpy(), np.diff(data.offsets)),
            "item_id": np.asarray(item)[data.item_index],
            "rating": rating,
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    items = pa.table({"item_id": range(len(tiny.TEXTS)), "title": tiny.TEXTS})
    pq.write_table(items, tmp_path / "items.parquet")
    paths = str(tmp_path / "log.parquet"), str(tmp_path / "items.parquet")
    stream = uf.stream_interactions(*paths, work=tmp_path / "work", rating="rating")
    bank = uf.Model.load(model, lm=str(lm)).infer(stream, tmp_path / "streamed")
    assert np.array_equal(bank.lookup(user), want)
    for i in range(2):
        infer_shard(uf.Model.load(model, lm=str(lm)), data, i, 2, tmp_path / "shards")
    merged = merge_shards(tmp_path / "shards", tmp_path / "merged")
    assert np.array_equal(merged.lookup(user), want)
    command = [
        "infer",
        "--model",
        str(model),
        "--interactions",
        paths[0],
        "--items",
        paths[1],
        "--rating",
        "rating",
    ]
    done = CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path / "bank")])
    assert done.exit_code == 0, done.output
    assert "not opened" in done.output
    assert np.array_equal(uf.FeatureBank.open(tmp_path / "bank").lookup(user), want)


def test_a_model_is_saved_again_with_its_table(own, tmp_path, monkeypatch):
    model, lm = own
    loaded = uf.Model.load(model, lm=str(lm))
    loaded.save(tmp_path / "again")
    assert [p.name for p in files(tmp_path / "again")] == [p.name for p in files(model)]
    monkeypatch.setattr("userip_fast.model.files.open_lm", None)
    again = uf.Model.load(tmp_path / "again", lm=str(lm))
    assert np.array_equal(again.profile([0], [5]), loaded.profile([0], [5]))
    late = pickle.loads(pickle.dumps(Late(dict, known=3)))
    assert (late.known, late.is_made, copy.copy(late).known) == (3, False, 3)


def test_an_lm_that_is_gone_is_missed_at_the_first_new_item(own):
    model, lm = own
    shutil.rmtree(lm)
    loaded = uf.Model.load(model, lm=str(lm))
    with pytest.raises(UnsupportedError, match="no such folder"):
        loaded.profile([7], [5], texts={7: "a new thing"})
    other = tiny.save("gpt2", lm)
    with pytest.raises(MismatchError, match="not the one the codebooks"):
        uf.Model.load(model, lm=str(other)).profile([7], [5], texts={7: "a new thing"})
    with pytest.raises(MismatchError, match="not the one the codebooks"):
        uf.Model.load(model, lm=str(other), verify=True)


def test_a_changed_text_is_a_new_item_read_once(own, tmp_path, monkeypatch, caplog):
    model, lm = own
    data = told_otherwise(i2="a dented kettle")
    loaded = uf.Model.load(model, lm=str(lm))
    first = loaded.infer(data, tmp_path / "bank")
    assert "told in another text than when the model was fitted" in caplog.text
    assert "1 of the items, the first being 2" in caplog.text
    assert len(files(model / "events")) == 2
    caplog.clear()
    shutil.rmtree(lm)
    again = uf.Model.load(model, lm=str(lm))
    assert np.array_equal(again.infer(data), first.lookup(data.user_keys))
    new = again.profile([7], [5], texts={7: "a dented kettle"})
    assert not np.array_equal(new, again.profile([2], [5]))  # as the catalogue has it
    caplog.clear()
    again.infer(read(60))
    assert "another text" not in caplog.text


def test_a_read_only_model_keeps_its_table_beside_the_bank(own, tmp_path, monkeypatch):
    model, lm = own
    monkeypatch.setattr("os.access", lambda *a: False)
    data = told_otherwise(i2="a dented kettle")
    loaded = uf.Model.load(model, lm=str(lm))
    bank = loaded.infer(data, tmp_path / "bank")
    assert len(files(model / "events")) == 1
    assert len(files(tmp_path / "bank.events")) == 1
    shutil.rmtree(lm)
    again = uf.Model.load(model, lm=str(lm)).infer(data, tmp_path / "bank")
    assert np.array_equal(again.codes(), bank.codes())


def test_a_damaged_segment_is_read_again(own, tmp_path, caplog):
    model, lm = own
    path = files(model / "events")[0]
    want = uf.Model.load(model, lm=str(lm)).infer(read(60))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    loaded = uf.Model.load(model, lm=str(lm))
    assert np.array_equal(loaded.infer(read(60)), want)
    assert "cannot be used: was altered" in caplog.text
    (made,) = files(model / "events")
    assert made != path
    shutil.rmtree(lm)
    assert np.array_equal(uf.Model.load(model, lm=str(lm)).infer(read(60)), want)


def test_a_kill_while_texts_are_read_costs_a_group_at_most(own, tmp_path, monkeypatch):
    """Inference of new items is killed again and again; the bank is that of one run without."""
    model, lm = own
    monkeypatch.setattr("userip_fast.em.table._TEXTS", 1)
    data = told_otherwise(i0="one", i1="two", i2="three", i3="four", i4="five", i5="six")
    whole = tmp_path / "whole"
    shutil.copytree(model, whole)
    want = uf.Model.load(whole, lm=str(lm)).infer(data, tmp_path / "want", probabilities=True)
    real, there = Segments.add, [1]
    for attempt in range(12):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)

            def add(
                store, part, attempt=attempt
            ):  # dies at its first, after it, at its second or after that
                store.added = getattr(store, "added", 0) + 1
                dies = store.added == 1 + attempt // 2 % 2
                if not dies or attempt % 2:
                    real(store, part)
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

            Segments.add = add
            try:
                loaded = uf.Model.load(model, lm=str(lm))
                loaded.infer(data, tmp_path / "bank", probabilities=True)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        there.append(len(files(model / "events")))
        if not os.WIFSIGNALED(status):
            break
    assert status == 0
    assert there == [1, 1, 2, 3, 5, 5, 6, 7]
    bank = uf.FeatureBank.open(tmp_path / "bank", verify=True)
    assert bank.digest == want.digest
    assert sorted(p.name for p in files(model / "events")) == sorted(
        p.name for p in files(whole / "events")
    )


def test_a_table_is_no_part_of_the_model(own):
    model, lm = own
    about = json.loads((model / "manifest.json").read_text())
    assert not [name for name in about["files"] if name.startswith("events/")]
    loaded = uf.Model.load(model, lm=str(lm))
    loaded.profile([7], [5], texts={7: "a new thing"})
    assert len(files(model / "events")) == 2
    assert uf.Model.load(model, lm=str(lm)).fingerprint == loaded.fingerprint
    shutil.rmtree(model / "events")
    np.testing.assert_allclose(
        uf.Model.load(model, lm=str(lm)).profile([0], [5]), loaded.profile([0], [5]), rtol=1e-4
    )


def test_a_tokenizer_that_would_not_be_the_same_is_not_kept(tmp_path):
    class Odd(type(tiny.tokenizer())):
        def __call__(self, *args, **kwargs):
            found = super().__call__(*args, **kwargs)
            found["input_ids"] = found["input_ids"][::-1]
            return found

    odd = Odd(tokenizer_object=tiny.tokenizer()._tokenizer, bos_token="<s>")
    stored.keep_tokenizer(odd, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    stored.keep_tokenizer(tiny.tokenizer(), tmp_path / "same")
    assert stored.kept_tokenizer(tmp_path / "same").get_vocab() == tiny.tokenizer().get_vocab()

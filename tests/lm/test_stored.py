"""What decides codes is summed: cached LMs, model folders, and every byte of an external LM."""

import json
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import small_log
import tiny
import torch

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.errors import FormatError, MismatchError
from userip_fast.core.sums import cache_folder, kept_sum, sealed
from userip_fast.data import Catalogue
from userip_fast.lm import embedded, open_lm, stored
from userip_fast.model.prepare import load_lm
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.format import BehaviourFormat

LM = LMConfig(embedded_hidden=16, embedded_heads=2, embedded_layers=1, embedded_tokens=4_000,
              embedded_vocab=320)  # fmt: skip
CONFIG = Config(
    data=DataConfig(max_tokens=60), lm=LM, em=EMConfig(estep="gradient", steps=1),
    fields=(uf.ProfileField("taste", "The user's taste is", 1, 4),),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))


def read():
    return uf.read_interactions(*small_log.tables(), rating="rating", time="timestamp")


def flip(file, at=-2):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "removed": os.unlink,
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("model.safetensors", damage) for damage in DAMAGE),
        *((name, "flipped") for name in ("config.json", "tokenizer.json", "manifest.json")),
        ("manifest.json", "removed"),
    ],
)
def test_a_damaged_cached_lm_is_trained_again_with_a_word(tmp_path, caplog, name, damage):
    whole = uf.fit(read(), config=CONFIG)
    (entry,) = (cache_folder() / "lm").iterdir()
    before = (entry / "model.safetensors").read_bytes()
    DAMAGE[damage](entry / name)
    with caplog.at_level(logging.WARNING):
        again = uf.fit(read(), config=CONFIG)
    assert f"{name}: " in caplog.text
    assert "trained again" in caplog.text
    assert again.fingerprint == whole.fingerprint
    assert (entry / "model.safetensors").read_bytes() == before
    caplog.clear()
    uf.fit(read(), config=CONFIG)
    assert not caplog.records


def wait_for(there, seconds=60.0):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_of_two_that_want_the_same_lm_one_trains_it(monkeypatch, caplog):
    trained, real = [], embedded.train

    def train(*args):
        trained.append(1)
        wait_for(lambda: "trains the same LM" in caplog.text)
        return real(*args)

    monkeypatch.setattr(embedded, "train", train)
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.WARNING):
        first = pool.submit(uf.fit, read(), config=CONFIG)
        wait_for(lambda: trained)
        second = pool.submit(uf.fit, read(), config=CONFIG)
        assert first.result(120).fingerprint == second.result(120).fingerprint
    assert len(trained) == 1
    assert "LOCK is held by another process, which trains the same LM; waiting" in caplog.text
    assert len(list((cache_folder() / "lm").iterdir())) == 1
    caplog.clear()
    monkeypatch.setattr(embedded, "one_writer", None)  # what is there needs no lock
    uf.fit(read(), config=CONFIG)
    assert not caplog.records


def test_what_a_killed_training_left_is_removed():
    entries = cache_folder() / "lm"
    uf.fit(read(), config=CONFIG)
    (entry,) = entries.iterdir()
    shutil.rmtree(entry)
    for name in (f".{entry.name}.0123.tmp", ".other.0123.tmp"):
        (entries / name).mkdir()
    (entries / f"{entry.name}.LOCK").touch()
    uf.fit(read(), config=CONFIG)
    assert sorted(p.name for p in entries.iterdir()) == [".other.0123.tmp", entry.name]


def test_each_way_to_fill_the_soft_rows_has_an_lm_of_its_own():
    data = read()
    fmt = BehaviourFormat.fit(CONFIG.data, data, 0)
    source = BehaviourSource(fmt.events(data, Catalogue.from_interactions(data)), fmt)

    def lm(word):
        def slots(tokenizer):
            (word_id,) = tokenizer.encode(word)
            return np.full((data.num_users, 1), word_id)

        return load_lm(source, CONFIG, slot_ids=word and slots)

    a, b, none = lm("a"), lm("b"), lm(None)
    assert len({a.fingerprint, b.fingerprint, none.fingerprint}) == 3
    assert lm("a").source == a.source
    assert len(list((cache_folder() / "lm").iterdir())) == 3


@pytest.mark.parametrize("damage", ["flipped", "removed", "all removed"])
def test_a_model_gets_no_fresh_sums_over_damage(tmp_path, monkeypatch, damage):
    whole = uf.fit(read(), config=CONFIG)
    (entry,) = (cache_folder() / "lm").iterdir()

    def harm(*args, **kwargs):
        if damage == "all removed":
            shutil.rmtree(entry)
        else:
            DAMAGE[damage](entry / "model.safetensors")

    monkeypatch.setattr("userip_fast.model.everyone.ItemCounts.merge", harm)  # while a fit runs
    with pytest.raises(FormatError, match=r"not what was loaded .*--resume"):
        uf.fit(read(), config=CONFIG, out=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    resumed = uf.fit(read(), config=CONFIG, out=tmp_path / "run", resume=True)
    assert resumed.fingerprint == whole.fingerprint
    assert uf.Model.load(tmp_path / "run" / "model").fingerprint == whole.fingerprint


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERIP_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return uf.fit(read(), config=CONFIG, out=tmp_path_factory.mktemp("run")) and (
            tmp_path_factory.getbasetemp() / "run0" / "model"
        )


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


@pytest.mark.parametrize("left_out", ["lm/", "lm/tokenizer.json", "config.json", "all"])
def test_a_manifest_that_leaves_files_out_is_refused(model_folder, tmp_path, left_out):
    shutil.copytree(model_folder, tmp_path / "m")

    def leave_out(manifest):
        manifest["files"] = {
            k: v for k, v in manifest["files"].items()
            if left_out != "all" and not k.startswith(left_out)
        }  # fmt: skip

    edit(tmp_path / "m", leave_out)
    with pytest.raises(FormatError, match=r"not in the manifest|does not list"):
        uf.Model.load(tmp_path / "m")


def test_files_beside_the_listed_ones_and_links_are_refused(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "lm" / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="is not in the manifest; remove it"):
        uf.Model.load(tmp_path / "m")
    (tmp_path / "m" / "lm" / "adapter_config.json").unlink()
    file = tmp_path / "m" / "start.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="is a link or a device"):
        uf.Model.load(tmp_path / "m")


def save(folder, kind="safetensors"):
    tiny.save("llama", folder)
    if kind == "bin":
        weights = tiny.model("llama").state_dict()
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


def load(folder, **kwargs):
    return open_lm(str(folder), LMConfig(quantization="none", **kwargs))


def test_the_fingerprint_does_not_depend_on_how_the_lm_is_kept(tmp_path):
    folder = save(tmp_path / "lm")
    one = load(folder).fingerprint
    assert one == load(folder, dtype="bfloat16").fingerprint
    assert one == open_lm(str(folder), LMConfig(quantization="nf4")).fingerprint
    shutil.copytree(folder, tmp_path / "other")
    assert one == load(tmp_path / "other").fingerprint
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "transformers_version": "9"}))
    assert one == load(folder).fingerprint


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_fingerprint_covers_every_byte_of_all_tensors(tmp_path, kind):
    folder = save(tmp_path / "lm", kind)
    (file,) = stored.weight_files(folder)
    data = file.read_bytes()
    tokenizer = tiny.tokenizer()
    seen = {stored.fingerprint(folder, tokenizer)}
    places = range(len(data) // 40, len(data), len(data) // 20)
    for at in places:
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        seen.add(stored.fingerprint(folder, tokenizer))
    assert len(seen) == 1 + len(places)


def test_the_fingerprint_covers_configuration_and_merges(tmp_path):
    folder = save(tmp_path / "lm")
    seen = {load(folder).fingerprint}
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "rms_norm_eps": 1e-4}))
    seen.add(load(folder).fingerprint)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    seen.add(load(folder).fingerprint)
    assert len(seen) == 3


def test_other_weights_of_the_same_shapes_are_not_the_same_lm(tmp_path):
    """Also where the first row of every tensor, and the vocabulary, are the same."""
    for kind in ("safetensors", "bin"):
        folder = save(tmp_path / kind, kind)
        config = replace(CONFIG, lm=LMConfig(path=str(folder), quantization="none"))
        uf.fit(read(), config=config, out=tmp_path / f"run-{kind}")
        uf.Model.load(tmp_path / f"run-{kind}" / "model")
        flip(stored.weight_files(folder)[0], -900)
        with pytest.raises(MismatchError, match="not the one the codebooks were learned with"):
            uf.Model.load(tmp_path / f"run-{kind}" / "model")


def test_models_of_the_old_fingerprint_load_with_a_warning(tmp_path, caplog):
    folder = save(tmp_path / "lm")
    config = replace(CONFIG, lm=LMConfig(path=str(folder), quantization="none"))
    model = uf.fit(read(), config=config, out=tmp_path / "run")
    old = stored.sampled_fingerprint(folder, model.lm.tokenizer)
    edit(tmp_path / "run" / "model", lambda m: m["lm"].update(fingerprint=old))
    caplog.clear()
    loaded = uf.Model.load(tmp_path / "run" / "model")
    assert "one row of each tensor" in caplog.text
    assert (loaded.infer(read()) == model.infer(read())).all()
    # Banks and checkpoints were made under the fingerprint that follows from the old one.
    model.lm.fingerprint = old
    assert loaded.fingerprint == model.fingerprint
    tiny.model("llama", scale=3.0).save_pretrained(folder)
    with pytest.raises(MismatchError, match="not the one the codebooks"):
        uf.Model.load(tmp_path / "run" / "model")


def old_file(tmp_path, text="x" * 100):
    file = tmp_path / "weights"
    file.write_text(text)
    return file


def test_a_sum_is_read_once_and_again_where_the_file_or_the_caller_asks(tmp_path, monkeypatch):
    monkeypatch.setattr("userip_fast.core.sums._SETTLED_S", -1.0)  # a test does not wait
    file = old_file(tmp_path)
    first = kept_sum(file)
    monkeypatch.setattr("userip_fast.core.sums.sha256_file", lambda path: "read")
    assert kept_sum(file) == first
    assert kept_sum(file, again=True) == "read"
    assert kept_sum(file) == "read"
    times = file.stat()
    file.write_text("y" * 100)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # its time of change tells still
    monkeypatch.setattr("userip_fast.core.sums.sha256_file", lambda path: "changed")
    assert kept_sum(file) == "changed"


def test_files_just_changed_and_damaged_stores_are_read(tmp_path, monkeypatch):
    file = old_file(tmp_path)
    first = kept_sum(file)
    assert not (cache_folder() / "sums.json").exists()
    monkeypatch.setattr("userip_fast.core.sums._SETTLED_S", -1.0)
    kept_sum(file)
    for text in ("[]", "{", '{"a": 1}', ""):
        (cache_folder() / "sums.json").write_text(text)
        assert kept_sum(file) == first


def test_verify_reads_what_rotted_behind_a_kept_sum(tmp_path, monkeypatch):
    monkeypatch.setattr("userip_fast.core.sums._SETTLED_S", -1.0)
    folder = save(tmp_path / "lm")
    config = replace(CONFIG, lm=LMConfig(path=str(folder), quantization="none"))
    model = uf.fit(read(), config=config, out=tmp_path / "run")
    flip(stored.weight_files(folder)[0], -900)  # and as if no time had changed:
    store = cache_folder() / "sums.json"
    sums = json.loads(store.read_text())
    kept_sum(stored.weight_files(folder)[0])
    store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), *sums.values())))
    assert uf.Model.load(tmp_path / "run" / "model").fingerprint == model.fingerprint
    with pytest.raises(MismatchError, match="not the one"):
        uf.Model.load(tmp_path / "run" / "model", verify=True)


def test_a_wrong_kept_sum_does_not_refuse_the_right_lm(tmp_path, monkeypatch):
    monkeypatch.setattr("userip_fast.core.sums._SETTLED_S", -1.0)
    folder = save(tmp_path / "lm")
    right = load(folder).fingerprint
    store = cache_folder() / "sums.json"
    store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), "0" * 64)))
    assert load(folder).fingerprint != right
    assert stored.is_of(folder, tiny.tokenizer(), right)
    assert load(folder).fingerprint == right

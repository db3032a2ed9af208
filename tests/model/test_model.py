"""`fit`, `Model` and the trainer on small logs with real, tiny LMs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.errors import (
    ConfigError,
    DataError,
    FormatError,
    MismatchError,
    UnsupportedError,
)

FIELDS = (uf.ProfileField("taste", "The user's taste is", 1, 4, ("red", "blue")),
          uf.ProfileField("habit", "", 2, 3))  # fmt: skip
LM = LMConfig(embedded_hidden=32, embedded_layers=1, embedded_tokens=8_000, embedded_vocab=320)
CONFIG = Config(
    data=DataConfig(max_tokens=100),
    lm=LM,
    em=EMConfig(estep="gradient", steps=2, block_users=16),
    fields=FIELDS,
)


def tables(users=40, rated=True, seed=0, words=6):
    random = np.random.default_rng(seed)
    events = random.integers(1, words, users)
    user = np.repeat(np.arange(users), events)
    log = {"user_id": user, "item_id": random.integers(0, len(tiny.TEXTS), len(user)),
           "time": np.arange(len(user))}  # fmt: skip
    if rated:
        log["rating"] = random.integers(1, 6, len(user))
    return pa.table(log), pa.table({"item_id": range(len(tiny.TEXTS)), "title": tiny.TEXTS})


def read(rated=True, **kwargs):
    return uf.read_interactions(
        *tables(rated=rated, **kwargs), rating="rating" if rated else None, time="time"
    )


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERIP_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        run = tmp_path_factory.mktemp("run")
        return uf.fit(read(), config=CONFIG, out=run), run


def test_graphs_asked_for_on_a_gpu_are_not_asked_for_where_there_is_none(fitted, tmp_path):
    loaded = uf.Model.load(fitted[1] / "model")
    loaded.config = loaded.config.override({"em.engine": "graph"})
    loaded.save(tmp_path / "model")
    assert '"engine": "graph"' in (tmp_path / "model" / "config.json").read_text()
    again = uf.Model.load(tmp_path / "model", device="cpu")
    assert again.config.em.engine == "auto"
    assert type(again.ready_trainer().engine).__name__ == "PackedEngine"


def test_fit_writes_a_run_that_loads_and_infers_the_same_codes(fitted, tmp_path):
    model, run = fitted
    assert {p.name for p in run.iterdir()} - {"tensorboard"} == {
        "model", "bank", "checkpoints", "metrics.json", "metrics.jsonl", "report.html",
        "explain.json",
    }  # fmt: skip
    data = read()
    bank = uf.FeatureBank.open(run / "bank", verify=True)
    loaded = uf.Model.load(run / "model")
    assert loaded.fingerprint == model.fingerprint == bank.model_fingerprint
    again = loaded.infer(data, tmp_path / "bank")
    codes = bank.lookup(data.user_keys)
    assert codes.shape == (40, 2)
    assert (again.lookup(data.user_keys) == codes).all()
    assert (loaded.infer(data) == codes).all()
    assert len(loaded.infer(data, tmp_path / "few", max_users=7)) == 7
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["data"]["users"] == 40
    assert metrics["fields"]["taste"]["codes"] == 4
    assert sum(metrics["fields"]["habit"]["counts"]) == 40
    assert len((run / "metrics.jsonl").read_text().splitlines()) == metrics["fit"]["rounds"]
    assert any(len(card["items"]) for card in loaded.cards["taste"])


def test_fit_repeats_and_does_not_depend_on_rows_or_blocks(fitted):
    model, _ = fitted
    again = uf.fit(read(), config=CONFIG)
    assert again.fingerprint == model.fingerprint
    log, items = tables()
    order = np.random.default_rng(3).permutation(log.num_rows)
    shuffled = uf.read_interactions(log.take(order), items, rating="rating", time="time")
    other = uf.fit(shuffled, config=replace(CONFIG, em=replace(CONFIG.em, block_users=7)))
    for a, b in zip(model.codebooks, other.codebooks):
        torch.testing.assert_close(a.codewords, b.codewords, rtol=1e-4, atol=1e-5)
    assert (other.infer(read()) == model.infer(read())).all()


def test_a_profile_does_not_change_when_later_interactions_change(fitted):
    """No leak: what is outside the history given has no say, also through negatives."""
    for rated in (True, False):
        data = read(rated=rated)
        model = fitted[0] if rated else uf.fit(data, config=CONFIG)
        early = data.first_events(2)
        log, items = tables(rated=rated)
        later = log["item_id"].to_numpy().copy()
        user = log["user_id"].to_numpy()
        nth = np.arange(len(user)) - np.searchsorted(user, user)
        later[nth >= 2] = (later[nth >= 2] + 1) % len(tiny.TEXTS)
        changed = log.set_column(1, "item_id", pa.array(later))
        other = uf.read_interactions(
            changed, items, rating="rating" if rated else None, time="time"
        )
        assert (model.infer(early) == model.infer(other.first_events(2))).all()


def test_resume_ends_where_an_uninterrupted_run_ends(tmp_path):
    config = replace(CONFIG, em=replace(CONFIG.em, rounds=3, codebook_update="ema"))
    whole = uf.fit(read(), config=config, out=tmp_path / "whole")
    uf.fit(read(), config=replace(config, em=replace(config.em, rounds=1)), out=tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "model")
    resumed = uf.fit(read(), config=config, out=tmp_path / "part", resume=True)
    assert resumed.fingerprint == whole.fingerprint
    with pytest.raises(ConfigError, match="resume=True needs"):
        uf.fit(read(), config=config, resume=True)


def test_an_interrupted_fit_leaves_no_model_and_no_bank(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("userip_fast.model.everyone.code_cards", stop)
    with pytest.raises(KeyboardInterrupt):
        uf.fit(read(), config=CONFIG, out=tmp_path / "run")
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left - {"tensorboard"} == {"checkpoints", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": (uf.ProfileField("a", "", 1, 99),)}, "is 99, more than the 40 users"),
        ({"data": DataConfig(max_tokens=3)}, "truncates to nothing.*data.max_tokens=3"),
        ({"data": DataConfig(behaviour="{text}", loss="feedback")}, "no token would carry"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_nothing_written(change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        uf.fit(read(), config=replace(CONFIG, **change), out=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "bank").exists()


def test_users_that_truncate_to_nothing_can_be_skipped():
    data = DataConfig(max_tokens=8, on_bad="skip")
    model = uf.fit(read(), config=replace(CONFIG, data=data))
    assert 4 <= len(model.infer(read())) < 40


def test_feedback_needs_something_to_tell():
    data = DataConfig(behaviour="{text}: {feedback}", negatives=0)
    with pytest.raises(DataError, match="the log has no varying rating"):
        uf.fit(read(rated=False), config=replace(CONFIG, data=data))


def test_loss_weights_and_words_follow_the_config():
    from userip_fast.prompts.format import BehaviourFormat

    rated, unrated = read(), read(rated=False)
    fmt = BehaviourFormat.fit(DataConfig(), rated, 0)
    assert (fmt.template, fmt.text_weight, fmt.feedback_weight) == ("{text}: {feedback}", 0.0, 1.0)
    assert fmt.scale.words == ("disliked", "okay", "liked")
    fmt = BehaviourFormat.fit(DataConfig(), unrated, 0)
    assert (fmt.template, fmt.negatives, fmt.text_weight) == ("{text}", 0, 1.0)
    fmt = BehaviourFormat.fit(DataConfig(negatives=1), unrated, 0)
    assert (fmt.scale, fmt.negatives, fmt.text_weight) == (None, 1, 0.0)
    fmt = BehaviourFormat.fit(DataConfig(loss=(0.5, 2.0), feedback_thresholds=(2, 4)), rated, 0)
    assert (fmt.text_weight, fmt.feedback_weight) == (0.5, 2.0)
    assert fmt.scale.thresholds == (2.0, 4.0)
    assert BehaviourFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


MODEL_FILES = [
    "config.json", "codebooks.safetensors", "start.safetensors", "catalogue.parquet",
    "codes.json", "lm/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", MODEL_FILES)
def test_damage_is_found_on_load(fitted, file, tmp_path):
    shutil.copytree(fitted[1] / "model", tmp_path / "m")
    target = tmp_path / "m" / file
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    with pytest.raises(FormatError, match="missing or altered"):
        uf.Model.load(tmp_path / "m")
    target.unlink()
    with pytest.raises(FormatError, match="missing or altered"):
        uf.Model.load(tmp_path / "m")


def test_foreign_and_newer_folders_are_refused(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        uf.Model.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(FormatError, match="not a userip_fast model"):
        uf.Model.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "userip_fast.model.fitted", "version": 99}')
    with pytest.raises(FormatError, match="version 99"):
        uf.Model.load(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4-double"])
def test_external_models_run_also_in_nf4(family, quantization, tmp_path):
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    folder = tiny.save(family, tmp_path / "lm")
    config = replace(CONFIG, lm=LMConfig(path=str(folder), quantization=quantization))
    model = uf.fit(read(), config=config, out=tmp_path / "run")
    loaded = uf.Model.load(tmp_path / "run" / "model")
    assert loaded.lm.quantization == quantization
    assert (loaded.infer(read()) == model.infer(read())).all()
    assert not any(p.requires_grad for p in loaded.lm.model.parameters())

    tiny.model(family, scale=3.0).save_pretrained(folder)
    with pytest.raises(MismatchError, match="not the one the codebooks were learned with"):
        uf.Model.load(tmp_path / "run" / "model")


def test_stories260k_runs(shared_dir, tmp_path):
    model = uf.fit(
        read(), str(shared_dir / "models" / "stories260K"), FIELDS,
        {"em": {"steps": 2}, "lm": {"quantization": "none"}}, tmp_path / "run",
    )  # fmt: skip
    assert model.lm.hidden_size == 64
    assert uf.Model.load(tmp_path / "run" / "model").infer(read()).shape == (40, 2)


def test_models_that_cannot_be_used_are_refused_by_name(tmp_path):
    from transformers import BertConfig, BertModel, FalconConfig, FalconForCausalLM

    with pytest.raises(UnsupportedError, match="there is no such folder"):
        uf.fit(read(), str(tmp_path / "nowhere"), config=CONFIG)
    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=32, vocab_size=320)
    ).save_pretrained(tmp_path / "bert")  # fmt: skip
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    FalconForCausalLM(
        FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    ).save_pretrained(tmp_path / "falcon")
    tiny.tokenizer().save_pretrained(tmp_path / "falcon")
    for name in ("bert", "falcon"):
        with pytest.raises(UnsupportedError):
            uf.fit(read(), str(tmp_path / name), config=CONFIG)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    folder = tiny.save("gpt2", tmp_path / "lm")
    config = replace(CONFIG, lm=LMConfig(path=str(folder), quantization="none"),
                     data=DataConfig(max_tokens=1000))  # fmt: skip
    with pytest.raises(
        MismatchError, match=r"the LM has 256 positions; set data\.chunk_tokens .* to at most"
    ):
        uf.fit(read(), config=config)


TEXT = "a {title}[[, {title}]]"


def read_as(**kwargs):
    log, items = tables()
    log = log.rename_columns(["who", "item_id", "when", "stars"])
    told = {"user": "who", "rating": "stars", "time": "when", "text": TEXT, "min_history": 2}
    return uf.read_interactions(log, items, **{**told, **kwargs})


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_fitted_from_python_remembers_what_it_read(tmp_path, streamed):
    data = read_as()
    if streamed:
        log, items = tables()
        log = log.rename_columns(["who", "item_id", "when", "stars"])
        for name, table in (("log", log), ("items", items)):
            pq.write_table(table, tmp_path / f"{name}.parquet")
        data = uf.stream_interactions(
            tmp_path / "log.parquet", tmp_path / "items.parquet", work=tmp_path / "work",
            user="who", rating="stars", time="when", text=TEXT, min_history=2,
        )  # fmt: skip
    uf.fit(data, config=CONFIG, out=tmp_path / "run")
    model = uf.Model.load(tmp_path / "run" / "model")
    d = model.config.data
    assert (d.user, d.item, d.rating, d.time) == ("who", "item_id", "stars", "when")
    assert (d.text, d.min_history, d.max_tokens) == (TEXT, 2, 100)
    want = uf.FeatureBank.open(tmp_path / "run" / "bank").lookup(read_as().user_keys)
    assert (model.infer(read_as()) == want).all()


def test_users_told_in_another_text_are_refused(fitted, tmp_path):
    uf.fit(read_as(), config=CONFIG, out=tmp_path / "run")
    model = uf.Model.load(tmp_path / "run" / "model")
    with pytest.raises(MismatchError, match=r"text='\{title\}': the model was fitted on .*'a \{ti"):
        model.infer(read_as(text="{title}"))
    assert len(model.infer(read_as(min_history=3), max_users=5)) == 5
    # A model that does not know, as older ones: its fingerprint is what it was, all data goes.
    older = uf.Model.load(tmp_path / "run" / "model")
    older.format = replace(older.format, text=None)
    assert "text" not in older.format.to_dict()
    assert older.infer(read_as(text="{title}")).shape[1] == 2


@pytest.mark.parametrize(
    ("estep", "recipe"),
    [("gradient", "userip"), ("posterior", "userip"), ("amortised", "userip"),
     ("gradient", "paper"), ("amortised", "paper")],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [(1,), (1, 3)])
def test_fields_of_a_single_code_are_fitted_saved_and_read(estep, recipe, sizes, tmp_path):
    config = replace(
        CONFIG,
        em=replace(CONFIG.em, estep=estep, recipe=recipe, paper_epochs=1, rounds=1),
        fields=tuple(uf.ProfileField(f"f{k}{j}", "is", 1, k) for j, k in enumerate(sizes)),
    )
    uf.fit(read(), config=config, out=tmp_path)
    codes = uf.Model.load(tmp_path / "model").infer(read())
    assert (codes[:, 0] == 0).all()
    assert codes.shape == (40, len(sizes))


@pytest.mark.parametrize("said", ["userip_fast.model", "userip_fast.model.fitted"])
def test_models_of_before_are_read(fitted, tmp_path, said):
    """Whatever their manifest calls them."""
    model, run = fitted
    shutil.copytree(run / "model", tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["format"] == "userip_fast.model"
    del manifest["sha256"]  # of a model from before manifests had sums
    (tmp_path / "m" / "manifest.json").write_text(json.dumps({**manifest, "format": said}))
    assert uf.Model.load(tmp_path / "m").fingerprint == model.fingerprint

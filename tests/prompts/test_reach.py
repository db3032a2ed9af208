"""What does not reach the LM is counted and said: cut histories, text that is unknown to it."""

import json
import logging

import pytest
import small_log
import tiny

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.data import Catalogue, stream_interactions
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.reach import Reach


def source_of(data, **kwargs):
    fmt = BehaviourFormat.fit(DataConfig(**kwargs), data, 0)
    return BehaviourSource(fmt.events(data, Catalogue.from_interactions(data)), fmt)


def read():
    return uf.read_interactions(*small_log.tables(), rating="rating", time="timestamp")


@pytest.mark.parametrize("max_tokens", [12, 25, 60, 256])
def test_counts_are_those_of_the_behaviour_that_is_built(max_tokens):
    data, tokenizer = read(), tiny.tokenizer()
    source = source_of(data, max_tokens=max_tokens)
    layout = tiny.template().layout(tokenizer)
    for a, b in ((0, 30), (7, 8), (3, 21), (5, 5)):
        behaviour, told = source.block(tokenizer, layout, a, b), source.reach(tokenizer, a, b)
        assert told.told == behaviour.events.sum()
        assert told.tokens == len(behaviour.ids)
        assert told.events == (b - a) * small_log.EVENTS
        assert told.users_cut == (behaviour.events < small_log.EVENTS).sum()
        assert told.unknown == 0
    parts = source.reach(tokenizer, 0, 11) + source.reach(tokenizer, 11, 30)
    assert parts == source.reach(tokenizer, 0, 30)
    assert (source.reach(tokenizer, 0, 30).users_cut == 0) is (max_tokens == 256)


def test_unknown_tokens_are_counted_where_they_are_told():
    from test_text_tokens import wordlevel

    tokenizer = wordlevel()
    unknown = tokenizer.unk_token_id
    source = source_of(read(), max_tokens=256)
    layout = tiny.template().layout(tokenizer)
    told = source.reach(tokenizer, 0, 30)
    assert told.unknown == (source.block(tokenizer, layout, 0, 30).ids == unknown).sum() > 0


def test_losses_are_said_and_nothing_else(caplog):
    with caplog.at_level(logging.WARNING):
        Reach(1000, 1000, 0, 5000, 50).warn(256, 256)
    assert not caplog.text
    Reach(100_174, 40, 2, 100, 84).warn(256, 256)
    assert "data.max_tokens=256 cuts the histories of 2 users: 40 of 100,174 events" in caplog.text
    assert "does not know 84.0 % of the text (<unk>)" in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_fit_and_infer_tell_it(tmp_path, caplog, streamed, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    lm = LMConfig(embedded_hidden=16, embedded_heads=2, embedded_layers=1, embedded_tokens=2_000,
                  embedded_vocab=320)  # fmt: skip
    config = Config(
        data=DataConfig(max_tokens=15), lm=lm, em=EMConfig(steps=1, block_users=7),
        fields=(uf.ProfileField("taste", "taste", 1, 4),),
    )  # fmt: skip
    data = read()
    if streamed:
        paths = small_log.write(tmp_path)
        data = stream_interactions(
            *paths, work=tmp_path / "work", rating="rating", time="timestamp"
        )
    with caplog.at_level(logging.WARNING):
        model = uf.fit(data, config=config, out=tmp_path / "run")
    assert "data.max_tokens=15 cuts the histories of" in caplog.text
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["told"]
    assert told["events"] == small_log.USERS * small_log.EVENTS
    assert 0 < told["told"] < told["events"]
    found = {}
    model.infer(data, tmp_path / "bank", log=found.update)
    assert found["told"] == told

"""What the embedded LM is pre-trained on: prompts whose soft rows tell of other behaviour."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, LMConfig
from userip_fast.data import Catalogue
from userip_fast.lm import lessons, pretraining
from userip_fast.lm.lessons import Batches, Data
from userip_fast.lm.pretraining import _contrast, _Judges, _new_model, _SoftRows
from userip_fast.model.prepare import load_lm
from userip_fast.prompts.behaviour import BehaviourSource, Told
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import ProfileField

USERS = 60
SMALL = LMConfig(
    embedded_hidden=32, embedded_layers=1, embedded_vocab=300, embedded_tokens=150_000,
    quantization="none",
)  # fmt: skip


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(lessons, "STEP_TOKENS", 150)
    monkeypatch.setattr(lessons, "_PROMPT_TOKENS", 12)

    def make(words=None, **kwargs):
        layout = tiny.template(2, 1).layout(tiny.tokenizer())
        behaviour = tiny.behaviour(layout, USERS, **kwargs)
        events = int(behaviour.events.sum())
        offsets = np.concatenate([[0], np.cumsum(behaviour.events)]).astype(np.int64)
        kinds = np.arange(events)  # each event is one of its own
        told = Told([f"t{i}" for i in kinds], None, np.ones(events, np.int64), kinds, offsets)
        data = Data.of(behaviour, layout, told, words, 0)
        return Batches(data, layout, np.random.default_rng(0)), layout

    return make


def batches_of(batches):
    """One pass over the prompts."""
    yield batches.next()
    while batches.queue:
        yield batches.next()


@pytest.mark.parametrize("context", ["sequence", "independent"])
@pytest.mark.parametrize("text_weight", [0.0, 1.0])
def test_events_are_found_by_their_loss(make, context, text_weight):
    data = make(context=context, text_weight=text_weight)[0].data
    assert data.event[-1] + 1 == data.behaviour.events.sum() == len(data.kind)


def test_independent_events_are_told_of_others(make):
    """A vector of its own for each event: none of a prompt's own is told there."""
    batches, _ = make(context="independent")
    data = batches.data
    batches.data = replace(data, vectors=np.eye(len(data.kind), dtype=np.float32))
    seen = asked = 0
    for prompt, (a, b) in enumerate(zip(data.prompts[:-1], data.prompts[1:])):
        told = np.zeros((2, len(data.kind)), np.float32)
        loss = batches._tell(prompt, told)
        assert (told[:, data.event[a:b][loss]] == 0).all()
        others = told.any(0).nonzero()[0]
        assert set(np.searchsorted(np.cumsum(data.behaviour.events), others, side="right")) <= {
            data.user[prompt]
        }
        seen, asked = seen + told.any(), asked + loss.sum()
    assert seen > len(data.prompts) // 4
    assert asked > len(data.behaviour.ids) // 2


def test_a_sequence_tells_half_and_asks_for_the_rest(make):
    batches, _ = make(context="sequence")
    with_loss = sum(int((b.target >= 0).sum()) for b in batches_of(batches))
    assert 0 < with_loss < len(batches.data.behaviour.ids) - USERS


def test_known_words_stand_in_the_soft_rows(make):
    words = np.arange(2 * USERS).reshape(USERS, 2) % 7
    batches, _ = make(words=words, context="sequence")
    asked = rows = 0
    for b in batches_of(batches):
        assert not b.told.any()
        asked, rows = asked + int((b.target >= 0).sum()), rows + len(b.words)
    assert asked == len(batches.data.behaviour.ids) - USERS
    assert rows == USERS


def test_judges_are_learned_from_nowhere(make):
    batches, layout = make(context="independent")
    data = batches.data
    assert data.judges.sum() == USERS // 10
    theirs = data.judges[np.repeat(np.arange(USERS), data.behaviour.events)]
    assert not data.vectors[data.kind[theirs]].any()
    assert data.vectors[data.kind[~theirs]].any()
    learned = np.concatenate(
        [np.unique(b.event[(b.target >= 0).numpy()]) for b in batches_of(batches)]
    )
    assert not theirs[learned].any()
    asked = [
        np.unique(b.event[(b.target >= 0).numpy()]) for b in _Judges(data, layout, 0, 16).batches
    ]
    assert theirs[np.concatenate(asked)].all()


def test_what_tells_users_apart_is_the_difference_of_their_likelihoods(make):
    """Against the definition, event by event."""
    batches, layout = make(context="independent", feedback=False, text_weight=1.0)
    data = batches.data
    config = replace(SMALL, embedded_layers=1)
    model = _new_model(tiny.tokenizer(), layout, data.behaviour, config)
    soft = _SoftRows(model.get_input_embeddings(), layout, data.vectors.shape[1], 32)
    b = batches.next()
    with torch.no_grad():
        _, got = _contrast(model, soft, layout, b)
        own = pretraining._token_losses(model, soft, layout, b)
        other = pretraining._token_losses(model, soft, layout, replace(b, told=b.told.roll(1, 0)))
    losses = []
    for event in np.unique(b.event[(b.weight > 0).numpy()]):
        here = torch.from_numpy(b.event == event) & (b.weight > 0)
        gap = (other - own)[here] @ b.weight[here]
        losses.append(torch.nn.functional.softplus(-gap))
    torch.testing.assert_close(got, torch.stack(losses).mean())


def planted(users, noise=0.1):
    """Users who choose titles of one of two vocabularies."""
    random = np.random.default_rng(1)
    titles = [f"red rose {i}" for i in range(12)] + [f"blue boat {i}" for i in range(12)]
    user = np.repeat(np.arange(users), 12)
    side = (user % 2) ^ (random.random(len(user)) < noise)
    item = random.integers(0, 12, len(user)) + 12 * side
    log = pa.table({"user_id": user, "item_id": item})
    return uf.read_interactions(log, pa.table({"item_id": range(24), "title": titles}))


def pretrained(data, **lm):
    config = Config(
        data=DataConfig(behaviour_context="independent"),
        lm=replace(SMALL, **lm),
        fields=(ProfileField("taste", "", 1, 2),),
    )
    fmt = BehaviourFormat.fit(config.data, data, 0)
    source = BehaviourSource(fmt.events(data, Catalogue.from_interactions(data)), fmt)
    lm = load_lm(source, config)
    return lm, json.loads((Path(lm.source) / "training.json").read_text())


def test_new_users_are_told_apart(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="userip_fast.lm"):
        lm, training = pretrained(planted(200))
    nll = training["nll"]
    # Whose choice is it? Of two users one in two is of the same side, and tells nothing.
    assert nll["untold"] - nll["told"] > 0.05  # 0.18 is what there is
    assert not caplog.records
    kinds = [("red rose 1", ""), ("blue boat 1", ""), ("never met", "")]
    red, blue, nobody, unknown = lm.foldin.theta(
        kinds, np.array([0, 0, 0, 1, 1, 1, 2]), np.array([0, 3, 6, 6, 7])
    )
    assert torch.equal(nobody, lm.foldin.bias)
    assert torch.equal(unknown, lm.foldin.bias)
    assert (red - blue).norm() > 0.5 * lm.embedding_rms * red.numel() ** 0.5


def test_training_ends_where_new_users_gain_nothing(tmp_path, monkeypatch, caplog):
    """Nothing that a user did tells of what he does next: that is said, and little is spent."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="userip_fast.lm"):
        _, training = pretrained(planted(60, noise=0.5), embedded_tokens=4_000_000)
    spent = training["tokens"][-1]
    assert spent < 4_000_000
    best = int(np.argmin(training["held_out"]))
    assert best >= len(training["held_out"]) - 1 - (pretraining._DROPS + 1) * pretraining._PATIENCE
    assert "does not help it to predict them" in caplog.text

"""What the embedded LM is pre-trained on: prompts whose soft rows tell of other behaviour."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from userip_fast.lm import embedded
from userip_fast.lm.embedded import _Batches
from userip_fast.packing import telling

USERS = 9


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(embedded, "_STEP_TOKENS", 150)
    monkeypatch.setattr(embedded, "_PROMPT_TOKENS", 12)

    def make(slots=None, **kwargs):
        tokenizer, template = tiny.tokenizer(), tiny.template(2, 1)
        layout = template.layout(tokenizer)
        behaviour = tiny.behaviour(layout, USERS, **kwargs)
        generator = np.random.default_rng(0)
        return _Batches(tokenizer, template, layout, behaviour, slots, generator), behaviour

    return make


def prompts_of(batches):
    """(tokens, tokens with loss, soft rows) of one pass over the prompts."""
    while True:
        b = batches.next()
        for row in range(len(b.ids)):
            n = int((b.mask[row, 0].sum(1) > 1).sum())
            yield b.ids[row, batches.head : n], b.target[row], b.soft[row], b.weight[row]
        if not batches.queue:
            return


@pytest.mark.parametrize("context", ["sequence", "independent"])
@pytest.mark.parametrize("text_weight", [0.0, 1.0])
def test_events_are_found_by_their_loss(make, context, text_weight):
    batches, behaviour = make(context=context, text_weight=text_weight)
    assert batches.event[-1] + 1 == behaviour.events.sum()


@pytest.mark.parametrize("context", ["sequence", "independent"])
def test_soft_rows_are_shares_of_tokens(make, context):
    batches, behaviour = make(context=context)
    for _, target, soft, weight in prompts_of(batches):
        torch.testing.assert_close(soft.sum(1), torch.ones(2))
        assert (weight[target < 0] == 0).all()
        assert (soft[:, np.setdiff1d(np.arange(soft.shape[1]), behaviour.ids)] <= 0.5).all()


def test_independent_events_are_told_of_others(make):
    """Each event has a token of its own here; none stands in the soft rows of its own prompt."""
    batches, behaviour = make(context="independent")
    n = len(behaviour.ids)
    vocabulary = batches.neutral.shape[1]
    ids = behaviour.ids.copy()
    starts = np.flatnonzero(np.diff(batches.event, prepend=-1))
    ids[starts] = vocabulary + np.arange(len(starts))
    batches.behaviour = replace(behaviour, ids=ids)
    batches.neutral = np.zeros((2, vocabulary + len(starts)))
    seen = asked = 0
    for prompt, (a, b) in enumerate(zip(batches.prompts[:-1], batches.prompts[1:])):
        soft = np.zeros_like(batches.neutral)
        loss = batches._tell(prompt, soft)
        here = np.isin(np.arange(vocabulary, soft.shape[1]), ids[a:b][loss])
        assert (soft[:, vocabulary:][:, here] == 0).all()
        seen, asked = seen + soft[:, vocabulary:].any(), asked + loss.sum()
    assert seen > len(batches.prompts) // 4
    assert asked > n // 2
    assert batches.prompts[-1] == n
    user = np.searchsorted(behaviour.offsets, batches.prompts[:-1], side="right")
    last = np.searchsorted(behaviour.offsets, batches.prompts[1:] - 1, side="right")
    assert (user == last).all(), "a prompt holds events of one user"


def test_a_sequence_tells_half_and_asks_for_the_rest(make):
    batches, behaviour = make(context="sequence")
    with_loss = sum((target >= 0).sum() for _, target, _, _ in prompts_of(batches))
    assert 0 < with_loss < len(behaviour.ids) - USERS


def test_known_words_stand_alone(make):
    slots = np.arange(2 * USERS).reshape(USERS, 2) % 7
    batches, behaviour = make(slots=slots, context="sequence")
    asked = 0
    for _, target, soft, _ in prompts_of(batches):
        assert soft.max(1).values.tolist() == [1.0, 1.0]
        asked += int((target >= 0).sum())
    assert asked == len(behaviour.ids) - USERS


def test_telling_weighs_what_carries_loss():
    assert telling(np.array([0, 0, 0, 1], np.float32)).tolist() == [0.125, 0.125, 0.125, 0.625]

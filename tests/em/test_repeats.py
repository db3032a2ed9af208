"""An event told again: who buys an item ten times has not told ten things of himself."""

from dataclasses import replace

import numpy as np
import pytest
from test_lifts import CHOICES, FIT, choices, lm, source_of  # noqa: F401

import userip_fast as uf
from userip_fast.core.config import DataConfig
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.packing import told_events
from userip_fast.serve import Server


def twice(data):
    """The same users, who chose each of their items twice."""
    events = np.repeat(np.arange(data.num_events), 2)
    return replace(
        data,
        item_index=data.item_index[events],
        time=None if data.time is None else data.time[events],
        order=None if getattr(data, "order", None) is None else data.order[events],
        offsets=data.offsets * 2,
    )


def test_a_choice_is_told_once(lm):  # noqa: F811
    source = source_of()
    assert not source.format.repeats
    told = source.told(lm.tokenizer, 0, 60)
    user = np.repeat(np.arange(60), np.diff(told.offsets))
    pairs = list(zip(user.tolist(), told.kinds.tolist()))
    assert len(pairs) == len(set(pairs))
    every = source.told(lm.tokenizer, 0, 60, repeats=True)
    owner = np.repeat(np.arange(60), np.diff(every.offsets))
    assert set(zip(owner.tolist(), every.kinds.tolist())) == set(pairs)
    assert len(every.kinds) > len(pairs)
    # In the order in which they were first told.
    first = list(dict.fromkeys(zip(owner.tolist(), every.kinds.tolist())))
    assert first == pairs


def test_sequences_and_plain_likelihoods_tell_all():
    data = choices()
    assert BehaviourFormat.fit(DataConfig(), data, 0).repeats
    assert BehaviourFormat.fit(replace(CHOICES, negatives=2, loss="all"), data, 0).repeats
    made = BehaviourFormat.fit(CHOICES, data, 0)
    assert BehaviourFormat.from_dict(made.to_dict()) == made
    # Models from before told repeats, and keep their fingerprints.
    assert "repeats" not in replace(made, repeats=True).to_dict()


def test_profiles_agree_however_they_are_asked(lm, tmp_path):  # noqa: F811
    data = choices()
    model = uf.fit(data, lm, config=FIT, out=tmp_path / "run")
    items = data.item_keys.to_pylist()
    own, again = items[:4], [*items[:4], *items[:3], items[0]]
    want = model.profile(own)
    np.testing.assert_array_equal(model.profile(again), want)
    server = Server.open(tmp_path / "run" / "model")
    np.testing.assert_allclose(server.profile(again), server.profile(own), rtol=0, atol=0)
    for opened in (model.open_profile(again), server.open_profile(again)):
        np.testing.assert_allclose(opened.probabilities, want, atol=1e-5)
        assert opened.events == len(again)
        opened.add(items[0], weight=-1.0)  # two of three are left
        np.testing.assert_allclose(opened.probabilities, want, atol=1e-5)
        opened.add(items[0], weight=-1.0)
        opened.add(items[0], weight=-1.0)
        np.testing.assert_allclose(opened.probabilities, model.profile(own[1:]), atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_an_event_that_is_too_long_hides_others_of_a_sequence_alone(apart):
    size, offsets = np.array([3, 9, 2, 4]), np.array([0, 3, 4])
    told, user = told_events(size, offsets, 20, 8, apart)
    assert told.tolist() == [apart, False, True, True]
    assert user.tolist() == [0, 0, 0, 1]
    told, _ = told_events(size, offsets, 4, 8, apart)
    assert told.tolist() == [False, False, True, True]

"""Choices told by text alone: lifts over what anybody would choose, and how sure they make."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from test_resume import read
from test_table import CONFIG, SIZES, books_of, engine_of

import userip_fast as uf
from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config, DataConfig, EMConfig
from userip_fast.core.errors import FormatError
from userip_fast.data import Catalogue
from userip_fast.em.calibrate import chunks
from userip_fast.em.crowd import Crowd
from userip_fast.em.lifts import PLAIN, Calibration, Usual, log_lifts, log_norm
from userip_fast.em.readings import Readings
from userip_fast.em.table import EventTable, Grid
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import ProfileField

CHOICES = DataConfig(behaviour_context="independent", negatives=0)
FIT = Config(
    data=replace(CHOICES, chunk_tokens=64),
    em=EMConfig(estep="posterior", rounds=2, start="random"),
    fields=(ProfileField("taste", "", 1, 3),),
)


@pytest.fixture(scope="module")
def lm():
    return tiny.frozen("llama")


def choices(users=60):
    return replace(read(users), rating=None)


def source_of(users=60, rated=False):
    data = read(users) if rated else choices(users)
    fmt = BehaviourFormat.fit(CHOICES, data, 0)
    return BehaviourSource(fmt.events(data, Catalogue.from_interactions(data)), fmt)


def crowd_of(lm, fields=2, rated=False, **settings):
    engine = engine_of(lm, fields)
    neutral = torch.zeros(fields, lm.hidden_size)
    prompts = tuple(ProfileField(f"f{j}", "", 1, SIZES[j]) for j in range(fields))
    config = replace(CONFIG, **settings)
    return Crowd(source_of(60, rated), 60, engine, config, prompts, neutral)


def test_choices_are_told_by_their_text(lm):
    fmt = source_of().format
    assert fmt.words == ()
    assert fmt.template == "{text}"


def test_shares_times_lifts_add_up_to_one(lm):
    crowd = crowd_of(lm)
    found = crowd.judge(books_of(lm, 2))
    share = crowd.counts / crowd.counts.sum()
    total = (share[:, None] * found.table.double().exp()).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)


def test_what_all_codes_find_hard_cancels(lm):
    """The lift of a text is how it differs from the same text with nothing told."""
    crowd = crowd_of(lm, 1)
    neutral = torch.full((1, lm.hidden_size), 0.1)
    soft = torch.cat([neutral[None], torch.randn(2, 1, lm.hidden_size)])
    lifts = log_lifts(crowd.engine, crowd.readings, soft, neutral, 512)
    assert torch.equal(lifts[:, 0], torch.zeros(len(lifts)))
    assert lifts[:, 1:].abs().max() > 0.1
    assert float(log_norm(lifts, crowd.counts)[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rated", [False, True])
def test_the_gradient_is_that_of_the_normalised_likelihood(lm, rated):
    """A full M-step, against differences of the objective that it descends."""
    crowd, books = crowd_of(lm, rated=rated), books_of(lm, 2)
    found = crowd.judge(books)
    stats = crowd.stats(found, books)
    observed = observed_of(crowd, found, books)
    # What is observed and what is expected add up to the same: of a code, or of a code and item.
    words = 3 if rated else len(crowd.texts)
    apart = found.shares.view(-1, words, 12).sum(1)
    assert float(apart.abs().max()) < 1e-5 * float(observed.sum())
    torch.manual_seed(0)
    step = [torch.randn_like(book.codewords) for book in books]

    def value(size):
        moved = [Codebook(b.codewords + size * s) for b, s in zip(books, step)]
        table = crowd._table(Grid(moved, crowd.engine))
        return -float((observed * table.double()).sum())

    size = 3e-3
    want = (value(size) - value(-size)) / (2 * size)
    got = sum(float((g * s.double()).sum()) for g, s in zip(stats.gradient, step))
    assert got == pytest.approx(want, rel=2e-2)


def observed_of(crowd, found, books):
    """[E, Z] responsibilities of the training users, added up over the events of a kind."""
    out = torch.zeros_like(found.table, dtype=torch.float64)
    prior = Grid(books, crowd.engine).log_prior
    for first, told in chunks(crowd.source, crowd.engine.lm.tokenizer, len(crowd.judging)):
        kinds, user, offsets = crowd._known(told)
        log_resp, _ = uf.ops.profile_posterior(found.table, kinds, offsets, prior)
        trains = torch.from_numpy(~crowd.judging[first : first + len(log_resp)])
        out.index_add_(0, kinds, (log_resp.double().exp() * trains[:, None])[user])
    return out


def test_reactions_to_an_item_add_up_to_one(lm):
    crowd = crowd_of(lm, rated=True)
    found = crowd.judge(books_of(lm, 2))
    total = found.table.double().exp().view(len(crowd.texts), 3, -1).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)
    usual = crowd.usual
    nothing = usual.values(torch.zeros(3, 2), ["never met"], 1.0).exp()
    counts = usual.counts.sum(0) + 1.0
    torch.testing.assert_close(
        nothing, torch.from_numpy(counts / counts.sum()).float()[:, None].expand(3, 2)
    )
    again = Usual.from_arrow(usual.to_arrow())
    assert again.digest == usual.digest
    told = usual.to_arrow()
    for bad in (told.drop_columns("counts"), told.set_column(0, "text", pa.nulls(len(told)))):
        with pytest.raises(FormatError):
            Usual.from_arrow(bad)


def test_weights_shrink_with_the_history():
    offsets = np.array([0, 1, 1, 11])
    assert PLAIN.weights(offsets) is None
    got = Calibration(half_events=10.0).weights(offsets)
    want = torch.tensor([10 / 11] + 10 * [0.5], dtype=torch.float32)
    torch.testing.assert_close(got, want)


def test_calibrations_are_kept_and_checked():
    neutral, norm = torch.zeros(1, 4), torch.arange(6.0).double()
    made = Calibration(neutral, norm, 30.0)
    again = Calibration.from_state(made.state(), neutral, 6)
    assert again.half_events == 30.0
    assert torch.equal(again.log_norm, norm)
    assert again.code_prior == 1
    for norm_or_none in (norm, None):
        share = Calibration(neutral, norm_or_none, code_prior=0.2)
        assert Calibration.from_state(share.state(), neutral, 6).code_prior == 0.2
        assert not share.plain
    assert Calibration.from_state({}, neutral, 6).plain
    orders = [torch.tensor([1, 0]), torch.tensor([2, 0, 1])]
    moved = made.reordered(orders).log_norm.view(2, 3)
    assert torch.equal(moved, norm.view(2, 3)[orders[0]][:, orders[1]])
    for bad in (
        {"log_norm": norm[:5]},
        {"log_norm": norm.float()},
        {"half_events": norm},
        {"code_prior": norm},
        {"code_prior": torch.tensor([1.5]).double()},
    ):
        with pytest.raises(FormatError):
            Calibration.from_state(bad, neutral, 6)


def test_a_model_of_choices_profiles_and_ranks(lm, tmp_path):
    data = choices()
    model = uf.fit(data, lm, config=FIT)
    assert model.calibration.log_norm is not None
    items = data.item_keys.to_pylist()
    p = model.profile(items[:5])
    liked = model.affinity(p, items)
    assert liked.shape == (len(items),)
    prior = model.event_table().grid.log_prior.exp().float().numpy()
    np.testing.assert_allclose(model.affinity(prior, items), 1, rtol=1e-5)
    np.testing.assert_allclose(model.profile([]), prior, rtol=1e-5)
    table = model.event_table()
    plain = EventTable(table.engine, model.format, model.codebooks, model.config.em)
    plain.read(table._numbering.number)
    neutral, norm = model.calibration.neutral, model.calibration.log_norm
    told = model.format.kinds(lm.tokenizer, model.layout, list(table._numbering.number))
    lifts = log_lifts(table.engine, Readings.of(told), table.grid.soft, neutral, 512)
    if (counted := model.calibration.counted) is not None:
        lifts = lifts + counted.log_of(table.texts)
    torch.testing.assert_close(table.values, (lifts - norm).float(), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(table.values, plain.values)

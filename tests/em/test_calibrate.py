"""What judges choose: how far counts are trusted beside the LM, and how much an event says."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from test_lifts import FIT, choices, lm  # noqa: F401
from test_resume import read

import userip_fast as uf
from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.core.errors import FormatError
from userip_fast.em import trainer
from userip_fast.em.calibrate import _Best, _Judges, calibrate
from userip_fast.em.columns import Grid
from userip_fast.em.counted import Counted, expected
from userip_fast.em.crowd import Crowd
from userip_fast.em.lifts import Calibration, Usual
from userip_fast.lm import lessons
from userip_fast.lm.foldin import FoldIn
from userip_fast.model.prepare import prepare
from userip_fast.prompts.behaviour import Told, judging

K = 2
WORDS = ("bad", "good")


class World:
    """Users of two tastes, whose events the LM's table tells apart as far as it says."""

    def __init__(self, users, events, items, copies=1, words=(), seed=0):
        random = np.random.default_rng(seed)
        self.texts = [f"item {i}" for i in range(items)]
        self.taste = random.integers(K, size=users)
        if words:
            good = random.uniform(0.1, 0.9, (K, items))
            item = random.integers(items, size=(users, events // copies))
            how = random.random(item.shape) < good[self.taste[:, None], item]
            kinds = (2 * item + how).repeat(copies, 1)
            p = np.stack([1 - good, good], 2).reshape(K, -1)
        else:
            p = random.dirichlet(np.full(items, 0.8), K)
            kinds = np.stack([random.choice(items, events // copies, p=p[z]) for z in self.taste])
            kinds = kinds.repeat(copies, 1)
        self.words, self.kinds = words, kinds
        self.p = np.ascontiguousarray(np.log(p.T))
        self.counts = {}
        names = [(t, w) for t in self.texts for w in words or ("",)]
        for i, n in enumerate(np.bincount(kinds.ravel(), minlength=len(names)).tolist()):
            self.counts[names[i]] = n
        self.events = torch.tensor(list(self.counts.values()), dtype=torch.float64)
        self.fmt = SimpleNamespace(words=words, feedback_weight=1.0)
        self.source = SimpleNamespace(format=self.fmt, told=self.told)

    def told(self, tokenizer, first, last):
        kinds = self.kinds[first:last].astype(np.int64)
        offsets = np.arange(len(kinds) + 1) * kinds.shape[1]
        return Told([], None, np.zeros(0, np.int64), kinds.ravel(), offsets)

    def table(self, lifts, neutral):
        return SimpleNamespace(
            engine=SimpleNamespace(lm=SimpleNamespace(tokenizer=None)),
            calibration=Calibration(neutral, raw=True),
            values=lifts.float(),
            texts=self.texts,
            words=self.words or ("",),
            grid=Grid([Codebook(torch.zeros(K, 2))], None),
            rows_told=lambda told: told.kinds,
        )

    def calibrate(self, lifts, neutral=None, judging=None, groups=None):
        usual = Usual.of(self.counts, self.words) if self.words and neutral is not None else None
        if judging is None:
            judging = np.arange(len(self.kinds)) % 5 == 0
        table = self.table(lifts, neutral)
        return calibrate(self.source, judging, table, self.counts, usual, groups)


@pytest.mark.parametrize("copies", [1, 8])
def test_events_that_say_the_same_count_less(copies):
    """Where events are drawn apart each counts whole; where each draw is told again and again,
    later events are predicted best when it counts for less."""
    world = World(400, 64, 20, copies)
    half = world.calibrate(torch.from_numpy(world.p), judging=np.ones(400, bool))[0].half_events
    assert half >= 100 if copies == 1 else half <= 30


@pytest.mark.parametrize("words", [(), WORDS])
def test_counts_speak_where_the_lm_does_not_tell(words):
    """The LM knows the taste of half of the items' choosers; counts tell of the other half."""
    world = World(1500, 40, 30, words=words)
    known = torch.arange(len(world.p)) < len(world.p) // 2
    lifts = torch.from_numpy(world.p)
    usual = lifts.exp().mean(1, keepdim=True).log()
    lifts = torch.where(known[:, None], lifts - usual, 0.0)
    how, _ = world.calibrate(lifts, torch.zeros(1, 2))
    values = how.values(lifts.float(), world.texts, 1.0).double()
    truth = torch.from_numpy(world.p)
    if not words:
        truth = truth - (world.events / world.events.sum()).log()[:, None]
        total = (values.exp() * (world.events / world.events.sum())[:, None]).sum(0)
        torch.testing.assert_close(total, torch.ones(K).double(), rtol=1e-5, atol=0)
    before = how.counted
    alone = Calibration(torch.zeros(1, 2), torch.zeros(K).double(), usual=how.usual)
    off = (alone.values(lifts.float(), world.texts, 1.0) - truth)[~known].abs().mean()
    assert before is not None
    assert (values - truth)[~known].abs().mean() < 0.4 * off
    # An item that was never counted is told by the LM alone.
    assert not before.log_of(["never met"]).any()


def test_rare_tastes_are_named_where_that_tells_more():
    """Seven of ten users have one of eight tastes, and few events say of whom: by the likeliest
    code nearly everybody is that one, and codes tell less of later events."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(12, 3.0), 8)
    events = torch.from_numpy(np.log(p).T.copy()).float()
    prior = torch.tensor([0.7, *[0.3 / 7] * 7]).double().log()
    book = Codebook(torch.zeros(8, 2))
    book.log_prior = prior.float()
    grid = Grid([book], None)

    def users(count):
        taste = random.choice(8, count, p=prior.exp().numpy())
        kinds = [random.choice(12, 30, p=p[z]) for z in taste]
        told = _Judges()
        told.add(np.concatenate(kinds), np.arange(count + 1) * 30, np.ones(count, bool))
        return told

    judges, others = users(3000), users(6000)
    best = _Best(judges)
    best.consider(Calibration(), events, prior, "the LM alone")
    share = best.code_prior(grid, others)
    assert share < 1

    def worth(share):
        return judges.told_by_codes(best.how, events, prior, grid, share, others)

    # Codes tell less than probabilities do, and those of the whole prior less than these.
    assert worth(1.0) < worth(share) < best.most
    log_resp, _ = judges._posterior(5, best.how, events, prior)
    codes = [grid.likeliest(log_resp, s)[1][:, 0].bincount(minlength=8) for s in (1.0, share)]
    assert codes[0].max() > codes[1].max()
    # Nothing told names the usual code whatever the share.
    assert grid.likeliest(prior.float()[None], share)[1].tolist() == [[0]]


@pytest.mark.parametrize("together", [True, False])
def test_fields_that_go_together_have_a_prior_of_their_own(together):
    """Codes of a field that come with those of another are told so; of fields drawn apart the
    product stays."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(24, 0.5), 16)
    world = World(2000, 30, 24)
    first = random.integers(4, size=2000)
    second = first if together else random.integers(4, size=2000)
    taste = 4 * first + second
    world.kinds = np.stack([random.choice(24, 30, p=p[z]) for z in taste])
    world.counts = dict(zip(world.counts, np.bincount(world.kinds.ravel(), minlength=24).tolist()))
    table = world.table(torch.from_numpy(np.log(p).T.copy()), None)
    table.grid = Grid([Codebook(torch.zeros(4, 2)), Codebook(torch.zeros(4, 2))], None)
    judging = np.arange(2000) % 10 == 0
    how, _ = calibrate(world.source, judging, table, world.counts, None)
    if not together:
        assert how.log_prior is None
        return
    share = how.log_prior.exp().view(4, 4)
    assert float(share.diagonal().sum()) > 0.95
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-12)
    # It is kept, moves with the codes, and is what a grid and its marginals go by.
    again = Calibration.from_state(how.state(), None, 16)
    assert torch.equal(again.log_prior, how.log_prior)
    orders = [torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0, 2, 3])]
    moved = how.reordered(orders).log_prior.view(4, 4)
    assert torch.equal(moved, how.log_prior.view(4, 4)[orders[0]][:, orders[1]])
    books = [Codebook(torch.zeros(4, 2)), Codebook(torch.zeros(4, 2))]
    grid = Grid(books, None, None, how.log_prior)
    assert torch.equal(grid.prior, how.log_prior)
    _, codes, _ = grid.likeliest(how.log_prior[None].float())
    assert int(codes[0, 0]) == int(share.sum(1).argmax())
    with pytest.raises(FormatError, match="log_prior"):
        Calibration.from_state({"log_prior": how.log_prior[:5]}, None, 16)


def test_where_the_lm_tells_all_counts_change_little():
    world = World(1500, 40, 30)
    lifts = torch.from_numpy(world.p) - torch.from_numpy(world.p).exp().mean(1, keepdim=True).log()
    how, _ = world.calibrate(lifts, torch.zeros(1, 2))
    assert how.counted is None or np.abs(how.counted.log_factors).mean() < 0.1


@pytest.mark.parametrize("words", [(), WORDS])
def test_an_lm_that_tells_nothing_leaves_what_codes_began_at(words):
    """Its table tells nobody apart, so that its codes count nothing; groups of users do."""
    world = World(1500, 40, 30, words=words)
    lifts = torch.zeros(len(world.p), K)
    truth = torch.from_numpy(world.p)
    groups = truth + 0.3 * torch.randn(truth.shape), torch.tensor([0.4, 0.6]).double().log()
    groups = groups[0].float().contiguous(), groups[1]
    how, log_prior = world.calibrate(lifts, torch.zeros(1, 2), groups=groups)
    assert how.counted is not None
    values = how.values(lifts, world.texts, 1.0).double()
    told = (values[:, 0] - values[:, 1]).numpy()
    assert np.corrcoef(told, (world.p[:, 0] - world.p[:, 1]))[0, 1] > 0.9
    np.testing.assert_allclose(log_prior.exp().sum(), 1, rtol=1e-6)
    share = np.bincount(world.taste, minlength=K) / len(world.taste)
    np.testing.assert_allclose(log_prior.exp(), share, atol=0.1)
    alone, _ = world.calibrate(lifts, torch.zeros(1, 2))
    flat = alone.values(lifts, world.texts, 1.0)
    assert float((flat[:, 0] - flat[:, 1]).abs().max()) < 1e-3


def test_who_judges_is_counted_in_the_end():
    """Of an item that only judges of one taste chose, counts tell that taste."""
    world = World(1500, 40, 30)
    judging = np.arange(len(world.kinds)) % 5 == 0
    world.kinds[world.kinds == 0] = 1
    world.kinds[judging & (world.taste == 1), 0] = 0
    numbers = np.bincount(world.kinds.ravel(), minlength=30)
    world.counts = {(text, ""): int(n) for text, n in zip(world.texts, numbers)}
    world.events = torch.from_numpy(numbers).double()
    lifts = torch.from_numpy(world.p) - torch.from_numpy(world.p).exp().mean(1, keepdim=True).log()
    lifts[0] = 0
    how, _ = world.calibrate(lifts / 2, torch.zeros(1, 2), judging=judging)
    assert how.counted is not None
    told = how.counted.log_of(world.texts[:1])[0]
    assert told[1] - told[0] > 1


def test_who_judges_is_not_among_the_groups(lm, monkeypatch):  # noqa: F811
    """Codewords begin at groups of the training users alone: a judge tells of everybody unseen."""
    told = []

    class Spy(trainer.ToldUsers):
        def __init__(self, foldin, events, words):
            told.append(events)
            super().__init__(foldin, events, words)

    monkeypatch.setattr(trainer, "ToldUsers", Spy)
    zeros = torch.zeros(1, lm.hidden_size)
    language = FoldIn([], torch.zeros(0, 1), zeros[:, None], zeros)
    monkeypatch.setattr(lm, "foldin", language)
    data = read(60)
    source = uf.fit(data, lm, config=FIT).source(data)
    everybody = source.told(lm.tokenizer, 0, source.num_users)
    trains = np.flatnonzero(~judging(source.num_users, EMConfig().held_out))
    (some,) = told

    def events(told, users):
        kinds = list(zip(told.texts, told.words or told.texts))
        bounds = told.offsets.tolist()
        return [[kinds[k] for k in told.kinds[bounds[u] : bounds[u + 1]]] for u in users]

    assert events(some, range(len(trains))) == events(everybody, trains)
    assert len(some.offsets) == len(trains) + 1
    assert set(some.kinds.tolist()) == set(range(len(some.texts))) == set(range(len(some.tokens)))


def test_without_judges_nothing_is_counted():
    world = World(30, 10, 8)
    how, _ = world.calibrate(torch.zeros(8, K), torch.zeros(1, 2), np.zeros(30, bool))
    assert how.counted is None
    assert how.half_events == np.inf


def test_expected_events_add_up_to_the_observed():
    torch.manual_seed(0)
    observed = torch.rand(12, 5, dtype=torch.float64)
    events = observed.sum(1)
    share = events / events.sum()
    values = torch.randn(12, 5).double()
    choice = values - (share[:, None] * values.exp()).sum(0).log()
    fmt = SimpleNamespace(words=(), feedback_weight=1.0)
    got = expected(observed, choice, events, fmt)
    torch.testing.assert_close(got.sum(0), observed.sum(0))
    fmt = SimpleNamespace(words=("a", "b", "c"), feedback_weight=2.0)
    reaction = 2.0 * values.view(4, 3, 5).log_softmax(1).flatten(0, 1)
    got = expected(observed, reaction, events, fmt).view(4, 3, 5).sum(1)
    torch.testing.assert_close(got, observed.view(4, 3, 5).sum(1))


def test_factors_are_kept_checked_and_renumbered():
    random = np.random.default_rng(0)
    observed = torch.from_numpy(random.poisson(3.0, (8, 6))).double()
    made = Counted.of(["a", "b", "c", "d"], observed, torch.full((8, 6), 3.0).double(), 2, 1.0)
    want = ((observed + 1) / 4).log().float().view(4, 2, 6)
    torch.testing.assert_close(
        made.log_of(["c", "x", "a"]).view(3, 2, 6),
        torch.stack([want[2], torch.zeros(2, 6), want[0]]),
        rtol=1e-3,
        atol=1e-3,
    )
    orders = [torch.tensor([1, 0]), torch.tensor([2, 0, 1])]
    moved = made.reordered(orders).log_factors.reshape(4, 2, 2, 3)
    grid = made.log_factors.reshape(4, 2, 2, 3)
    np.testing.assert_array_equal(moved, grid[:, :, orders[0]][:, :, :, orders[1]])
    told = made.to_arrow()
    again = Counted.from_arrow(told, 2, 6)
    assert again.digest == made.digest
    nan = pa.FixedSizeListArray.from_arrays(pa.array(np.full(48, np.nan, np.float32)), 12)
    bad = (told.drop_columns("text"), told.drop_columns("log_factors"))
    bad += (told.set_column(1, "log_factors", nan),)
    for table in bad:
        with pytest.raises(FormatError):
            Counted.from_arrow(table, 2, 6)
    with pytest.raises(FormatError):
        Counted.from_arrow(told, 3, 6)


@pytest.mark.parametrize(
    ("rated", "words"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_a_model_keeps_what_was_counted(lm, tmp_path, rated, words, monkeypatch):  # noqa: F811
    """A fit's table, a loaded model's and one that reads everything anew are the same."""

    def told(self, how, *rest):
        """Whatever the judges of so small a log say: counts are taken, of words too."""
        return float(bool(how.counted and (how.counted.shared or not words)))

    monkeypatch.setattr("userip_fast.em.calibrate._Judges.told", told)
    if words:
        texts = [f"{word} {text}" for text in tiny.TEXTS[:3] for word in ("old", "new")]
        monkeypatch.setattr(tiny, "TEXTS", texts)
    data = read(60) if rated else choices()
    model = uf.fit(data, lm, config=FIT, out=tmp_path / "run")
    counted = model.calibration.counted
    assert counted is not None
    assert (counted.shared is not None) == words
    table = model.event_table()
    kinds = list(table._numbering.number)
    model.save(tmp_path / "model")
    again = uf.Model.load(tmp_path / "model")
    assert again.fingerprint == model.fingerprint
    loaded = again.event_table()
    at = loaded.rows(kinds)
    assert torch.equal(loaded.values[at], table.values)
    model.keep_table(None)
    anew = model.event_table()
    assert anew is not table
    at = anew.rows(kinds)
    assert torch.equal(anew.values[at], table.values)
    (tmp_path / "model" / ("words.parquet" if words else "counted.parquet")).unlink()
    with pytest.raises(FormatError):
        uf.Model.load(tmp_path / "model")


def test_who_judges_is_new_to_the_lm(monkeypatch, tmp_path):
    """The embedded LM has not learned from EM's judges: what it knows by heart would look true."""
    seen = []
    of = lessons.Data.of

    def spy(*told):
        seen.append(of(*told))
        return seen[-1]

    monkeypatch.setattr(lessons.Data, "of", spy)
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path))
    data, brief = choices(100), replace(FIT.lm, embedded_tokens=2_000)
    model, source = prepare(data, replace(FIT, lm=brief))
    crowd = Crowd(source, source.num_users, model.ready_trainer().engine, FIT.em, FIT.fields)
    (data,) = seen
    assert crowd.judged == 10
    batches = lessons.Batches(data, model.layout, np.random.default_rng(0))
    batches._shuffle()
    learned = data.user[np.concatenate(batches.queue)]
    assert not crowd.judging[learned].any()
    assert len(np.unique(learned)) > 80

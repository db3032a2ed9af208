"""The event table says what reading every user apart says; its EM sees all users."""

from dataclasses import replace
from itertools import islice, pairwise, product

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from test_resume import read

import userip_fast as uf
from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config, DataConfig, EMConfig
from userip_fast.data import Catalogue
from userip_fast.em import Block, EMState, crowd
from userip_fast.em.cache import MemoryCache
from userip_fast.em.crowd import Apart, Crowd, draw
from userip_fast.em.lifts import PLAIN
from userip_fast.em.mixture import Mixture
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.readings import Readings, log_likelihoods
from userip_fast.em.table import EventTable, Grid, answers, has_table, survey
from userip_fast.lm import PackedEngine
from userip_fast.lm.engine import ReferenceEngine
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import ProfileField
from userip_fast.prompts.packing import make_pack

CONFIG = EMConfig(estep="posterior", posterior="exact", prune_share=0.0, codeword_draws=0)
SIZES = (3, 4, 2)


@pytest.fixture(scope="module")
def lm():
    return tiny.frozen("llama")


def engine_of(lm, fields, m=1, kind=PackedEngine):
    return kind(lm, tiny.template(fields, m).layout(lm.tokenizer))


def books_of(lm, fields, m=1):
    torch.manual_seed(3)
    books = [Codebook(torch.randn(k, m * lm.hidden_size)) for k in SIZES[:fields]]
    for book in books:
        book.log_prior = torch.randn(len(book)).log_softmax(0)
    return books


def source_of(users=24, rating=True, **settings):
    data = read(users)
    if not rating:
        data = replace(data, rating=None)
    config = DataConfig(behaviour_context="independent", max_tokens=60, **settings)
    fmt = replace(BehaviourFormat.fit(config, data, 0), repeats=True)
    return BehaviourSource(fmt.events(data, Catalogue.from_interactions(data)), fmt)


def block_of(source, engine):
    users = source.num_users
    behaviour = source.block(engine.lm.tokenizer, engine.layout, 0, users)
    return Block(behaviour, source.hashes_of(0, users))


FORMATS = {
    "words of one token": {"feedback_words": ("x", "y", "z")},
    "longer words": {},
    "words of several tokens, one of which begins another": {
        "feedback_words": ("good", "good enough", "zzz")
    },
    "loss on all tokens": {"loss": "all"},
    "words before the text": {"behaviour": "{feedback} {text}"},
    "passed over": {"rating": False},
    "no words": {"behaviour": "{text}", "loss": "all"},
}


@pytest.mark.parametrize("kind", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(("fields", "m"), [(1, 2), (2, 1)])
def test_a_kind_reads_the_same_shared_or_alone(lm, kind, name, fields, m):
    engine, source = engine_of(lm, fields, m, kind), source_of(**FORMATS[name])
    kinds = sorted(survey(source, lm.tokenizer, 0, 24))
    told = source.format.kinds(lm.tokenizer, engine.layout, kinds)
    readings, grid = Readings.of(told), Grid(books_of(lm, fields, m), engine)
    got = log_likelihoods(engine, readings, grid.soft, tokens=70)
    for e, z in product(range(len(kinds)), range(len(grid.codes))):
        pack = make_pack(told, np.array([e]), engine.layout, lm.device)
        with torch.no_grad():
            want = -engine.nll(pack, grid.soft[z : z + 1])
        torch.testing.assert_close(got[e, z : z + 1], want, rtol=1e-5, atol=1e-4)
    texts = len({text for text, _ in kinds})
    assert readings.num_readings <= len(kinds)
    if name in ("words of one token", "no words"):  # a text may begin another
        assert texts - 1 <= readings.num_readings <= texts


@pytest.mark.parametrize("fields", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [60, 14])
def test_profiles_are_those_of_the_exact_posterior(lm, fields, max_tokens):
    engine, books = engine_of(lm, fields), books_of(lm, fields)
    source = source_of()
    source.format = replace(source.format, max_tokens=max_tokens, chunk_tokens=max_tokens)
    block = block_of(source, engine)
    want = PosteriorEStep(engine, CONFIG).run(block, books, EMState())
    table = EventTable(engine, source.format, books, CONFIG)
    got = table.profiles(source.told(lm.tokenizer, 0, 24), block.hashes)
    assert torch.equal(got.code_ids, want.code_ids)
    torch.testing.assert_close(got.elbo, want.elbo, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.nll, want.nll, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.weight, want.weight)
    torch.testing.assert_close(got.probabilities(), want.probabilities(), rtol=1e-4, atol=1e-5)
    for a, b in zip(got.log_resp, want.log_resp):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert 0 < float(got.forward_equivalents.mean()) < float(want.forward_equivalents.mean())
    again = table.profiles(source.told(lm.tokenizer, 3, 9), block.hashes[3:9])
    assert float(again.forward_equivalents.max()) == 0.0  # all was read
    for name in ("elbo", "nll", "code_ids"):
        assert torch.equal(getattr(again, name), getattr(got, name)[3:9])


def test_what_was_read_is_kept(lm, monkeypatch):
    engine, books, source = engine_of(lm, 1), books_of(lm, 1), source_of()
    kinds, cache = survey(source, lm.tokenizer, 0, 24), MemoryCache(1 << 20)

    def table(books):
        made = EventTable(engine, source.format, books, CONFIG)
        made.cache = cache
        return made

    table(books).read(kinds)
    monkeypatch.setattr(PackedEngine, "nll", None)
    again = table(books)
    again.read(kinds)
    texts = {text for text, _ in kinds}
    assert again.values.shape == (len(texts) * 3, 3)  # of all words
    other = table(books_of(lm, 2)[1:])
    with pytest.raises(TypeError):
        other.read(kinds)


@pytest.mark.parametrize("fields", [1, 2])
def test_the_crowd_finds_what_its_users_apart_do(lm, fields):
    engine, books, source = engine_of(lm, fields), books_of(lm, fields), source_of(60)
    all_of_them = Crowd(source, 60, engine, CONFIG, tiny.template(fields).fields)
    apart = Apart(block_of(source, engine), engine, CONFIG)
    assert (all_of_them.trained, all_of_them.judged) == (apart.trained, apart.judged) == (54, 6)
    got, want = all_of_them.judge(books), apart.judge(books)
    assert got.objective == pytest.approx(want.objective, rel=1e-7)
    assert got.held_out == pytest.approx(want.held_out, rel=1e-7)
    np.testing.assert_allclose(got.totals[:3], want.totals[:3], rtol=1e-6)
    for j in range(fields):
        torch.testing.assert_close(got.used[j], want.used[j], rtol=1e-4, atol=1e-5)
        assert torch.equal(got.usage[j].counts, want.usage[j].counts)
    assert all_of_them.lm_tokens < apart.lm_tokens


def likelihood(engine, block, words, grid_codes, log_prior):
    """Log evidence of all users, differentiable, one user under all codes at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for u in range(len(block.hashes)):
        users = np.full(len(grid_codes), u)
        pack = make_pack(block.behaviour, users, engine.layout, engine.lm.device)
        rows = torch.stack([w[k] for w, k in zip(words, grid_codes.T)], dim=1)
        total = total + (log_prior - engine.nll(pack, rows).double()).logsumexp(0)
    return total


@pytest.mark.parametrize("fields", [1, 2])
def test_a_full_m_step_is_the_gradient_of_the_likelihood(lm, fields):
    engine, books, source = engine_of(lm, fields), books_of(lm, fields), source_of(13)
    users = Crowd(source, 13, engine, CONFIG, tiny.template(fields).fields)
    stats = users.stats(users.judge(books), books)
    words = [b.codewords.clone().requires_grad_() for b in books]
    grid = Grid(books, engine)
    whole = likelihood(engine, block_of(source, engine), words, grid.codes, grid.log_prior)
    for got, want in zip(stats.gradient, torch.autograd.grad(-whole, words)):
        torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-4)


def test_drawn_pairs_stand_for_all_of_them():
    """Over all offsets, enumerated by the intervals in which nothing changes."""
    random = np.random.default_rng(0)
    weight = random.random((23, 3)) ** 4
    weight[5] = 0
    weight[4:, 2] = 0  # fewer than draws: all are taken
    each, mean, sizes = 7, np.zeros_like(weight), set()
    running = np.cumsum(weight, axis=0)
    cuts = np.unique(np.concatenate([(running * each / running[-1]).ravel() % 1, [0.0, 1.0]]))
    for a, b in pairwise(cuts.tolist()):
        rows, columns, factor = draw(weight, 3 * each, np.full(3, (a + b) / 2))
        mean[rows, columns] += (b - a) * factor
        sizes.add(len(rows))
        assert (np.diff(columns) >= 0).all()
    np.testing.assert_allclose(mean, weight > 0, rtol=1e-9)
    assert max(sizes) <= 3 * each
    rows, columns, factor = draw(weight, 0, np.zeros(3))
    assert set(zip(rows, columns)) == set(zip(*np.nonzero(weight)))
    assert (factor == 1).all()


def test_a_drawn_m_step_reads_fewer_pairs_and_the_same_at_the_same_place(lm):
    engine, books, source = engine_of(lm, 1), books_of(lm, 1), source_of(60)
    found = {}
    for draws in (0, 6):
        config = replace(CONFIG, codeword_draws=draws)
        users = Crowd(source, 60, engine, config, tiny.template(1).fields)
        shares, before = users.judge(books), users.lm_tokens
        found[draws] = users.stats(shares, books)
        again = users.stats(shares, books)
        assert torch.equal(found[draws].gradient[0], again.gradient[0])
        found[draws].tokens = (users.lm_tokens - before) / 2
    assert found[6].tokens < found[0].tokens
    assert torch.equal(found[6].counts[0], found[0].counts[0])


def test_rounds_raise_the_objective_of_all_users(lm):
    engine, source = engine_of(lm, 1), source_of(120)
    config = replace(CONFIG, codeword_lr=0.3, codeword_draws=12)
    users = Crowd(source, 120, engine, config, tiny.template(1).fields)
    found = list(islice(Mixture(users, engine, config).rounds(books_of(lm, 1)), 4))
    objective = [f.found.objective for f in found]
    assert objective == sorted(objective)
    assert objective[-1] > objective[0] + 1.0
    assert all(f.lm_tokens > 0 for f in found)


def test_lm_work_does_not_grow_with_users(lm):
    engine, books = engine_of(lm, 2), books_of(lm, 2)
    tokens = []
    for number in (60, 600):
        users = Crowd(source_of(number), number, engine, CONFIG, tiny.template(2).fields)
        users.stats(users.judge(books), books)
        tokens.append(users.lm_tokens)
    assert tokens[0] == tokens[1]


def test_em_keeps_the_most_frequent_texts(lm, monkeypatch):
    monkeypatch.setattr(crowd, "_FEWEST_TEXTS", 1)
    engine, source = engine_of(lm, 1), source_of(60)
    config = replace(CONFIG, table_readings=2 * 3)  # two texts under three codes
    users = Crowd(source, 60, engine, config, tiny.template(1).fields)
    mass = np.bincount(source.events.item_index, minlength=6)
    want = {tiny.TEXTS[i] for i in np.argsort(-mass, kind="stable")[:2]}
    assert {text for text, _ in users.numbering.number} == want
    found = users.judge(books_of(lm, 1))  # users who have neither keep the prior
    assert float(found.used[0].sum()) == pytest.approx(54, rel=1e-6)


FIELDS = (ProfileField("taste", "The user's taste is", 1, 4, ("rod", "lamp")),
          ProfileField("b", "b", 1, 3))  # fmt: skip
WHOLE = Config(
    data=DataConfig(behaviour_context="independent", max_tokens=60),
    em=EMConfig(estep="posterior", rounds=2, gain=0.0),
    fields=FIELDS,
)


def test_when_there_is_a_table():
    assert has_table(WHOLE)
    assert has_table(WHOLE.override({"em.estep": "amortised"}))
    for sizes, columns in [((16, 16), "all"), ((17, 17), "some"), ((600, 600), ""), ((300,), "")]:
        of = replace(
            WHOLE, fields=tuple(replace(f, codebook_size=k) for f, k in zip(FIELDS, sizes))
        )
        assert has_table(of) == bool(columns)
        assert answers(of, PLAIN) == (columns == "all")
        assert has_table(of.override({"em.posterior": "exact"}))
    for name, value in {
        "em.estep": "gradient",
        "em.recipe": "paper",
        "em.posterior": "ascent",
        "data.behaviour_context": "sequence",
    }.items():
        assert not has_table(WHOLE.override({name: value}))


RAW = WHOLE.override({"data.loss": "all"})
"""Whose table has likelihoods as the LM tells them."""


def test_fit_and_infer_do_not_depend_on_blocks(lm, tmp_path, monkeypatch):
    whole = uf.fit(read(60), lm, config=RAW, out=tmp_path / "run", probabilities=True)
    bank = uf.FeatureBank.open(tmp_path / "run" / "bank")
    small = RAW.override({"em.block_users": 7})
    parts = uf.fit(read(60), lm, config=small, out=tmp_path / "parts", probabilities=True)
    other = uf.FeatureBank.open(tmp_path / "parts" / "bank")
    assert parts.fingerprint == whole.fingerprint
    assert np.array_equal(other.codes(), bank.codes())
    assert np.array_equal(other.probabilities, bank.probabilities)

    loaded = replace(whole, trainer=None)  # has no memory of the fit
    assert np.array_equal(loaded.infer(read(60)), bank.codes())
    # The users read apart, by an E-step that reaches the same answer another way.
    block = block_of(loaded.source(read(60)), loaded.ready_trainer().engine)
    exact = PosteriorEStep(loaded.ready_trainer().engine, replace(RAW.em, posterior="exact"))
    want = exact.run(block, whole.codebooks, EMState())
    np.testing.assert_allclose(bank.probabilities, want.probabilities(), rtol=1e-4, atol=1e-5)


def test_a_fit_that_goes_on_ends_in_the_same_model(lm, tmp_path):
    whole = uf.fit(read(60), lm, config=WHOLE, out=tmp_path / "whole")
    uf.fit(read(60), lm, config=WHOLE.override({"em.rounds": 1}), out=tmp_path / "part")
    went_on = uf.fit(read(60), lm, config=WHOLE, out=tmp_path / "part", resume=True)
    assert went_on.fingerprint == whole.fingerprint


def test_histories_on_disk_give_the_same(lm, tmp_path):
    import pyarrow.parquet as pq

    random = np.random.default_rng(1)
    user = np.repeat(np.arange(60), 3)
    log = {"user_id": user, "item_id": random.integers(0, 6, 180), "rating": user % 5 + 1}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    items = pa.table({"item_id": range(6), "title": tiny.TEXTS})
    pq.write_table(items, tmp_path / "items.parquet")
    paths = str(tmp_path / "log.parquet"), str(tmp_path / "items.parquet")
    stream = uf.stream_interactions(*paths, work=tmp_path / "sorted", rating="rating")
    memory = uf.read_interactions(*paths, rating="rating")
    a, b = (uf.fit(data, lm, config=WHOLE) for data in (memory, stream))
    assert a.fingerprint == b.fingerprint
    assert np.array_equal(a.infer(memory), b.infer(stream))


def test_fit_sees_all_users_unless_told_otherwise(lm, monkeypatch):
    seen = []
    real = Crowd.__init__

    def init(self, source, users, *args):
        seen.append(users)
        real(self, source, users, *args)

    monkeypatch.setattr(crowd.Crowd, "__init__", init)
    uf.fit(read(60), lm, config=WHOLE.override({"em.rounds": 1}))
    uf.fit(read(60), lm, config=WHOLE.override({"em.rounds": 1, "em.fit_users": 30}))
    assert seen == [60, 30]


def test_a_table_that_does_not_fit_is_read_in_smaller_packs(lm, monkeypatch):
    model = uf.fit(read(60), lm, config=WHOLE)
    want = model.infer(read(60))
    rows, real = [], PackedEngine.nll

    def nll(self, pack, soft_rows):
        rows.append(pack.num_tokens)
        if pack.num_tokens > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pack, soft_rows)

    monkeypatch.setattr(PackedEngine, "nll", nll)
    monkeypatch.setattr("userip_fast.em.blocks.smaller_pack", lambda lm, tokens, longest: 64)
    assert np.array_equal(replace(model).infer(read(60)), want)
    assert rows[0] > 64
    assert max(rows[1:]) <= 64

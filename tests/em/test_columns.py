"""Of many combinations of codes those that carry weight are columns, and say what all would."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from test_resume import read
from test_table import RAW, WHOLE, block_of, books_of, engine_of, likelihood, source_of

import userip_fast as uf
from userip_fast.codebook.books import Codebook
from userip_fast.core.errors import FormatError
from userip_fast.core.profiles import Profile, all_codes, codes_of, joint
from userip_fast.em import columns
from userip_fast.em.columns import Grid, choose, lines, places
from userip_fast.em.crowd import Crowd
from userip_fast.em.lifts import Calibration
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.steps import EMState
from userip_fast.em.table import EventTable
from userip_fast.jobs.profiles import export_profiles
from userip_fast.jobs.shards import infer_shard, merge_shards
from userip_fast.ops import profile_posterior
from userip_fast.report.show import show_run
from userip_fast.serve import Server

KINDS, USERS, EVENTS = 200, 1500, 60


class World:
    """Codes of J fields that speak for kinds of event on their own, and in pairs."""

    def __init__(self, sizes, together, seed=0):
        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.books = [Codebook(torch.randn(k, 2)) for k in sizes]
        for book in self.books:
            book.log_prior = torch.from_numpy(random.normal(size=len(book))).log_softmax(0).float()
        alone = [random.normal(0, 1, (k, KINDS)) for k in sizes]
        pairs = random.normal(0, together, (*sizes[:2], KINDS))
        # The mean codeword tells what its field tells on average.
        self.alone = [np.concatenate([a, a.mean(0, keepdims=True)]) for a in alone]
        self.pairs = np.pad(pairs, ((0, 1), (0, 1), (0, 0)))
        self.all = torch.from_numpy(all_codes(sizes))
        self.read_columns = 0
        table = self.read(self.all).exp().numpy().astype(np.float64)
        some = random.choice(len(self.all), 60, replace=False)
        kinds = [
            random.choice(KINDS, n, p=table[:, z] / table[:, z].sum())
            for z, n in zip(random.choice(some, USERS), random.integers(EVENTS // 2, EVENTS, USERS))
        ]
        self.kinds = torch.from_numpy(np.concatenate(kinds))
        self.offsets = torch.tensor([0, *np.cumsum([len(k) for k in kinds]).tolist()])

    def read(self, codes):
        told = sum(a[k] for a, k in zip(self.alone, codes.T.numpy()))
        told = told + self.pairs[codes[:, 0].numpy(), codes[:, 1].numpy()]
        self.read_columns += len(codes)
        return torch.from_numpy(told.T).log_softmax(0).float()

    def posterior(self, codes):
        prior = sum(b.log_prior.double()[k] for b, k in zip(self.books, codes.T))
        return profile_posterior(self.read(codes), self.kinds, self.offsets, prior)


@pytest.mark.parametrize("together", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(24, 20), (8, 9, 10), (16, 16, 16)])
def test_columns_give_the_posterior_of_all_combinations(sizes, together):
    world = World(sizes, together)
    world.read_columns = 0
    found = choose(world.books, world.read, world.kinds, world.offsets)
    assert world.read_columns < 0.7 * len(world.all)
    assert len(found.codes) < len(world.all) / 4
    assert found.missing < 0.01
    torch.testing.assert_close(found.values, world.read(found.codes))
    want, evidence = world.posterior(world.all)

    def apart(codes):
        at = torch.from_numpy(places(codes.numpy(), world.all.numpy()))
        assert (at.diff() > 0).all()  # in order
        got, bound = world.posterior(codes)
        assert (bound <= evidence + 1e-3).all()
        there = torch.zeros_like(want).index_copy_(1, at, got.exp())
        return (there - want.exp()).abs().sum(1) / 2

    assert float(apart(found.codes).quantile(0.99)) <= 0.01
    again = choose(world.books, world.read, world.kinds, world.offsets)
    assert torch.equal(again.codes, found.codes)
    assert again.missing == found.missing
    # Columns that some users chose serve others.
    some = int(world.offsets[1000])
    found = choose(world.books, world.read, world.kinds[:some], world.offsets[:1001])
    assert float(apart(found.codes)[1000:].mean()) < 0.01


@pytest.mark.parametrize("sizes", [(12, 10), (4, 5, 6)])
def test_where_half_of_all_combinations_are_needed_all_are_columns(sizes):
    world = World(sizes, 0.0)
    short = 3 * torch.arange(201)  # histories
    found = choose(world.books, world.read, world.kinds[:600], short)
    assert torch.equal(found.codes, world.all)


def test_draws_say_what_is_missing(monkeypatch):
    """On average over seeds, of columns that are far from enough."""
    world = World((8, 9, 10), 0.3)
    wanted = world.posterior(world.all)[0].exp()
    missing, truth = [], []
    for seed in range(12):
        books = [replace_words(book, seed) for book in world.books]
        search = columns._Search(books, world.read, world.kinds, world.offsets, None)
        monkeypatch.setattr(columns, "MOST", 30)
        search.propose()
        at = torch.from_numpy(places(search.codes, world.all.numpy()))
        truth.append(1 - float(wanted[search.judging][:, at].sum(1).mean()))
        missing.append(search.draw().mean())
    assert min(truth) > 0.1
    assert np.mean(missing) == pytest.approx(np.mean(truth), rel=0.15)


def replace_words(book, seed):
    """The same code shares under another seed."""
    other = Codebook(book.codewords + seed)
    other.log_prior = book.log_prior
    return other


def test_flat_posteriors_have_as_many_columns_as_there_may_be(monkeypatch, caplog):
    world = World((8, 9, 10), 0.3)
    monkeypatch.setattr(columns, "MOST", 50)
    found = choose(world.books, world.read, world.kinds[:0], torch.zeros(21, dtype=torch.int64))
    assert len(found.codes) == 50
    prior = np.sort(sum(np.ix_(*[b.log_prior.double().exp().log() for b in world.books])).ravel())
    assert found.missing == pytest.approx(1 - np.exp(prior[-50:]).sum(), abs=0.1)
    assert "fewer codes would be told apart" in caplog.text


def test_one_user_is_enough_to_choose_by():
    world = World((8, 9, 10), 0.3)
    events = world.kinds[: int(world.offsets[1])]
    found = choose(world.books, world.read, events, world.offsets[:2])
    want = world.posterior(world.all)[0][0].exp()
    at = torch.from_numpy(places(found.codes.numpy(), world.all.numpy()))
    assert float(want[at].sum()) > 0.98


def test_lines_are_each_fields_codes_and_the_others_mean():
    assert lines([2, 3]).tolist() == [[0, 3], [1, 3], [2, 0], [2, 1], [2, 2]]


@pytest.fixture(scope="module")
def lm():
    return tiny.frozen("llama")


def test_a_grid_of_some_columns_is_a_part_of_the_whole(lm):
    engine, books = engine_of(lm, 3), books_of(lm, 3)
    whole = Grid(books, engine)
    codes = whole.codes[torch.tensor([1, 5, 6, 17, 20])]
    some = Grid(books, engine, codes)
    at = torch.from_numpy(places(codes.numpy(), whole.codes.numpy()))
    assert torch.equal(some.soft, whole.soft[at])
    assert torch.equal(some.log_prior, whole.log_prior[at])
    assert float(some.prior.exp().sum()) == pytest.approx(1)
    assert whole.prior is whole.log_prior
    neutral = Grid(books, engine, torch.tensor([[3, 4, 1]])).soft[0, :2].cpu()
    for row, book in zip(neutral, books):
        torch.testing.assert_close(row, book.log_prior.exp() @ book.codewords)
    log_resp = torch.randn(9, 5).log_softmax(1)
    spread = torch.full((9, len(whole.codes)), -torch.inf)
    spread[:, at] = log_resp
    for got, want in zip(some.marginals(log_resp), whole.marginals(spread)):
        torch.testing.assert_close(got, want)
    _, best, column = some.likeliest(log_resp)
    for u in range(9):
        same = (codes == best[u]).all(1)
        assert column[u] == (same.nonzero() if same.any() else log_resp[u].argmax())
    each = [torch.rand(4, k).softmax(1).numpy() for k in whole.sizes]
    all_of_them, few = whole.joint(each), some.joint(each)
    np.testing.assert_allclose(all_of_them.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(few.sum(1), 1, rtol=1e-5)
    # Quotients of fp32 values, three roundings on either side.
    odds = all_of_them[:, at[1]] / all_of_them[:, at[0]]
    np.testing.assert_allclose(few[:, 1] / few[:, 0], odds, rtol=3 * 2.0**-23)


@pytest.mark.parametrize("fields", [2, 3])
def test_a_table_of_columns_says_what_the_exact_posterior_does(lm, fields, monkeypatch):
    engine, books, source = engine_of(lm, fields), books_of(lm, fields), source_of(60)
    monkeypatch.setattr(columns, "ALL", 1)
    users = Crowd(source, 60, engine, RAW.em, tiny.template(fields).fields)
    chosen, values = users._columns(books)
    table = EventTable(engine, source.format, books, RAW.em, Calibration(columns=chosen))
    block = block_of(source, engine)
    got = table.profiles(source.told(lm.tokenizer, 0, 60), block.hashes)
    exact = replace(RAW.em, posterior="exact", prune_share=0.0)
    want = PosteriorEStep(engine, exact).run(block, books, EMState())
    apart = torch.stack(
        [(a.exp() - b.exp()).abs().sum(1) / 2 for a, b in zip(got.log_resp, want.log_resp)]
    ).amax(0)
    assert float(apart.quantile(0.99)) <= 0.01
    assert (got.elbo <= want.elbo + 1e-3).all()
    assert float((want.elbo - got.elbo).median()) < 0.02
    assert len(values.T) == len(chosen)


def test_an_m_step_of_columns_is_the_gradient_of_their_likelihood(lm, monkeypatch):
    monkeypatch.setattr(columns, "ALL", 1)
    engine, books, source = engine_of(lm, 2), books_of(lm, 2), source_of(13)
    em = replace(RAW.em, codeword_draws=0)
    users = Crowd(source, 13, engine, em, tiny.template(2).fields)
    found = users.judge(books)
    grid = Grid(books, engine, found.columns)
    assert len(grid.codes) <= 12
    stats = users.stats(found, books)
    words = [b.codewords.clone().requires_grad_() for b in books]
    whole = likelihood(engine, block_of(source, engine), words, grid.codes, grid.log_prior)
    for got, want in zip(stats.gradient, torch.autograd.grad(-whole, words)):
        torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-4)


FEW = {"ALL": 1, "MOST": 8}


@pytest.fixture(scope="module")
def fitted(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    data = read(60)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(columns, name, value)
        tiny.save("llama", folder / "lm")
        model = uf.fit(data, folder / "lm", config=WHOLE, out=folder / "whole")
    return folder, data, model


@pytest.fixture
def few(monkeypatch):
    for name, value in FEW.items():
        monkeypatch.setattr(columns, name, value)


def test_a_fit_with_columns_is_kept_and_served(fitted, few, tmp_path):
    folder, data, model = fitted
    some = model.calibration.columns
    assert len(some) == 8 < 12
    bank = uf.FeatureBank.open(folder / "whole" / "bank")
    loaded = uf.Model.load(folder / "whole" / "model")
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.calibration.columns, some)
    assert np.array_equal(loaded.infer(data), bank.codes())
    assert not loaded.lm.is_made  # the table knows everything

    items, went = [0, 3, 4], [5, 1, 3]
    p = loaded.profile(items, went)
    assert p.shape == (len(some),)
    grown = loaded.open_profile(items, went)
    np.testing.assert_allclose(grown.probabilities, p, rtol=1e-4, atol=1e-6)
    each = [np.bincount(k, p, f.codebook_size) for k, f in zip(some.T, model.config.fields)]
    assert grown.codes.tolist() == [int(x.argmax()) for x in each]
    np.testing.assert_allclose(loaded.profile([], []).sum(), 1, rtol=1e-5)

    server = Server.open(folder / "whole" / "model", folder / "whole" / "bank")
    assert np.array_equal(server.columns, some.numpy())
    np.testing.assert_allclose(server.profile(items, went), p, rtol=1e-4, atol=1e-6)
    assert server.open_profile(items, went).codes.tolist() == grown.codes.tolist()
    np.testing.assert_allclose(server.affinity(p, items), loaded.affinity(p, items), rtol=1e-4)
    got, want = server.top_items(p, 3), loaded.top_items(p, 3)
    np.testing.assert_allclose(np.sort(got[1]), np.sort(want[1]), rtol=1e-4)

    shutil.copytree(folder / "whole" / "model", tmp_path / "model")
    pq.write_table(columns.to_arrow(some[1:]), tmp_path / "model" / "columns.parquet")
    for open_ in Server.open, uf.Model.load:
        with pytest.raises(FormatError, match=r"columns\.parquet"):
            open_(tmp_path / "model")


def test_shards_and_a_run_that_goes_on_give_the_same(fitted, few, tmp_path):
    folder, data, model = fitted
    uf.fit(data, folder / "lm", config=WHOLE.override({"em.rounds": 1}), out=tmp_path / "part")
    went_on = uf.fit(data, folder / "lm", config=WHOLE, out=tmp_path / "part", resume=True)
    assert went_on.fingerprint == model.fingerprint
    small = WHOLE.override({"em.block_users": 7})
    blocks = uf.fit(data, folder / "lm", config=small, out=tmp_path / "blocks")
    assert blocks.fingerprint == model.fingerprint
    loaded = uf.Model.load(folder / "whole" / "model")
    for index in range(2):
        infer_shard(loaded, data, index, 2, tmp_path / "shards", show=False)
    merge_shards(tmp_path / "shards", tmp_path / "bank")
    bank = uf.FeatureBank.open(tmp_path / "bank")
    assert np.array_equal(bank.codes(), uf.FeatureBank.open(folder / "whole" / "bank").codes())


def test_columns_are_chosen_anew_where_events_count_less(fitted, few, monkeypatch):
    folder, data, _ = fitted
    chosen, weights = [], []
    real = columns.choose

    def choose_(*args):
        weights.append(args[4] if len(args) > 4 else None)
        chosen.append(real(*args))
        return chosen[-1]

    monkeypatch.setattr("userip_fast.em.finish.choose", choose_)
    monkeypatch.setattr("userip_fast.em.calibrate._HALF_EVENTS", (3.0,))
    model = uf.fit(data, folder / "lm", config=WHOLE)
    assert model.calibration.half_events == 3.0
    assert weights[0] is None
    assert float(weights[1].max()) < 1
    assert torch.equal(model.calibration.columns, chosen[1].codes)
    assert model.event_table().values.shape[1] == len(chosen[1].codes)
    assert model.infer(data).max() < 4


def test_codes_under_other_numbers_keep_their_columns(fitted):
    model = fitted[2]
    orders = [torch.randperm(f.codebook_size) for f in model.config.fields]
    other = replace(
        model,
        trainer=None,
        codebooks=[b.reordered(o) for b, o in zip(model.codebooks, orders)],
        calibration=model.calibration.reordered(orders),
    )
    items, went = [0, 3, 4], [5, 1, 3]
    np.testing.assert_allclose(
        other.profile(items, went), model.profile(items, went), rtol=1e-4, atol=1e-6
    )
    a = model.open_profile(items, went).codes
    b = other.open_profile(items, went).codes
    assert [int(o[k]) for o, k in zip(orders, b)] == a.tolist()


def test_profiles_and_a_bank_of_them_are_the_joint_of_columns(fitted, few, tmp_path):
    folder, data, model = fitted
    some, sizes = model.calibration.columns.numpy(), [f.codebook_size for f in model.config.fields]
    export_profiles(model, data, tmp_path / "p.parquet", top=3)
    table = pq.read_table(tmp_path / "p.parquet")
    names = [f.name for f in model.config.fields]
    each = [np.stack(table[f"{n}_p"].to_numpy()) for n in names]
    for p, size in zip(each, sizes):
        assert p.shape == (data.num_users, size)
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    codes = np.stack([table[n].to_numpy() for n in names], axis=1)
    assert np.array_equal(codes, model.infer(data))
    product = np.prod([p[:, k] for p, k in zip(each, some.T)], axis=0)
    product /= product.sum(1, keepdims=True)
    items, scores = model.top_items(product, 3)
    np.testing.assert_allclose(np.stack(table["top_scores"].to_numpy()), scores, rtol=1e-4)
    assert (np.stack(table["top_items"].to_numpy()) == items).mean() > 0.95  # but for ties

    bank = model.infer(data, tmp_path / "bank", profiles=True)
    server = Server.open(folder / "whole" / "model", tmp_path / "bank")
    p = server.lookup_profiles(table["user_id"])
    np.testing.assert_allclose(p, product, atol=2e-3)
    nobody = server.lookup_profiles([10**9], on_unknown="code")
    np.testing.assert_allclose(nobody[0], server.profile([], []), rtol=1e-5)
    bank.to_parquet(tmp_path / "b.parquet", server.best_items(3))
    best = pq.read_table(tmp_path / "b.parquet")
    np.testing.assert_allclose(np.stack(best["top_scores"].to_numpy()), scores, rtol=5e-3)


def test_a_user_between_columns_has_a_profile():
    """Whose likeliest codes are together no column, and in 16 bits each alone all there is."""
    codes = np.array([[0, 0], [1, 1]])
    p = joint([np.array([[1.0, 0.0]], np.float16), np.array([[0.0, 1.0]], np.float16)], codes)
    np.testing.assert_allclose(p, [[0.5, 0.5]])


def test_what_is_shown_of_columns_is_what_they_say(fitted, few):
    """A code's share of an item's reactions is the mean over its columns; of a code that is in none
    it is anybody's."""
    folder, _, model = fitted
    show_run(folder / "whole")
    page = (folder / "whole" / "explore.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    grid = model.event_table().grid
    prior, codes = grid.prior.exp().numpy(), grid.codes.numpy()
    assert len(data["items"]) > 3
    for item in data["items"]:
        each = model.affinity(np.eye(len(codes), dtype=np.float32), [int(item["key"])])[:, 0]
        at = 0
        for j, size in enumerate(grid.sizes):
            for k in range(size):
                own = prior * (codes[:, j] == k)
                own = prior if own.sum() == 0 else own / own.sum()
                assert item["liked"][at] == pytest.approx(own @ each, abs=1e-3)
                at += 1
        assert at == len(item["liked"])
    missing = [set(range(n)) - set(codes[:, j].tolist()) for j, n in enumerate(grid.sizes)]
    assert any(missing)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"0": [0, 1], "1": [0, 3]}, "below"),
        ({"0": [0, -1], "1": [0, 0]}, "below"),
        ({"0": [1, 1], "1": [2, 2]}, "different"),
        ({"0": [1]}, "2 codes"),
        ({"0": [1.0], "1": [2.0]}, "2 codes"),
        ({"0": [1, None], "1": [2, 0]}, "2 codes"),
        ({"0": pa.array([], pa.int64()), "1": pa.array([], pa.int64())}, "at least one"),
    ],
)
def test_columns_of_other_fields_are_refused(table, why):
    with pytest.raises(FormatError, match=why):
        codes_of(pa.table(table), [2, 3])


def test_a_profile_has_all_combinations_unless_told_otherwise():
    tell = {"a": (0, np.log([0.1, 0.2, 0.3, 0.4]))}
    profile = Profile(np.zeros(4), [2, 2], lambda item, reaction: tell.get(item))
    profile.add("a")
    assert profile.codes.tolist() == [1, 1]

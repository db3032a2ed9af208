"""The posterior E-step against brute force, and a mixture of soft prompts that never gets worse."""

from dataclasses import replace
from itertools import islice, pairwise, product

import numpy as np
import pytest
import tiny
import torch

import userip_fast as uf
from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config, DataConfig, EMConfig
from userip_fast.core.errors import ConfigError
from userip_fast.em import Block, EMState
from userip_fast.em.crowd import Apart
from userip_fast.em.mixture import Mixture
from userip_fast.em.posterior import PosteriorEStep, is_exact
from userip_fast.em.starts import Starts
from userip_fast.em.units import Units
from userip_fast.lm import PackedEngine
from userip_fast.prompts.layout import ProfileField
from userip_fast.prompts.packing import make_pack

CONFIG = EMConfig(estep="posterior", prune_share=0.0, codeword_lr=0.3)
SIZES = (3, 4, 2)
USERS = 11


@pytest.fixture(scope="module", params=[1, 2])
def fields(request):
    return request.param


def make(fields, m=1, users=USERS, **kwargs):
    """Engine, block and codebooks with learned priors."""
    lm = tiny.frozen("llama")
    engine = PackedEngine(lm, tiny.template(fields, m).layout(lm.tokenizer))
    hashes = np.arange(users, dtype=np.uint64)
    block = Block(tiny.behaviour(engine.layout, users, **kwargs), hashes)
    books = [Codebook(torch.randn(k, m * lm.hidden_size)) for k in SIZES[:fields]]
    for book in books:
        book.log_prior = torch.randn(len(book)).log_softmax(0)
    return engine, block, books


def enumerate_joint(engine, block, books):
    """[U, K_1, ..., K_J] fp64 log joint, one user and one combination at a time."""
    out = torch.zeros(len(block.hashes), *map(len, books), dtype=torch.float64)
    for u in range(len(block.hashes)):
        pack = make_pack(block.behaviour, np.array([u]), engine.layout, engine.lm.device)
        for z in product(*map(range, map(len, books))):
            rows = torch.cat([b.codewords[k].view(-1, engine.lm.hidden_size)
                              for b, k in zip(books, z)])  # fmt: skip
            with torch.no_grad():
                log_p = -engine.nll(pack, rows[None]).double()
            out[(u, *z)] = log_p + sum(b.log_prior[k].double() for b, k in zip(books, z))
    return out


@pytest.mark.parametrize(("m", "context"), [(1, "sequence"), (2, "independent")])
def test_exact_is_enumeration(fields, m, context):
    engine, block, books = make(fields, m, context=context)
    found = PosteriorEStep(engine, replace(CONFIG, pack_tokens=64)).run(block, books, EMState())
    joint = enumerate_joint(engine, block, books)
    evidence = joint.flatten(1).logsumexp(1)
    torch.testing.assert_close(found.elbo, evidence, rtol=1e-5, atol=1e-4)
    for j, r in enumerate(found.log_resp):
        others = [i + 1 for i in range(fields) if i != j]
        want = (joint.logsumexp(others) if others else joint) - evidence[:, None]
        torch.testing.assert_close(r.double(), want, rtol=1e-4, atol=2e-4)
        assert torch.equal(found.code_ids[:, j], want.argmax(1))
        torch.testing.assert_close(r.exp().sum(1), torch.ones(len(r)))
    combinations = float(np.prod(SIZES[:fields]))
    if context == "sequence":
        assert found.forward_equivalents.tolist() == [combinations] * USERS
    else:  # the users' six kinds of event are read once for all
        assert found.forward_equivalents.max() < combinations
        rows = Units.of(block.behaviour, engine.layout).behaviour.pack_rows(fields * m).sum()
        own = torch.from_numpy(block.behaviour.pack_rows(fields * m))
        assert float(found.forward_equivalents @ own.float()) == pytest.approx(rows * combinations)
    # NLL is that of the codes, priors aside.
    z = found.code_ids
    at = joint[(torch.arange(USERS), *z.T)]
    prior = sum(b.log_prior[z[:, j]].double() for j, b in enumerate(books))
    torch.testing.assert_close(found.nll.double(), prior - at, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        found.probabilities(), torch.stack([r.exp().max(1).values for r in found.log_resp], 1)
    )


def test_ascent_is_a_fixed_point_and_never_above_exact():
    engine, block, books = make(3)
    exact = PosteriorEStep(engine, replace(CONFIG, posterior="exact"))
    ascent = PosteriorEStep(engine, replace(CONFIG, posterior="ascent"))
    best, found = (e.run(block, books, EMState()) for e in (exact, ascent))
    assert (found.elbo <= best.elbo + 1e-4).all()
    joint = enumerate_joint(engine, block, books)
    users = torch.arange(len(block.hashes))
    z = found.code_ids
    top = joint[(users, *z.T)]
    assert (top <= joint.flatten(1).max(1).values + 1e-9).all()
    for j, r in enumerate(found.log_resp):
        index = [users[:, None], *(z[:, i : i + 1] for i in range(3))]
        index[j + 1] = torch.arange(SIZES[j])[None]
        line = joint[tuple(index)]
        torch.testing.assert_close(r.double(), line.log_softmax(1), rtol=1e-3, atol=1e-3)
        assert torch.equal(line.argmax(1), z[:, j])
    assert (found.code_ids == best.code_ids).all(1).double().mean() > 0.6  # a random LM
    assert found.forward_equivalents.max() < best.forward_equivalents.max()


def test_ascent_finds_the_codes_of_exact_where_fields_speak_for_themselves():
    """As in the demo: codewords so near to each other that their effects add up."""
    engine, block, books = make(2, users=120)
    books = [Codebook(b.codewords[:1] + 0.02 * torch.randn_like(b.codewords)) for b in books]
    best, found = (
        PosteriorEStep(engine, replace(CONFIG, posterior=p)).run(block, books, EMState())
        for p in ("exact", "ascent")
    )
    assert (found.elbo <= best.elbo + 1e-4).all()
    assert (found.code_ids == best.code_ids).all(1).double().mean() >= 0.99
    assert len(best.code_ids.unique(dim=0)) > 4


@pytest.mark.parametrize("other", ["ascent", "mean_field"])
def test_one_field_is_exact_either_way(other):
    engine, block, books = make(1)
    a, b = (
        PosteriorEStep(engine, replace(CONFIG, posterior=p)).run(block, books, EMState())
        for p in ("exact", other)
    )
    assert torch.equal(a.code_ids, b.code_ids)
    torch.testing.assert_close(a.elbo, b.elbo)
    assert a.candidates.weight.sum() == pytest.approx(float(b.candidates.weight.sum()))


def test_auto_is_exact_while_there_are_few_combinations():
    assert is_exact(EMConfig(), [4096])
    assert is_exact(EMConfig(), [4, 4])
    assert not is_exact(EMConfig(), [16, 16])
    assert not is_exact(EMConfig(), [4097])
    assert is_exact(EMConfig(posterior="exact"), [99, 99])
    assert not is_exact(Config().override({"em.posterior": "mean_field"}).em, [4, 4])


@pytest.mark.parametrize("posterior", ["exact", "ascent", "mean_field"])
def test_pruning_saves_passes_and_keeps_what_matters(posterior):
    engine, block, books = make(2)
    run = {
        nats: PosteriorEStep(
            engine, replace(CONFIG, posterior=posterior, prune_share=0.5, prune_nats=nats)
        ).run(block, books, EMState())
        for nats in (1e-3, 5.0, 1e9)
    }
    plain = PosteriorEStep(engine, replace(CONFIG, posterior=posterior))
    all_of_it = plain.run(block, books, EMState())
    torch.testing.assert_close(run[1e9].elbo, all_of_it.elbo)
    assert run[1e-3].forward_equivalents.mean() < run[5.0].forward_equivalents.mean()
    assert (run[5.0].elbo <= all_of_it.elbo + 1e-4).all()
    assert run[5.0].elbo.sum() > run[1e-3].elbo.sum()
    for found in run.values():
        assert found.nll.isfinite().all()
        for r in found.log_resp:
            torch.testing.assert_close(r.exp().sum(1), torch.ones(len(r)))


@pytest.mark.parametrize("posterior", ["exact", "ascent", "mean_field"])
def test_a_user_does_not_depend_on_pack_or_company(posterior):
    engine, block, books = make(2)
    config = replace(CONFIG, posterior=posterior, prune_share=0.4)
    whole = PosteriorEStep(engine, config).run(block, books, EMState())
    some = np.array([2, 3, 8])
    part = block.select(some)
    alone = PosteriorEStep(engine, replace(config, pack_tokens=50)).run(part, books, EMState())
    torch.testing.assert_close(alone.elbo, whole.elbo[some])
    assert torch.equal(alone.code_ids, whole.code_ids[some])


def stats_of(engine, block, config, profiles, books):
    users = Apart(block, engine, config)
    assert users.judged == 0
    return users.stats(replace(users.judge(books), shares=profiles.candidates), books)


@pytest.mark.parametrize("posterior", ["exact", "ascent", "mean_field"])
def test_mstep_gradient_is_that_of_the_objective(posterior):
    """Autograd through the log of the sum over candidates, in one piece, gives the same."""
    engine, block, books = make(2)
    config = replace(CONFIG, posterior=posterior, pack_tokens=64)
    found = PosteriorEStep(engine, config).run(block, books, EMState())
    got = stats_of(engine, block, config, found, books)
    words = [b.codewords.clone().requires_grad_() for b in books]
    users, codes = found.candidates.users, found.candidates.codes
    pack = make_pack(block.behaviour, users.numpy(), engine.layout, engine.lm.device)
    rows = torch.stack([words[j][codes[:, j]] for j in range(2)], dim=1)
    prior = sum(b.log_prior[codes[:, j]] for j, b in enumerate(books))
    joint = prior - engine.nll(pack, rows)
    if posterior == "exact":
        objective = sum(joint[users == u].logsumexp(0) for u in range(len(block.hashes)))
        want = torch.autograd.grad(-objective, words)
        for a, b in zip(got.gradient, want):
            assert (a - b).norm() < 0.03 * b.norm()  # unlikely candidates are left out
    total = sum(float(c.sum()) for c in got.counts)
    assert total == pytest.approx(2 * len(block.hashes), rel=0.02)
    again = stats_of(engine, block, config, found, books)
    assert all(torch.equal(a, b) for a, b in zip(got.gradient, again.gradient))


@pytest.mark.parametrize(
    ("posterior", "prune"), [("exact", 0.0), ("ascent", 0.3), ("mean_field", 0.3)]
)
def test_the_objective_never_falls(posterior, prune):
    engine, block, books = make(2)
    config = replace(CONFIG, posterior=posterior, prune_share=prune)
    found = list(islice(Mixture(Apart(block, engine, config), engine, config).rounds(books), 4))
    objective = [f.found.objective for f in found]
    assert all(b >= a - 1e-6 * abs(a) for a, b in pairwise(objective))
    assert objective[-1] > objective[0] + 1.0
    for f in found:
        for book in f.codebooks:
            assert float(book.log_prior.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_split_and_merge_leave_a_poor_optimum():
    """One code serves everyone, the other one nobody; steps alone never mend that."""
    engine, block, _ = make(1, users=60)
    config = replace(CONFIG, start="random", held_out=0.0, gain=0.05)
    generator = torch.Generator().manual_seed(0)
    here = torch.randn(1, engine.lm.hidden_size, generator=generator) * engine.lm.embedding_rms
    book = Codebook(torch.cat([here, 100 * here]))
    book.log_prior = torch.tensor([1 - 1e-6, 1e-6]).log()
    fields = (ProfileField("a", "", 1, 2),)
    alone, freed = (
        list(islice(Mixture(Apart(block, engine, config), engine, config, f).rounds([book]), 4))
        for f in ((), fields)
    )
    used = [f[-1].found.used[0].min() for f in (alone, freed)]
    assert used[0] < 1 < 5 < used[1]
    assert freed[-1].found.objective > alone[-1].found.objective + 1.0
    objective = [f.found.objective for f in freed]
    assert all(b >= a for a, b in pairwise(objective))


def test_codes_that_are_words_keep_their_places():
    engine, block, _ = make(2, users=60)
    fields = (ProfileField("a", "", 1, 2, ("rod", "lamp")), ProfileField("b", "", 1, 2))
    assert Mixture(Apart(block, engine, CONFIG), engine, CONFIG, fields).loose == [1]
    told = replace(CONFIG, start="random")
    assert Mixture(Apart(block, engine, CONFIG), engine, told, fields).loose == [0, 1]


@pytest.mark.parametrize(
    ("training", "judges", "stays"), [(1, 0, True), (-1, 1, False), (1, -1, False)]
)
def test_a_round_that_lowers_it_is_taken_back(monkeypatch, training, judges, stays):
    """For the training users, or for those held out."""
    engine, block, books = make(1, users=60)
    mixture = Mixture(Apart(block, engine, CONFIG), engine, CONFIG)
    assert (mixture.users.trained, mixture.users.judged) == (54, 6)
    real, calls = Mixture._judge, []

    def judge(self, codebooks, lr):
        calls.append(codebooks)
        at = real(self, codebooks, lr)
        later = len(calls) > 1
        values = {"objective": training * later, "held_out": judges * later}
        return replace(at, found=replace(at.found, **values))

    monkeypatch.setattr(Mixture, "_judge", judge)
    before, after = islice(mixture.rounds(books), 2)
    assert after.codebooks is (calls[1] if stays else calls[0])
    assert (after.gain, after.lr) == ((1.0, before.lr) if stays else (0.0, before.lr / 2))


def test_starts():
    engine, block, _ = make(2)
    center = torch.randn(2, engine.lm.hidden_size)
    few = (ProfileField("a", "", 1, 4, ("rod", "lamp")), ProfileField("b", "", 1, 2))
    starts = Starts(block, engine, CONFIG, few, center)
    assert starts.drawn
    a, b = starts.draw(0)
    torch.testing.assert_close(a.codewords[0], engine.lm.word_embedding("rod"))
    assert (len(a), len(b)) == (4, 2)
    assert not torch.equal(a.codewords[2:], starts.draw(1)[0].codewords[2:])
    spread = (b.codewords - center[1]).square().mean().sqrt()
    assert 0.3 < float(spread) / engine.lm.embedding_rms < 0.7

    many = (ProfileField("a", "", 1, 2, ("rod", "lamp", "tent", "paint")), few[1])
    chosen = Starts(block, engine, CONFIG, many, center).draw(0)[0]
    words = [engine.lm.word_embedding(w) for w in many[0].candidates]
    assert len(chosen) == 2
    assert all(any(torch.allclose(c, w) for w in words) for c in chosen.codewords)
    kmeans = Starts(block, engine, replace(CONFIG, start="kmeans++"), few, center).draw(0)
    assert [len(book) for book in kmeans] == [4, 2]
    with pytest.raises(ConfigError, match="field 'b' has no candidate words"):
        Starts(block, engine, replace(CONFIG, start="words"), few, center)


def test_fit_infer_and_resume_with_probabilities(tmp_path):
    from test_resume import read

    lm = tiny.frozen("llama")
    em = replace(CONFIG, rounds=2, prune_share=0.34, restarts=2, gain=0.0)
    fields = (ProfileField("taste", "The user's taste is", 1, 4, ("rod", "lamp")),
              ProfileField("b", "b", 1, 3))  # fmt: skip
    config = Config(
        data=DataConfig(max_tokens=60, behaviour_context="sequence"), em=em, fields=fields
    )
    model = uf.fit(read(), lm, config=config, out=tmp_path / "run", probabilities=True)
    bank = uf.FeatureBank.open(tmp_path / "run" / "bank")
    assert bank.probabilities.shape == (24, 2)
    assert (bank.probabilities > 1 / 4 - 1e-6).all()
    state = tmp_path / "run" / "checkpoints" / "round-0003" / "state.json"
    elbo = [r["elbo"] for r in uf.core.files.read_json(state)["records"]]
    assert elbo == sorted(elbo)

    one = replace(config, em=replace(em, rounds=1))
    uf.fit(read(), lm, config=one, out=tmp_path / "part")
    went_on = uf.fit(read(), lm, config=config, out=tmp_path / "part", resume=True)
    assert went_on.fingerprint == model.fingerprint

    loaded = replace(model, trainer=None)  # has no memory of the fit
    again = loaded.infer(read(), tmp_path / "bank", probabilities=True)
    assert np.array_equal(again.codes(), bank.codes())
    np.testing.assert_allclose(again.probabilities, bank.probabilities, rtol=1e-5)
    with pytest.raises(ConfigError, match="a nearest codeword has none"):
        uf.fit(
            read(), lm, config=replace(config, em=EMConfig(estep="gradient")), probabilities=True
        )

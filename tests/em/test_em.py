from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.core.errors import DataError
from userip_fast.em import Block, EMState, GradientEStep, Profiles, Stats, ThetaMStep
from userip_fast.em.gradient import assign
from userip_fast.em.paper import run_paper
from userip_fast.lm import PackedEngine, ReferenceEngine
from userip_fast.ops import sparse_adam
from userip_fast.prompts.layout import ProfileField
from userip_fast.prompts.packing import iter_packs, make_pack

CONFIG = EMConfig(lr=0.2, steps=4, tolerance=0.0)


@pytest.fixture(scope="module")
def engine():
    lm = tiny.frozen("llama")
    return PackedEngine(lm, tiny.template().layout(lm.tokenizer))


def block(engine, users=9):
    hashes = np.sort(np.random.default_rng(1).integers(0, 2**63, users).astype(np.uint64) * 2)
    return Block(tiny.behaviour(engine.layout, users), hashes)


def part(whole, users):
    return Block(whole.behaviour.select(users), whole.hashes[users])


def start_of(engine):
    return torch.zeros(engine.layout.num_soft, engine.lm.hidden_size)


def test_gradient_estep_lowers_every_nll_and_counts_its_passes(engine):
    b = block(engine)
    none = GradientEStep(engine, start_of(engine), replace(CONFIG, steps=1, lr=1e-9))
    before = none.run(b, None, EMState())
    after = GradientEStep(engine, start_of(engine), CONFIG).run(b, None, EMState())
    assert (after.nll < before.nll).all()
    assert after.code_ids is None
    assert after.forward_equivalents.tolist() == [8.0] * 9
    torch.testing.assert_close(after.weight, torch.from_numpy(b.behaviour.total_weight))


def test_a_user_does_not_depend_on_pack_block_or_company(engine):
    b = block(engine)
    whole = GradientEStep(engine, start_of(engine), CONFIG).run(b, None, EMState())
    small = GradientEStep(engine, start_of(engine), replace(CONFIG, pack_tokens=64))
    torch.testing.assert_close(small.run(b, None, EMState()).theta, whole.theta)
    some = np.array([1, 4, 8])
    alone = GradientEStep(engine, start_of(engine), CONFIG).run(part(b, some), None, EMState())
    torch.testing.assert_close(alone.theta, whole.theta[torch.from_numpy(some)])


def test_the_estep_repeats_bit_for_bit(engine):
    b = block(engine)
    runs = [GradientEStep(engine, start_of(engine), CONFIG).run(b, None, EMState()) for _ in "ab"]
    assert torch.equal(runs[0].theta, runs[1].theta)
    assert torch.equal(runs[0].nll, runs[1].nll)


def test_converged_users_leave(engine):
    config = replace(CONFIG, steps=20, tolerance=1e9, patience=2)
    found = GradientEStep(engine, start_of(engine), config).run(block(engine), None, EMState())
    assert found.forward_equivalents.tolist() == [2.0 * 3] * 9  # first is "better" than inf


def test_every_pass_moves_theta_and_the_nll_is_of_the_last(engine, monkeypatch):
    """No pass is there for its NLL alone."""
    scored, plain = [], engine.nll
    monkeypatch.setattr(engine, "nll", lambda *a: scored.append(plain(*a)) or scored[-1])
    found = GradientEStep(engine, start_of(engine), CONFIG).run(block(engine), None, EMState())
    assert len(scored) == 4
    assert all(nll.requires_grad for nll in scored)
    assert torch.equal(found.nll, scored[-1].detach())
    assert found.forward_equivalents.tolist() == [8.0] * 9


def test_a_long_history_in_sequences_is_one_user():
    """Sequences of a user are scored as users that share one theta."""
    lm = tiny.frozen("llama")
    layout = tiny.template(2, 2).layout(lm.tokenizer)
    engine = PackedEngine(lm, layout)
    b = tiny.behaviour(layout, users=7, chunk_tokens=30)
    split, user = b.by_sequence()
    owner = torch.from_numpy(user)
    assert len(user) > 9
    theta = (torch.randn(7, layout.num_soft, lm.hidden_size) * lm.embedding_rms).requires_grad_()
    found = []
    for make in (engine, ReferenceEngine(lm, layout)):
        nll = make.nll(make_pack(b, np.arange(7), layout, lm.device), theta)
        found.append((nll, *torch.autograd.grad(nll.square().sum(), theta)))
    alone = engine.nll(make_pack(split, np.arange(len(user)), layout, lm.device), theta[owner])
    nll = torch.zeros(7).index_add(0, owner, alone)
    found.append((nll, *torch.autograd.grad(nll.square().sum(), theta)))
    for a in found[1:]:
        for x, y in zip(found[0], a):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.detach().abs().max()))


def profiles(users, k=3, dim=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    hashes = np.sort(np.random.default_rng(seed).integers(0, 2**64, users, dtype=np.uint64))
    return Profiles(
        hashes=hashes,
        code_ids=torch.randint(k, (users, 2), generator=g),
        nll=torch.rand(users, generator=g),
        weight=torch.rand(users, generator=g).double(),
        forward_equivalents=torch.ones(users),
        theta=torch.randn(users, 2, dim, generator=g),
    )


def cut(p, a, b):
    return Profiles(p.hashes[a:b], p.code_ids[a:b], p.nll[a:b], p.weight[a:b],
                    p.forward_equivalents[a:b], p.theta[a:b])  # fmt: skip


FIELDS = (ProfileField("a", "", 1, 3), ProfileField("b", "", 1, 3))
SLICES = (slice(0, 1), slice(1, 2))


def test_statistics_do_not_depend_on_blocks_and_add_over_shards():
    p = profiles(2000)
    books = [Codebook(torch.randn(3, 4)) for _ in range(2)]

    def stats(bounds):
        out = Stats(50)
        for a, b in pairwise(bounds):
            out.add_(cut(p, a, b), books, SLICES)
        return out

    one, many = stats([0, 2000]), stats([0, 1, 7, 512, 513, 1999, 2000])
    half = int(np.searchsorted(p.hashes, np.uint64(2**63)))  # whole shards on either side
    left, right = Stats(50), Stats(50)
    left.add_(cut(p, 0, half), books, SLICES)
    right.add_(cut(p, half, 2000), books, SLICES)
    for other in (many, left + right):
        for j in range(2):
            assert torch.equal(one.total().counts[j], other.total().counts[j])
            assert torch.equal(one.total().sums[j], other.total().sums[j])
        assert torch.equal(one.total().scalars, other.total().scalars)
        assert torch.equal(one.sample_theta, other.sample_theta)
    expected = torch.zeros(3, 4, dtype=torch.float64).index_add(
        0, p.code_ids[:, 1], p.theta[:, 1].double()
    )
    torch.testing.assert_close(one.total().sums[1], expected)
    assert one.total().scalars[0] == 2000


@pytest.mark.parametrize("update", ["kmeans", "ema", "mse"])
def test_codebook_updates_follow_their_formulas(update):
    config = EMConfig(codebook_update=update, ema_decay=0.75, mse_lr=0.1, dead_code_threshold=0)
    p = profiles(300)
    mstep = ThetaMStep(FIELDS, SLICES, config)
    mstep.codebooks = [Codebook(torch.randn(3, 4)) for _ in range(2)]
    old = [book.codewords.clone() for book in mstep.codebooks]
    new = mstep.apply(mstep.stats(p))
    for j in range(2):
        x, z = p.theta[:, j].double(), p.code_ids[:, j]
        for k in range(3):
            own, c = x[z == k], old[j][k].double()
            if update == "kmeans":
                want = own.mean(0)
            elif update == "ema":
                want = (0.75 * c + 0.25 * own.sum(0)) / (0.75 + 0.25 * len(own))
            else:
                want = c + 0.1 * 3 * (own - c).sum(0) / len(x)
            torch.testing.assert_close(new[j].codewords[k].double(), want, rtol=1e-5, atol=1e-6)


def test_first_codebooks_come_from_kmeans_and_dead_codes_revive():
    p = profiles(400)
    centers = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0]])
    truth = torch.arange(400) % 3
    p.theta[:, 0] = centers[truth] + 0.1 * p.theta[:, 0]
    mstep = ThetaMStep(FIELDS, SLICES, EMConfig())
    books = mstep.apply(mstep.stats(replace(p, code_ids=None)))
    z = books[0].assign(p.theta[:, 0])[0]
    assert len({(int(a), int(b)) for a, b in zip(z, truth)}) == 3

    books[0].codewords[2] = 1e4  # nobody's
    z = assign(books, p.theta, SLICES)
    mstep.codebooks = books
    revived = mstep.apply(mstep.stats(replace(p, code_ids=z)))
    assert mstep.revived == 1
    assert revived[0].usage(revived[0].assign(p.theta[:, 0])[0]).dead == 0


def test_a_codebook_larger_than_the_users_is_refused():
    mstep = ThetaMStep(FIELDS, SLICES, EMConfig())
    with pytest.raises(DataError, match="codebook_size of field 'a' is 3, more than the 2 users"):
        mstep.apply(mstep.stats(replace(profiles(2), code_ids=None)))


def test_the_paper_recipe_learns_jointly_and_repeats(engine):
    b = block(engine)
    config = EMConfig(paper_epochs=3, paper_batch=4, paper_lr=0.05)
    fields = tiny.template().fields
    books, found = run_paper(b, engine, fields, config)
    again, twice = run_paper(b, engine, fields, config)
    assert torch.equal(found.theta, twice.theta)
    assert all(torch.equal(x.codewords, y.codewords) for x, y in zip(books, again))
    untrained, start = run_paper(b, engine, fields, replace(config, paper_lr=1e-12))
    assert start.theta.abs().max() <= 0.1
    assert untrained[0].codewords.abs().max() <= 1 / 3
    assert found.nll.sum() < start.nll.sum()
    assert not torch.equal(books[0].codewords, untrained[0].codewords)
    frozen, _ = run_paper(b, engine, fields, config, codebooks=books)
    assert all(torch.equal(x.codewords, y.codewords) for x, y in zip(books, frozen))


def test_the_device_is_waited_for_once_a_block_of_steps(engine, monkeypatch):
    """Looks at NLLs of a device are `Tensor.cpu`; nobody can leave before `patience` steps."""
    start, steps, looks = start_of(engine), [], []
    config = replace(CONFIG, steps=6, patience=3, pack_tokens=10**6)
    estep = GradientEStep(engine, start, config, on_step=lambda *a: steps.append(a))
    b = block(engine, users=5)
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: looks.append(tuple(x.shape)) or plain(x))
    theta, _, cost = estep._descend(b, start.expand(5, -1, -1))
    monkeypatch.undo()
    # Three steps of five users, twice; and what is given back.
    assert looks == [(3, 5), (3, 5), tuple(theta.shape)]
    assert cost.tolist() == [12.0] * 5
    assert len(steps) == 6
    assert torch.equal(theta, step_by_step(engine, b, start, config))


def step_by_step(engine, block, start, config):
    """The same descent, each step looked at as it comes; nobody leaves before the last."""
    lm, users = engine.lm, block.behaviour.num_users
    theta = start.expand(users, -1, -1).clone()
    rows = theta.view(-1, lm.hidden_size)
    m, v = torch.zeros_like(rows), torch.zeros_like(rows)
    count = torch.zeros(len(rows), dtype=torch.int32)
    weight = torch.from_numpy(block.behaviour.total_weight).float()
    (pack,) = iter_packs(block.behaviour, np.arange(users), engine.layout, lm.device, 10**6)
    for _ in range(config.steps):
        x = theta.clone().requires_grad_()
        (grad,) = torch.autograd.grad((engine.nll(pack, x) / weight).sum(), x)
        sparse_adam(
            rows, m, v, count, torch.arange(len(rows)), grad.reshape(rows.shape),
            lr=config.lr * lm.embedding_rms,
        )  # fmt: skip
    return theta

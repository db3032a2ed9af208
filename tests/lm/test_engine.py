"""The engines against a dense fp64 computation that shares no code with them."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from userip_fast.lm import PackedEngine, ReferenceEngine
from userip_fast.prompts.packing import iter_packs, make_pack
from userip_fast.testing import assert_close_to_oracle


def dense_nll(family, tok, template, behaviour, theta, context, dtype=torch.float64):
    """One user at a time, the rules of the mask spelled out token by token, in `dtype`.

    Rebuilds prompt, mask and loss from the template and the behaviour tokens alone.
    """
    model = tiny.model(family, torch.float32).to(dtype).eval()
    model.set_attn_implementation("eager")
    embed = model.get_input_embeddings()
    window = getattr(model.config, "sliding_window", None)
    if not getattr(model.config, "use_sliding_window", True):
        window = None
    out = []
    for u in range(behaviour.num_users):
        rows, kind, position = [embed(torch.tensor([tok.bos_token_id]))[0]], ["bos"], [0]
        at = 0
        for j, f in enumerate(template.fields):
            ids = tok(f.prompt, add_special_tokens=False)["input_ids"] if f.prompt else []
            for i in ids:
                rows.append(embed(torch.tensor([i]))[0])
                kind.append(j)
            for _ in range(f.num_virtual_tokens):
                rows.append(theta[u, at])
                kind.append(j)
                at += 1
        position = list(range(len(rows)))
        head = len(rows)
        source = range(behaviour.offsets[u], behaviour.offsets[u + 1])
        tokens = [int(behaviour.ids[i]) for i in source]
        event, starts = -1, []
        for i in source:  # an event starts where weight is 0 after an event has ended
            starts.append(int(behaviour.position[i]))
        for n, i in enumerate(tokens):
            if context == "independent" and (n == 0 or starts[n] <= starts[n - 1]):
                event += 1
            rows.append(embed(torch.tensor([i]))[0])
            kind.append(f"event{event}" if context == "independent" else "behaviour")
            position.append(starts[n])
        x = torch.stack(rows)

        def sees(r, c, kind=kind):
            if c > r:
                return False
            if kind[c] == "bos" or kind[r] == kind[c]:
                return True
            return isinstance(kind[r], str) and kind[r] != "bos" and isinstance(kind[c], int)

        length = len(rows)
        full = torch.tensor([[sees(r, c) for c in range(length)] for r in range(length)])
        near = torch.tensor(
            [[position[c] > position[r] - (window or 10**9) for c in range(length)]
             for r in range(length)]
        )  # fmt: skip

        def additive(mask):
            return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))[
                None, None
            ]

        kinds = set(getattr(model.config, "layer_types", None) or [])
        mask = additive(full & near) if window else additive(full)
        if "sliding_attention" in kinds:
            mask = {"full_attention": additive(full), "sliding_attention": additive(full & near)}
        logits = model(
            inputs_embeds=x[None].to(dtype), attention_mask=mask, use_cache=False,
            position_ids=torch.tensor(position)[None],
        ).logits[0]  # fmt: skip
        total = torch.zeros((), dtype=dtype)
        for n, i in enumerate(source):
            if behaviour.weight[i] > 0:
                log_p = F.log_softmax(logits[head + n - 1], -1)
                total = total - float(behaviour.weight[i]) * log_p[tokens[n]]
        out.append(total)
    return torch.stack(out)


def compare(family, fields, m, context, feedback=True):
    lm = tiny.frozen(family)
    template = tiny.template(fields, m)
    layout = template.layout(lm.tokenizer)
    behaviour = tiny.behaviour(layout, context=context, feedback=feedback)
    users = behaviour.num_users
    theta = torch.randn(users, layout.num_soft, lm.hidden_size) * lm.embedding_rms
    weight = torch.rand(users) + 0.5

    def run(function, x):
        x = x.detach().clone().requires_grad_()
        nll = function(x)
        (nll * weight.to(nll)).sum().backward()
        return nll.detach(), x.grad

    def packed(engine):
        def nll(x):
            parts = torch.zeros(users)
            for pack in iter_packs(behaviour, np.arange(users), layout, lm.device, 90):
                index = torch.from_numpy(pack.users)
                parts = parts.index_copy(0, index, engine.nll(pack, x[index]))
            return parts

        return nll

    def dense(dtype):
        return lambda x: dense_nll(family, lm.tokenizer, template, behaviour, x, context, dtype)

    oracle = run(dense(torch.float64), theta.double())
    low = run(dense(torch.float32), theta)
    for engine in (PackedEngine(lm, layout), ReferenceEngine(lm, layout)):
        nll, grad = run(packed(engine), theta)
        name = type(engine).__name__
        assert_close_to_oracle(nll, oracle[0], low[0], ulps=16, name=f"{name} nll")
        assert_close_to_oracle(grad, oracle[1], low[1], ulps=64, name=f"{name} gradient")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_equal_dense_fp64(family):
    compare(family, 2, 1, "sequence")


@pytest.mark.parametrize(("fields", "m"), [(1, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("context", ["sequence", "independent"])
def test_layouts_equal_dense_fp64(fields, m, context):
    compare("llama", fields, m, context)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_independent_events_without_feedback(family):
    compare(family, 2, 1, "independent", feedback=False)


def test_slack_rows_and_users_leave_no_trace():
    """Padding the pack, or packing other users beside, changes nothing of a user's NLL."""
    lm = tiny.frozen("llama")
    layout = tiny.template().layout(lm.tokenizer)
    behaviour = tiny.behaviour(layout)
    engine = PackedEngine(lm, layout)
    theta = torch.randn(behaviour.num_users, layout.num_soft, lm.hidden_size)
    everyone = make_pack(behaviour, np.arange(behaviour.num_users), layout, lm.device, pad_to=128)
    together = engine.nll(everyone, theta)
    for u in range(behaviour.num_users):
        alone = engine.nll(make_pack(behaviour, np.array([u]), layout, lm.device), theta[u : u + 1])
        torch.testing.assert_close(alone[0], together[u], rtol=1e-5, atol=1e-5)


def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch):
    from userip_fast.lm.load import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda", 3)
    assert resolve_device("cpu") == torch.device("cpu")

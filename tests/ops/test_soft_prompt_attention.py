from itertools import pairwise

import pytest
import torch
from soft_prompt_cases import Case, dense_attention, gradients, make_case, run_op

from userip_fast.ops import soft_prompt_attention
from userip_fast.ops.soft_prompt_attention import (
    _soft_prompt_attention,
    _soft_prompt_attention_backward,
)
from userip_fast.testing import assert_close_to_oracle, poisoned_memory

CASES = {
    "one field": {"behaviour": [5, 1, 9], "names": (3,)},
    "two fields, GQA, slack": {"behaviour": [4, 11, 2], "heads": 4, "kv_heads": 2, "slack": 5},
    "no prefix": {"behaviour": [3, 6], "names": (0, 0), "bos": False},
    "empty prompts, m = 3": {"behaviour": [7, 2], "names": (0, 2, 0), "virtual": 3, "dim": 16},
    "independent items": {"behaviour": [9, 4, 6], "items": 3, "virtual": 2, "slack": 1},
    "window": {"behaviour": [12, 3, 20], "window": 6, "virtual": 2, "slack": 3},
    "window of two": {"behaviour": [5, 4], "window": 2},
    "softcap": {"behaviour": [8, 13], "softcap": 2.0, "heads": 3, "kv_heads": 3, "spread": 2.0},
    "window, items, softcap": {"behaviour": [8, 13], "window": 3, "items": 5, "softcap": 5.0},
    "large scores": {"behaviour": [10, 7], "scale": 30.0},
    "one user of many rows": {"behaviour": [77], "heads": 4, "kv_heads": 2},
}
NAMES = ("out", "dq", "dk", "dv")


def compare(case: Case, impl: str) -> None:
    """out and all gradients against fp64 autograd of the dense oracle, in poisoned memory."""
    d_out = torch.randn(case.tensors[0].shape, dtype=torch.float64)
    oracle = gradients(dense_attention, case.cast(torch.float64), d_out)
    low = gradients(dense_attention, case, d_out)
    with poisoned_memory():
        got = gradients(run_op(impl), case, d_out)
    for name, g, o, x in zip(NAMES, got, oracle, low, strict=True):
        assert_close_to_oracle(g, o, x, name=name)
    end = int(case.pack[2][-1])
    for name, g in zip(NAMES, got, strict=True):
        assert not g[end:].any(), f"{name}: slack rows must be exactly zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_equals_dense_fp64(impl, name, dtype):
    compare(make_case(**CASES[name], dtype=dtype), impl)


def test_reference_in_fp64_is_exact():
    case = make_case([6, 9], softcap=4.0, window=7, slack=2, dtype=torch.float64)
    d_out = torch.randn_like(case.tensors[0])
    got, oracle = (gradients(f, case, d_out) for f in (run_op("reference"), dense_attention))
    for g, o in zip(got, oracle, strict=True):
        torch.testing.assert_close(g, o, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_user_does_not_depend_on_the_batch(impl):
    case = make_case([6, 30, 2], slack=3)
    cu = case.pack[2].tolist()
    d_out = torch.randn_like(case.tensors[0])
    whole = gradients(run_op(impl), case, d_out)
    for a, b in pairwise(cu):
        segment, prefix_segment, _, position, prefix_position = case.pack
        alone = Case(
            (*(x[a:b] for x in case.tensors[:3]), *case.tensors[3:]),
            (
                segment[a:b],
                prefix_segment,
                torch.tensor([0, b - a], dtype=torch.int32),
                position[a:b],
                prefix_position,
            ),
            case.options,
        )
        for w, s in zip(whole, gradients(run_op(impl), alone, d_out[a:b]), strict=True):
            torch.testing.assert_close(w[a:b], s)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_users_without_rows_and_empty_packs(impl):
    case = make_case([3, 5], slack=2)
    cu = torch.tensor([0, 0, 5, 5, 12, 12], dtype=torch.int32)
    segment, prefix_segment, _, position, prefix_position = case.pack
    gaps = Case(
        case.tensors, (segment, prefix_segment, cu, position, prefix_position), case.options
    )
    compare(gaps, impl)
    none = Case(
        tuple(x[:0] if i < 3 else x for i, x in enumerate(case.tensors)),
        (segment[:0], prefix_segment, cu[:1], position[:0], prefix_position),
        case.options,
    )
    assert run_op(impl)(none).shape == (0, 2, 8)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_opcheck(impl):
    case = make_case([3, 4], window=4, softcap=3.0)
    settings = (*(case.options[x] for x in ("num_fields", "scale", "window", "softcap")), 0, impl)
    leaves = [x.detach().requires_grad_() for x in case.tensors[:3]]
    args = (*leaves, *case.tensors[3:], *case.pack, *settings)
    torch.library.opcheck(_soft_prompt_attention, args)
    plain = (*case.tensors, *case.pack)
    out, lse = _soft_prompt_attention(*plain, *settings)
    torch.library.opcheck(
        _soft_prompt_attention_backward, (torch.ones_like(out), *plain, out, lse, *settings)
    )


def test_traces_as_one_graph():
    case = make_case([3, 4])
    fn = torch.compile(run_op("auto"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(case), run_op("auto")(case))


def test_bad_arguments_are_named():
    case = make_case([3, 4])
    q, k, v, prefix_k, prefix_v = case.tensors

    def call(tensors=case.tensors, pack=case.pack, **changes):
        return soft_prompt_attention(*tensors, *pack, **{**case.options, **changes})

    with pytest.raises(ValueError, match="constants"):
        call((q, k, v, prefix_k.clone().requires_grad_(), prefix_v))
    with pytest.raises(ValueError, match="v must be torch"):
        call((q, k, v.double(), prefix_k, prefix_v))
    with pytest.raises(ValueError, match="head size 4"):
        call(tuple(x[..., :4] for x in case.tensors))
    with pytest.raises(ValueError, match="last dimension of k"):
        call((q, torch.cat([k, k], 2)[..., ::2], v, prefix_k, prefix_v))
    with pytest.raises(ValueError, match=r"segment must be int32 \[11\]"):
        call(pack=(case.pack[0].long(), *case.pack[1:]))
    for change in ({"num_fields": 0}, {"window": -1}, {"softcap": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(change))):
            call(**change)
    with pytest.raises(ValueError, match="impl='nope'"):
        call(impl="nope")
    for bad in ([1, 11], [0, 7, 3], [0, 12]):
        pack = list(case.pack)
        pack[2] = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
            call(pack=tuple(pack))

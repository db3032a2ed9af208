from itertools import pairwise

import pytest
import torch
from soft_prompt_cases import (
    CASES,
    Case,
    compare,
    dense_attention,
    gradients,
    make_case,
    run_op,
)

from userip_fast.ops import soft_prompt_attention
from userip_fast.ops.soft_prompt_attention import (
    attention_backward,
    attention_forward,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_equals_dense_fp64(impl, name, dtype):
    compare(make_case(**CASES[name], dtype=dtype), impl)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_scores_past_the_range_of_exp(impl):
    case = make_case([10, 3], scale=60.0)
    q, k = case.tensors[:2]
    largest = float((q.norm(dim=-1).max() * k.norm(dim=-1).max()) * 60.0)
    assert largest > 400.0  # exp overflows at 89
    d_out = torch.randn_like(q)
    oracle = gradients(dense_attention, case.cast(torch.float64), d_out)
    for g, o in zip(gradients(run_op(impl), case, d_out), oracle, strict=True):
        # a rounded score moves a probability by its own rounding error
        bound = 8 * torch.finfo(g.dtype).eps * largest * float(o.abs().max())
        assert float((g.double() - o).abs().max()) <= bound


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
    case = make_case([3, 4], window=4, softcap=3.0, sinks=True, v_dim=12)
    leaves = [x.detach().requires_grad_() for x in case.tensors[:3]]
    torch.library.opcheck(attention_forward.op, (*leaves, *case.context, impl))
    qkv = case.tensors[:3]
    out, lse = attention_forward(*qkv, case.context, impl)
    args = (torch.ones_like(out), *qkv, out, lse, *case.context, impl)
    torch.library.opcheck(attention_backward.op, args)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradients_by_the_dispatcher_and_beside_it(impl, monkeypatch):
    """The same bits; and no argument but q, k and v has a gradient."""
    case = make_case([3, 4], slack=2)
    d_out = torch.randn_like(case.tensors[0])
    direct = gradients(run_op(impl), case, d_out)
    monkeypatch.setattr("userip_fast.ops._operator.watched", lambda x: True)
    for a, b in zip(direct, gradients(run_op(impl), case, d_out), strict=True):
        assert torch.equal(a, b)


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
    for change in (
        {"num_fields": 0}, {"window": -1}, {"softcap": float("nan")}, {"chunk": 3, "window": 3},
        {"sinks": torch.zeros(3)}, {"sinks": torch.zeros(2).requires_grad_()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(change))):
            call(**change)
    with pytest.raises(ValueError, match="impl='nope'"):
        call(impl="nope")
    for bad in ([1, 11], [0, 7, 3], [0, 12]):
        pack = list(case.pack)
        pack[2] = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
            call(pack=tuple(pack))

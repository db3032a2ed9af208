"""Packed and e4m3 operators of a block against float64, in place and side by side.

As a script: compiles the kernels for one architecture and prints the reports (see codegen.py).
"""

import sys
from pathlib import Path

import pytest
import torch

from userip_fast.ops import frozen_block
from userip_fast.ops import packed_block as ops
from userip_fast.testing import assert_close_to_oracle, poisoned_memory

ARCHES = (80, 86, 89, 90)
# Triton's interpreter truncates to bfloat16 instead of rounding.
WAYS = [
    ("reference", torch.float32), ("reference", torch.bfloat16),
    ("triton", torch.float32), ("triton", torch.float16),
]  # fmt: skip
ways = pytest.mark.parametrize(("impl", "dtype"), WAYS)


@pytest.fixture
def rounded_e4m3(monkeypatch):
    """Triton's interpreter (3.9) loses the carry when it rounds to e4m3; torch does not."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    plain = interpreter._convert_float

    def convert(data, source, target, mode):
        if source == tl.float32 and target == tl.float8e4nv:
            x = torch.from_numpy(data.copy()).to(torch.float8_e4m3fn)
            return x.view(torch.uint8).numpy()
        return plain(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def judged(op, inputs, *others, impl):
    """An operator on inputs of 16 or 32 bits against the reference in float64."""
    with poisoned_memory():
        got = op(*inputs, *others, impl)
    low = op(*inputs, *others, "reference")
    oracle = op(*(x.double() for x in inputs), *others, "reference")
    assert_close_to_oracle(got, oracle, low)
    return got


@ways
@pytest.mark.parametrize("act", frozen_block.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (2, 1023), (3, 1024), (2, 2100)])
def test_gated_halves(rows, width, act, dtype, impl):
    x, dy = (torch.randn(rows, n).to(dtype) for n in (2 * width, width))
    y = judged(ops.gated_halves, (x,), act, impl=impl)
    judged(ops.gated_halves_backward, (dy, x), act, impl=impl)
    if impl == "triton":  # the same kernel's text: the same bits
        assert torch.equal(y, frozen_block.gated(*x.chunk(2, 1), act, impl=impl))


@ways
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 2), (3, 5, 6), (4, 9, 64), (2, 8, 80)])
def test_turning_in_place_leaves_the_rest_of_the_row(rows, heads, dim, dtype, impl):
    whole = torch.randn(rows, heads + 3, dim).to(dtype)
    angles = [torch.randn(rows, dim).to(dtype) for _ in range(2)]
    for backward in (False, True):
        got = whole.clone()
        ops.turn_(got[:, :heads], *angles, backward, impl)
        oracle, low = (
            frozen_block.rotate_reference(x[:, :heads], *a, backward)
            for x, a in ((whole.double(), [t.double() for t in angles]), (whole, angles))
        )
        assert_close_to_oracle(got[:, :heads], oracle, low)
        assert torch.equal(got[:, heads:], whole[:, heads:])


@ways
@pytest.mark.parametrize(("rows", "heads", "queries", "dim"), [(1, 2, 1, 2), (3, 12, 9, 64)])
def test_norms_of_heads_before_turning_both_ways(rows, heads, queries, dim, dtype, impl):
    raw = torch.randn(rows, heads + 2, dim).to(dtype)  # with values behind
    weights = [(torch.rand(dim) + 0.5).to(dtype) for _ in range(2)]
    angles = [torch.randn(rows, dim).to(dtype) for _ in range(2)]
    d = torch.randn(rows, heads + 2, dim).to(dtype)

    def run(how, to):
        x, w, a = (
            raw[:, :heads].to(to), [t.to(to) for t in weights], [t.to(to) for t in angles],
        )  # fmt: skip
        norm = ops.HeadNorm(*w, *a, queries, 1e-5, 0.5)
        y = ops.norm_turn(x, norm, how)
        back = d.to(to, copy=True)
        ops.norm_turn_backward_(back[:, :heads], x, norm, how)
        return y, back

    oracle, low = run("reference", torch.float64), run("reference", dtype)
    with poisoned_memory():
        got = run(impl, dtype)
    for g, o, n in zip(got, oracle, low, strict=True):
        assert_close_to_oracle(g, o, n)
    assert torch.equal(got[1][:, heads:], d[:, heads:])
    # The formula itself, by autograd of the plain one.
    x = raw[:, :heads].double().requires_grad_()
    normed = x * torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-5)
    scale = torch.stack([weights[0]] * queries + [weights[1]] * (heads - queries)).double() + 0.5
    turned = frozen_block.rotate_reference(normed * scale, *(t.double() for t in angles), False)
    torch.testing.assert_close(turned, oracle[0])
    (want,) = torch.autograd.grad(turned, x, d[:, :heads].double())
    torch.testing.assert_close(oracle[1][:, :heads], want)


def dequantised(pair):
    values, scale = pair
    return values.float() * scale[:, None]


def within_half_a_step(pair, exact):
    """e4m3 has 3 bits behind the point: 1/16 of a value at most, or 2^-10 of the smallest."""
    got, want = dequantised(pair).double(), exact.double()
    bound = want.abs() / 16 + pair[1][:, None].double() * 2**-10
    assert bool(((got - want).abs() <= 1.0001 * bound).all())


@ways
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 130), (2, 2100), (2, 8200)])
def test_casts_are_within_half_a_step_and_the_same_everywhere(
    rows, width, dtype, impl, rounded_e4m3
):
    x = (torch.randn(rows, width + 5) * 3).to(dtype)[:, :width]  # rows apart
    x[0, 0] = 0
    with poisoned_memory():
        values, scale = ops.cast_rows(x, impl)
    within_half_a_step((values, scale), x)
    assert values.float().abs().amax() == ops.LARGEST or not x.any()
    want = ops.cast_rows_reference(x)
    assert torch.equal(values.view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(scale, want[1])
    zero = ops.cast_rows(torch.zeros(2, width, dtype=dtype), impl)
    assert bool((zero[1] == 1).all() and (zero[0].float() == 0).all())
    spoiled = x.clone()
    spoiled[0, 0] = torch.nan
    assert bool(dequantised(ops.cast_rows(spoiled, impl))[0, 0].isnan())


@ways
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 130), (2, 1031)])
def test_a_norm_in_e4m3(rows, width, joined, dtype, impl, rounded_e4m3):
    x, residual = (torch.randn(rows, width).to(dtype) for _ in range(2))
    weight, residual = torch.randn(width).to(dtype), residual if joined else None
    with poisoned_memory():
        values, scale, total, r = ops.rms_norm_e4m3(x, residual, weight, 1e-3, 0.5, impl)
    s = x if residual is None else x + residual
    assert torch.equal(total, s if joined else x.new_empty(0))
    y, _, want_r = frozen_block.rms_norm_reference(s.double(), None, weight.double(), 1e-3, 0.5)
    within_half_a_step((values, scale), y)
    torch.testing.assert_close(r, want_r.float())


@ways
@pytest.mark.parametrize("act", frozen_block.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 130), (2, 2100)])
def test_gated_halves_in_e4m3(rows, width, act, dtype, impl, rounded_e4m3):
    x, dy = (torch.randn(rows, n).to(dtype) for n in (2 * width, width))
    with poisoned_memory():
        y = ops.gated_halves_e4m3(x, act, impl)
        dx = ops.gated_halves_backward_e4m3(dy, x, act, impl)
    within_half_a_step(y, ops.gated_halves(x.double(), act, "reference"))
    within_half_a_step(dx, ops.gated_halves_backward(dy.double(), x.double(), act, "reference"))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nothing_is_launched_for_no_rows(impl):
    x = torch.zeros(0, 8)
    assert ops.cast_rows(x, impl)[0].shape == ops.gated_halves(x.repeat(1, 2), "silu", impl).shape
    assert ops.rms_norm_e4m3(x, x, torch.ones(8), 1e-6, 0.0, impl)[2].shape == (0, 8)
    assert ops.gated_halves_backward(x, x.repeat(1, 2), "silu", impl).shape == (0, 16)
    ops.turn_(torch.zeros(0, 2, 8), x, x, False, impl)


def test_opcheck_and_the_direct_call_is_the_operator():
    x, dy, weight = torch.randn(4, 16), torch.randn(4, 8), torch.randn(16)
    heads, angles = torch.randn(4, 3, 8), (torch.randn(4, 8), torch.randn(4, 8))
    norm = ops.HeadNorm(torch.randn(8), torch.randn(8), *angles, 2, 1e-6, 0.0)
    for step, args in (
        (ops.cast_rows, (x,)),
        (ops.rms_norm_e4m3, (x, x, weight, 1e-6, 0.0)),
        (ops.gated_halves, (x, "silu")),
        (ops.gated_halves_backward, (dy, x, "silu")),
        (ops.gated_halves_e4m3, (x, "silu")),
        (ops.gated_halves_backward_e4m3, (dy, x, "silu")),
        (ops.turn_, (heads, *angles, False)),
        (ops.norm_turn, (heads, norm)),
        (ops.norm_turn_backward_, (heads, heads + 1, norm)),
    ):
        kept = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
        flat = step.arguments.flat
        torch.library.opcheck(step.op, flat((*args, "reference")))
        direct, through = step(*args, "reference"), step.op(*flat((*kept, "reference")))
        for a, b in zip(
            direct if isinstance(direct, tuple) else (direct,),
            through if isinstance(through, tuple) else (through,), strict=True,
        ):  # fmt: skip
            assert a is b is None or torch.equal(a.float(), b.float())


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_compiled_on_gpu():
    """bf16 beside what the interpreter can do, at the widths of a 7B model."""
    with torch.device("cuda"):
        for act in frozen_block.ACTIVATIONS:
            test_gated_halves(70, 11008, act, torch.bfloat16, "triton")
        test_turning_in_place_leaves_the_rest_of_the_row(70, 40, 128, torch.bfloat16, "triton")
        test_norms_of_heads_before_turning_both_ways(70, 24, 16, 128, torch.bfloat16, "triton")
        if torch.cuda.get_device_capability() >= (8, 9):
            for rows, width in ((70, 4096), (70, 11008)):
                test_casts_are_within_half_a_step_and_the_same_everywhere(
                    rows, width, torch.bfloat16, "triton", None
                )
            test_a_norm_in_e4m3(70, 4096, True, torch.bfloat16, "triton", None)
            test_gated_halves_in_e4m3(70, 11008, "silu", torch.bfloat16, "triton", None)


def compile_all(arch):
    """Reports of every kernel, at the widths of Llama-2-7B and of Llama-3-70B."""
    from codegen import compile_kernel
    from userip_fast.kernels import frozen_block as frozen_kernels
    from userip_fast.kernels import packed_block as k

    def types(fn, **special):
        of = {"scale_ptr": "*fp32", "r_ptr": "*fp32", "eps": "fp32", "offset": "fp32"} | special
        return {n: of.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in fn.arg_names}

    reports = []
    for fn in (k._halves_kernel, k._halves_backward_kernel):
        constants = {"GELU": True, "TILE": k._TILE}
        reports.append(compile_kernel(fn, types(fn), constants, arch, aligned=("F",)))
    for norm, backward in ((False, False), (True, False), (True, True)):
        constants = {"DIM": 128, "NORM": norm, "BACKWARD": backward}
        constants |= {"BLOCK_H": k._HEADS, "BLOCK_HALF": 64}
        fn = k._turn_kernel
        aligned = ("stride_x", "stride_y", "stride_kept")
        reports.append(compile_kernel(fn, types(fn), constants, arch, aligned=aligned))
    if arch < 89:  # no e4m3
        return reports
    for fn in (k._halves_e4m3_kernel, k._halves_backward_e4m3_kernel):
        y = {"y_ptr" if fn is k._halves_e4m3_kernel else "dx_ptr": "*fp8e4nv"}
        constants = {"GELU": True, "TILE": 2 * k._TILE}
        reports.append(
            compile_kernel(fn, types(fn, **y), constants, arch, num_warps=8, aligned=("F",))
        )
    for tile, held in ((8192, True), (4096, False)):
        fn, constants = k._cast_rows_kernel, {"TILE": tile, "HELD": held}
        aligned = ("D", "stride_x")
        signature, warps = types(fn, y_ptr="*fp8e4nv"), k._warps(tile)
        reports.append(
            compile_kernel(fn, signature, constants, arch, num_warps=warps, aligned=aligned)
        )
    for block in (8192,):
        fn = frozen_kernels._rms_norm_kernel
        constants = {"JOINED": True, "E4M3": True, "BLOCK_D": block}
        signature, warps = types(fn, y_ptr="*fp8e4nv"), k._warps(block)
        reports.append(
            compile_kernel(fn, signature, constants, arch, num_warps=warps, aligned=("D",))
        )
    return reports


def test_no_spills_and_no_atomics_anywhere():
    pytest.importorskip("triton")
    from codegen import SHARED_LIMIT, run_isolated

    found = run_isolated(Path(__file__), [[str(a)] for a in ARCHES])
    for arch, reports in zip(ARCHES, found, strict=True):
        assert len(reports) == (5 if arch < 89 else 10)
        for i, r in enumerate(reports):
            assert (r.stack, r.spills, r.counts["RED"], r.counts["ATOM"]) == (0, 0, 0, 0), (i, r)
            assert r.shared <= SHARED_LIMIT[arch]


if __name__ == "__main__":
    from codegen import print_reports

    print_reports(compile_all(int(sys.argv[1])))

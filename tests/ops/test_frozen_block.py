"""RMSNorm, gated activation and RoPE against float64, forward and backward."""

import sys
from pathlib import Path

import pytest
import torch

from userip_fast import ops
from userip_fast.core import _extension
from userip_fast.ops import frozen_block
from userip_fast.testing import assert_close_to_oracle, poisoned_memory

CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not())),
)
IMPLS = ["reference", CPU, "triton"]
# The C++ kernels are for float32; Triton's interpreter truncates to bfloat16 instead of rounding.
WAYS = [
    ("reference", torch.float32), ("reference", torch.bfloat16), ("reference", torch.float16),
    pytest.param("cpu", torch.float32, marks=CPU.marks),
    ("triton", torch.float32), ("triton", torch.float16),
]  # fmt: skip


def judged(run, inputs, impl):
    """Outputs and gradients of `run(*inputs, impl=impl)` against the reference in float64."""
    results = {}
    for name, dtype, how in (("got", None, impl), ("oracle", torch.float64, "reference"),
                             ("low", None, "reference")):  # fmt: skip
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        with poisoned_memory():
            outs = run(*leaves, impl=how)
            outs = outs if isinstance(outs, tuple) else (outs,)
            torch.manual_seed(7)
            grads = [torch.randn(o.shape).to(inputs[0].dtype).to(o.dtype) for o in outs]
            results[name] = [
                *(o.detach() for o in outs),
                *torch.autograd.grad(outs, leaves, grads),
            ]
    for i, (got, oracle, low) in enumerate(
        zip(results["got"], results["oracle"], results["low"], strict=True)
    ):
        assert_close_to_oracle(got, oracle, low, name=f"{i}")
    return results["got"]


@pytest.mark.parametrize(("impl", "dtype"), WAYS)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 7), (5, 8), (2, 130), (9, 64), (2, 1031)])
def test_rms_norm(rows, dim, joined, dtype, impl):
    weight = torch.randn(dim).to(dtype)
    inputs = [(torch.randn(1, rows, dim) * 3).to(dtype) for _ in range(1 + joined)]

    def run(x, residual=None, *, impl):
        y, total = ops.rms_norm(
            x, weight.to(x.dtype), residual=residual, eps=1e-3, offset=0.5, impl=impl
        )
        # Without a residual the sum is x itself, which is no output of the op.
        return (y, total) if joined else y

    first = judged(run, inputs, impl)
    for a, b in zip(first, judged(run, inputs, impl), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_with_only_one_result_used(impl):
    x, residual = (torch.randn(4, 24, requires_grad=True) for _ in range(2))
    weight = torch.randn(24)
    for used in (0, 1):
        grads = []
        for how in (impl, "reference"):
            out = ops.rms_norm(x, weight, residual=residual, impl=how)[used]
            grads.append(torch.autograd.grad(out.square().sum(), [x, residual]))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("impl", "dtype"), WAYS)
@pytest.mark.parametrize("act", frozen_block.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 1024), (5, 1031), (3, 1365)])
def test_gated(shape, act, dtype, impl):
    judged(
        lambda gate, up, impl: ops.gated(gate, up, act, impl=impl),
        [(torch.randn(shape) * 3).to(dtype) for _ in range(2)],
        impl,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", frozen_block.ACTIVATIONS)
def test_gated_far_out_and_at_zero(act, impl):
    gate = torch.tensor([-200.0, -90, -30, -1e-4, 0, 1e-4, 0.1, 30, 90, 200])
    first, second = judged(
        lambda gate, up, impl: ops.gated(gate, up, act, impl=impl),
        [gate, torch.ones_like(gate)],
        impl,
    )[:2]
    assert bool(torch.isfinite(first).all() and torch.isfinite(second).all())


@pytest.mark.parametrize(("impl", "dtype"), WAYS)
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 2), (3, 5, 6), (4, 9, 64), (2, 8, 80)])
def test_rotate_is_strided_and_exact(rows, heads, dim, dtype, impl):
    cosine, sine = (torch.randn(rows, dim).to(dtype) for _ in range(2))

    def run(x, impl):
        inside = x[:, 1:-1]  # rows of a larger buffer, as of a fused qkv
        return ops.rotate(inside, cosine.to(x.dtype), sine.to(x.dtype), impl=impl)

    judged(run, [torch.randn(rows, heads + 2, dim).to(dtype)], impl)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_on_gpu(dtype):
    with torch.device("cuda"):
        for joined in (False, True):
            test_rms_norm(300, 4096, joined, dtype, "triton")
            test_rms_norm(5, 1031, joined, dtype, "triton")
        for act in frozen_block.ACTIVATIONS:
            test_gated((70, 11008), act, dtype, "triton")
        test_rotate_is_strided_and_exact(300, 32, 128, dtype, "triton")
        test_rotate_is_strided_and_exact(4, 9, 80, dtype, "triton")


def test_rotate_back_undoes_a_turn():
    angle = torch.randn(7, 8)
    cosine, sine = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)
    x = torch.randn(7, 3, 16)
    there = frozen_block.rotate_reference(x, cosine, sine, False)
    torch.testing.assert_close(frozen_block.rotate_reference(there, cosine, sine, True), x)


def test_empty_and_refused():
    assert ops.rms_norm(torch.zeros(0, 8), torch.ones(8))[0].shape == (0, 8)
    assert ops.gated(torch.zeros(0, 8), torch.zeros(0, 8)).shape == (0, 8)
    assert ops.rotate(torch.zeros(0, 2, 8), *torch.zeros(2, 0, 8)).shape == (0, 2, 8)
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be torch.float32 \(8,\)"):
        ops.rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"rms_norm: weight is frozen"):
        ops.rms_norm(x, torch.ones(8, requires_grad=True))
    with pytest.raises(ValueError, match=r"gated: act must be one of .*, is 'relu'"):
        ops.gated(x, x, "relu")
    with pytest.raises(ValueError, match=r"rotate: x must be \[T, H, d\] with an even d"):
        ops.rotate(torch.zeros(2, 3, 7), x, x)


@pytest.mark.parametrize("impl", ["reference", CPU])
def test_opcheck(impl):
    x, residual, gate, up = (torch.randn(4, 16, requires_grad=True) for _ in range(4))
    weight, heads = torch.randn(16), torch.randn(4, 2, 8, requires_grad=True)
    angles = torch.randn(4, 8), torch.randn(4, 8)
    torch.library.opcheck(frozen_block.rms_norm_forward.op, (x, residual, weight, 1e-6, 0.0, impl))
    torch.library.opcheck(frozen_block.rms_norm_forward.op, (x, None, weight, 1e-6, 1.0, impl))
    for act in frozen_block.ACTIVATIONS:
        torch.library.opcheck(frozen_block.gated_step.op, (gate, up, act, impl))
    torch.library.opcheck(frozen_block.rotate_step.op, (heads, *angles, False, impl))


def compile_all(arch):
    """Reports of every kernel, at the widths of a 7B model."""
    from codegen import compile_kernel
    from userip_fast.kernels import frozen_block as kernels

    f = "*bf16"
    row, aligned = {"JOINED": True, "BLOCK_D": 8192}, ("D",)
    plain = row | {"E4M3": False, "scale_ptr": None}
    norm = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "total_ptr"), f)
    norm |= {"r_ptr": "*fp32", "D": "i32", "eps": "fp32", "offset": "fp32"}
    back = dict.fromkeys(("dy_ptr", "d_total_ptr", "x_ptr", "weight_ptr", "dx_ptr"), f)
    back |= {"r_ptr": "*fp32", "D": "i32", "offset": "fp32"}
    reports = [
        compile_kernel(kernel, signature, constants, arch, num_warps=16, aligned=aligned)
        for kernel, signature, constants in (
            (kernels._rms_norm_kernel, norm, plain),
            (kernels._rms_norm_backward_kernel, back, row),
        )
    ]
    gate = dict.fromkeys(("dy_ptr", "gate_ptr", "up_ptr", "d_gate_ptr", "d_up_ptr"), f)
    for flag in (False, True):
        constants = {"GELU": flag, "TILE": 1024}
        kernel = kernels._gated_backward_kernel
        reports.append(compile_kernel(kernel, {**gate, "n": "i32"}, constants, arch))
    return reports


def test_triton_kernels_do_not_spill():
    pytest.importorskip("triton")
    from codegen import run_isolated

    for reports in run_isolated(Path(__file__), [["80"], ["90"]]):
        assert len(reports) == 4
        for report in reports:
            assert report.stack == 0, report
            assert report.spills == 0, report
            assert report.counts["ATOM"] == report.counts["RED"] == 0, report


if __name__ == "__main__":
    from codegen import print_reports

    print_reports([r for arch in sys.argv[1:] for r in compile_all(int(arch))])

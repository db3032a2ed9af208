"""nf4_dequantize and nf4_linear: every implementation against the reference and a dense layer."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from userip_fast import ops
from userip_fast.ops import _nf4_cpu
from userip_fast.ops._dispatch import why_not_cpu
from userip_fast.ops.nf4_dequantize import nf4_dequantize_reference, run
from userip_fast.ops.nf4_format import BLOCKSIZES, NESTED_BLOCKSIZE, NF4_LEVELS, NF4Weight
from userip_fast.ops.nf4_linear import _forward, _input_gradient
from userip_fast.testing import assert_close_to_oracle, poisoned_memory

WHY_NOT = why_not_cpu(torch.empty(0), "nf4_linear")
CPU = pytest.param("cpu", marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)))
DEQUANTIZE = ["reference", CPU, "triton"]
LINEAR = ["reference", CPU, "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, K): one value; odd; rows of one block and one more; blocks across rows; several tiles.
SHAPES = [(1, 1), (5, 7), (3, 64), (9, 65), (31, 96), (129, 320)]


def make(shape, nested=True, blocksize=64, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(shape) * (0.1 + torch.rand(shape[0], 1)) / shape[1] ** 0.5
    return NF4Weight.quantize(weight, blocksize=blocksize, nested=nested)


def reference(weight, dtype):
    return nf4_dequantize_reference(*weight.stored(), dtype)


def interpreted_bf16(impl, dtype):
    """Triton's interpreter cuts fp32 to bf16 where a GPU rounds; the `gpu` test has those bits."""
    return impl == "triton" and dtype == torch.bfloat16


def expected(weight, dtype, impl):
    if interpreted_bf16(impl, dtype):
        kept = reference(weight, torch.float32).view(torch.int32) & ~0xFFFF
        return kept.view(torch.float32).to(torch.bfloat16)
    return reference(weight, dtype)


@pytest.mark.parametrize("impl", DEQUANTIZE)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_the_reference_in_every_bit(shape, dtype, nested, impl):
    weight = make(shape, nested)
    with poisoned_memory():
        got = ops.nf4_dequantize(weight, dtype=dtype, impl=impl)
    assert got.dtype == dtype
    assert torch.equal(got, expected(weight, dtype, impl))


@pytest.mark.parametrize("impl", DEQUANTIZE)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_every_blocksize(blocksize, impl):
    weight = make((67, 250), blocksize=blocksize)
    assert torch.equal(ops.nf4_dequantize(weight, impl=impl), reference(weight, torch.float32))


@pytest.mark.parametrize("impl", DEQUANTIZE)
def test_dequantize_extreme_scales(impl):
    """Zero, denormal and huge scales: they vanish, round or overflow alike."""
    absmax = torch.tensor([0.0, 1e-42, 3e-39, 1e-30, 6e4, 7e4, 1e30, 3.4e38])
    packed = torch.arange(256, dtype=torch.uint8)
    weight = NF4Weight(packed, absmax, (8, 64), 64)
    for dtype in DTYPES:
        if interpreted_bf16(impl, dtype):
            continue
        assert torch.equal(
            ops.nf4_dequantize(weight, dtype=dtype, impl=impl), reference(weight, dtype)
        )


def run_linear(weight, x, bias, grad, impl):
    x = x.clone().requires_grad_()
    with poisoned_memory():
        y = ops.nf4_linear(x, weight, bias, impl=impl)
        y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("impl", LINEAR)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_and_its_gradient_equal_the_dequantised_dense_layer(shape, dtype, bias, impl):
    weight = make(shape)
    dense = expected(weight, dtype, impl)
    b = torch.randn(shape[0]).to(dtype) if bias else None
    for rows in (1, 2, 3, 5, 8, 17, 70):
        x = torch.randn(rows, shape[1]).to(dtype)
        grad = torch.randn(rows, shape[0]).to(dtype)
        y, dx = run_linear(weight, x, b, grad, impl)
        low = F.linear(x, dense, b), grad @ dense
        x64, g64, w64 = x.double(), grad.double(), dense.double()
        oracle = F.linear(x64, w64, None if b is None else b.double()), g64 @ w64
        assert_close_to_oracle(y, oracle[0], low[0], name=f"y, {rows} rows")
        assert_close_to_oracle(dx, oracle[1], low[1], name=f"dx, {rows} rows")


@pytest.mark.parametrize("scratch", [4, 4 * 3 * 96, 4 * 96 * 31])
def test_blocks_of_the_weight_in_scratch_cover_it(scratch, monkeypatch):
    """From one row of the weight at a time to the whole weight in one block."""
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    monkeypatch.setattr(_nf4_cpu, "_SCRATCH_BYTES", scratch)
    monkeypatch.setattr(_nf4_cpu, "FUSED_ROWS", 0)
    weight = make((31, 96))
    x, bias, grad = torch.randn(9, 96), torch.randn(31), torch.randn(9, 31)
    y, dx = run_linear(weight, x, bias, grad, "cpu")
    dense = reference(weight, torch.float32)
    torch.testing.assert_close(y, F.linear(x, dense, bias))
    torch.testing.assert_close(dx, grad @ dense)


@pytest.mark.parametrize("impl", LINEAR)
def test_linear_takes_any_leading_shape_and_strides(impl):
    weight = make((20, 48))
    for x in (
        torch.randn(2, 3, 48),
        torch.randn(48),
        torch.randn(0, 48),
        torch.randn(48, 5).T,
        torch.randn(4, 100)[:, 7:55],
    ):
        y = ops.nf4_linear(x, weight, impl=impl)
        assert y.shape == (*x.shape[:-1], 20)
        torch.testing.assert_close(y, F.linear(x, reference(weight, x.dtype)))
    # A gradient that arrives expanded (stride 0), as from `y.sum()`.
    x = torch.randn(3, 48, requires_grad=True)
    ops.nf4_linear(x, weight, impl=impl).sum().backward()
    torch.testing.assert_close(x.grad, reference(weight, x.dtype).sum(0).expand(3, 48))


@pytest.mark.parametrize("impl", LINEAR)
def test_a_row_does_not_depend_on_who_else_is_in_the_batch_and_repeats(impl):
    weight = make((40, 128))
    x, grad = torch.randn(6, 128), torch.randn(6, 40)
    first, again = (run_linear(weight, x, None, grad, impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    y, dx = run_linear(weight, x[order], None, grad[order], impl)
    # Not bit for bit: where a BLAS cuts rows between threads decides the order of its sums.
    torch.testing.assert_close(y, first[0][order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, first[1][order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", LINEAR)
def test_linear_saves_nothing_but_the_stored_weight(impl):
    """No input, no dequantised weight and no weight gradient is kept between the passes."""
    weight = make((64, 128))
    own = {t.data_ptr() for t in weight.tensors() if t is not None}
    saved = []
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.nf4_linear(x, weight, torch.randn(64), impl=impl).sum().backward()
    assert {t.data_ptr() for t in saved} == own


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("impl", LINEAR)
def test_opcheck(impl, nested):
    weight = make((10, 64), nested)
    stored = weight.stored()
    x, grad = torch.randn(3, 64, requires_grad=True), torch.randn(3, 10)
    torch.library.opcheck(_forward.op, (x, *stored, torch.randn(10), impl))
    torch.library.opcheck(_input_gradient.op, (grad, *stored, impl))
    for dtype in DTYPES:
        torch.library.opcheck(run.op, (*stored, dtype, impl))


GPU_SHAPES = [((1, 1), 64), ((5, 7), 32), ((129, 321), 64), ((1000, 4096), 4096)]


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_has_the_bits_of_the_cpu(dtype, nested, impl):
    for shape, blocksize in GPU_SHAPES:
        weight = make(shape, nested, blocksize)
        got = ops.nf4_dequantize(weight.to("cuda"), dtype=dtype, impl=impl)
        assert torch.equal(got.cpu(), reference(weight, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_linear_equals_fp64(dtype, impl):
    for shape, blocksize in GPU_SHAPES:
        weight = make(shape, True, blocksize)
        x, grad = torch.randn(9, shape[1]).to(dtype), torch.randn(9, shape[0]).to(dtype)
        dense, bias = reference(weight, dtype), torch.randn(shape[0]).to(dtype)
        leaf = x.cuda().requires_grad_()
        y = ops.nf4_linear(leaf, weight.to("cuda"), bias.cuda(), impl=impl)
        y.backward(grad.cuda())
        x64, g64, w64 = x.double(), grad.double(), dense.double()
        low = (
            F.linear(x.cuda(), dense.cuda(), bias.cuda()).cpu(),
            (grad.cuda() @ dense.cuda()).cpu(),
        )
        assert_close_to_oracle(y.cpu(), F.linear(x64, w64, bias.double()), low[0], name="y")
        assert_close_to_oracle(leaf.grad.cpu(), g64 @ w64, low[1], name="dx")


def test_bad_arguments_are_named():
    weight = make((10, 64))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\]"):
        ops.nf4_linear(torch.randn(3, 63), weight)
    with pytest.raises(ValueError, match="float64"):
        ops.nf4_linear(torch.randn(3, 64).double(), weight)
    with pytest.raises(ValueError, match=r"bias must be \[10\]"):
        ops.nf4_linear(torch.randn(3, 64), weight, torch.randn(9))
    with pytest.raises(ValueError, match="requires_grad=True"):
        ops.nf4_linear(torch.randn(3, 64), weight, torch.randn(10, requires_grad=True))
    with pytest.raises(ValueError, match="dtype must be one of"):
        ops.nf4_dequantize(weight, dtype=torch.float64)
    with pytest.raises(ValueError, match="impl='nope'"):
        ops.nf4_linear(torch.randn(3, 64), weight, impl="nope")


def test_the_header_of_cpp_and_cuda_says_the_same():
    """csrc/nf4_format.h is where both have it from, and nowhere else."""
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    header = (csrc / "nf4_format.h").read_text(encoding="utf-8")
    levels = header.partition("kLevels[16] = {")[2].partition("}")[0]
    assert tuple(float(x.rstrip("f")) for x in levels.replace(",", " ").split()) == NF4_LEVELS
    numbers = {name: int(n) for name, n in re.findall(r"(k\w+) = (\d+);", header)}
    assert numbers == {"kMinBlock": min(BLOCKSIZES), "kNestedShift": 8}
    assert 1 << numbers["kNestedShift"] == NESTED_BLOCKSIZE
    assert all(b & (b - 1) == 0 for b in BLOCKSIZES)  # which it asks of a weight
    others = [p for p in csrc.rglob("*.*") if p.name != "nf4_format.h"]
    assert not [p for p in others if "0.6961928" in p.read_text(encoding="utf-8")]
    dequantize = {p.name for p in others if "nf4_format.h" in p.read_text(encoding="utf-8")}
    assert dequantize == {"nf4.cpp", "nf4.h"}

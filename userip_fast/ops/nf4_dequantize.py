"""NF4 weights back to floating point, bit for bit as bitsandbytes does it.

    W[i] = round_to_dtype(NF4_LEVELS[code[i]] * absmax[i // blocksize])       product in fp32
    absmax[b] = nested_map[absmax_u8[b]] * nested_absmax[b // 256] + offset   (double quantisation)

The format is described in `userip_fast.ops.nf4_format`. Weights are frozen: no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from userip_fast.core import _extension
from userip_fast.ops import _triton
from userip_fast.ops._dispatch import ELEMENT_TYPES, WhyNot, by_device, resolve, why_not_cpu
from userip_fast.ops._operator import flat, operator
from userip_fast.ops.nf4_format import DTYPES, NESTED_BLOCKSIZE, NF4_LEVELS, NF4Weight, Stored


def reference(weight: Stored, dtype: torch.dtype) -> Tensor:
    """The oracle: [rows, cols] in `dtype`."""
    levels = torch.tensor(NF4_LEVELS, device=weight.packed.device)
    n = weight.rows * weight.cols
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).view(-1)[:n]
    scales = weight.absmax
    if weight.nested_absmax is not None:
        assert weight.nested_map is not None
        assert weight.offset is not None
        groups = weight.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: scales.shape[0]]
        scales = weight.nested_map[scales.long()] * groups + weight.offset
    out = levels[codes.int()].mul_(scales.repeat_interleave(weight.blocksize)[:n])
    return out.view(weight.rows, weight.cols).to(dtype)


nf4_dequantize_reference = flat(reference)


def run_into(impl: str, weight: Stored, out: Tensor) -> None:
    """Writes the weight to `out` [rows, cols], by the implementation named."""
    if impl == "cpu":
        from userip_fast.ops import _nf4_cpu

        _nf4_cpu.dequantize(weight, out)
    elif impl == "cuda":
        _by_cuda(weight, out)
    elif impl == "triton":
        from userip_fast.kernels import nf4

        nf4.dequantize(weight, out)
    else:
        out.copy_(reference(weight, out.dtype))


def _by_cuda(weight: Stored, out: Tensor) -> None:
    """csrc/cuda/nf4.cu: one launch on the current stream."""
    kept = [None if t is None else t.contiguous() for t in weight.tensors]
    if weight.packed.data_ptr() % 4:  # a view into a file's bytes may start anywhere
        kept[0] = weight.packed.clone()
    module = _extension.load()
    assert module is not None
    module.nf4_dequantize_cuda(
        [0 if t is None else t.data_ptr() for t in kept],
        weight.sizes,
        out.data_ptr(),
        ELEMENT_TYPES[out.dtype],
        out.device.index,
        torch.cuda.current_stream(out.device).cuda_stream,
    )


def _fake(weight: Stored, dtype: torch.dtype, impl: str) -> Tensor:
    return weight.packed.new_empty(weight.rows, weight.cols, dtype=dtype)


@operator("nf4_dequantize", reference, fake=_fake)
def run(weight: Stored, dtype: torch.dtype, impl: str) -> Tensor:
    """[rows, cols] in `dtype`; for `nf4_linear` too."""
    out = _fake(weight, dtype, impl)
    run_into(impl, weight, out)
    return out


def candidates(packed: Tensor) -> dict[str, WhyNot]:
    """Implementations for a weight on `packed`'s device, best first; `nf4_linear` has the same."""

    def cuda() -> str | None:
        if packed.device.type != "cuda":
            return "a tensor is not on a CUDA device"
        if not hasattr(_extension.load(), "nf4_dequantize_cuda"):
            return _extension.why_not() or "userip_fast._C was built without its CUDA half"
        return None

    return by_device(
        packed,
        cpu=lambda: why_not_cpu(packed, "nf4_linear"),
        cuda=cuda,
        triton=lambda: _triton.why_not(packed),
    )


def nf4_dequantize(
    weight: NF4Weight, *, dtype: torch.dtype | None = None, impl: str = "auto"
) -> Tensor:
    """Dequantises a whole weight.

    Args:
        weight: The NF4 weight, on CPU or CUDA.
        dtype: float32, bfloat16 or float16; None for the dtype the weight had.
        impl: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        [N, K] in `dtype`; equal to `bitsandbytes.functional.dequantize_4bit` in every bit.

    Raises:
        ValueError: `dtype` is not one of the three.
    """
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"nf4_dequantize: dtype must be one of {DTYPES}, got {dtype}")
    chosen = resolve("nf4_dequantize", impl, candidates(weight.packed))
    out: Tensor = run(weight.stored(), dtype, chosen)
    return out


def nf4_dequantize_into(weight: NF4Weight, out: Tensor, *, impl: str = "auto") -> None:
    """As `nf4_dequantize`, into memory of the caller; for weights that are streamed.

    Args:
        weight: The NF4 weight.
        out: [N, K] contiguous, float32, bfloat16 or float16, on the weight's device.
        impl: As for `nf4_dequantize`.

    Raises:
        ValueError: `out` is not such a tensor.
    """
    if (
        tuple(out.shape) != weight.shape
        or out.dtype not in DTYPES
        or out.device != weight.packed.device
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"nf4_dequantize_into: out must be contiguous {weight.shape}, one of {DTYPES}, on "
            f"{weight.packed.device}; got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    run_into(resolve("nf4_dequantize", impl, candidates(weight.packed)), weight.stored(), out)

"""NF4 weights back to floating point, bit for bit as bitsandbytes does it.

    W[i] = round_to_dtype(NF4_LEVELS[code[i]] * absmax[i // blocksize])       product in fp32
    absmax[b] = nested_map[absmax_u8[b]] * nested_absmax[b // 256] + offset   (double quantisation)

The format is described in `userip_fast.ops.nf4_format`. Weights are frozen: no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from userip_fast.ops import _triton
from userip_fast.ops._dispatch import WhyNot, resolve
from userip_fast.ops.nf4_format import DTYPES, NESTED_BLOCKSIZE, NF4_LEVELS, NF4Weight


def block_scales(
    absmax: Tensor, nested_absmax: Tensor | None, nested_map: Tensor | None, offset: Tensor | None
) -> Tensor:
    """[blocks] fp32 scales, with double quantisation undone."""
    if nested_absmax is None:
        return absmax
    assert nested_map is not None
    assert offset is not None
    groups = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.shape[0]]
    return nested_map[absmax.long()] * groups + offset


def nf4_dequantize_reference(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    rows: int,
    cols: int,
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The oracle: [rows, cols] in `dtype`."""
    levels = torch.tensor(NF4_LEVELS, device=packed.device)
    n = rows * cols
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    scales = block_scales(absmax, nested_absmax, nested_map, offset)
    out = levels[codes.int()].mul_(scales.repeat_interleave(blocksize)[:n])
    return out.view(rows, cols).to(dtype)


def run(
    impl: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """[rows, cols] in `dtype` by the implementation named; for `nf4_linear` too.

    Args:
        impl: A name from `candidates`.
        tensors: `NF4Weight.tensors()`.
        sizes: (rows, cols, blocksize).
        dtype: Of the result.
    """
    packed, absmax, nested_absmax, nested_map, offset = tensors
    assert packed is not None
    assert absmax is not None
    if impl == "reference":
        return nf4_dequantize_reference(
            packed, absmax, nested_absmax, nested_map, offset, *sizes, dtype
        )
    out = torch.empty(sizes[:2], dtype=dtype, device=packed.device)
    run_into(impl, tensors, sizes, out)
    return out


def run_into(
    impl: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, int, int], out: Tensor
) -> None:
    """`run`, written to `out` [rows, cols]."""
    if impl == "cpu":
        from userip_fast.ops import _nf4_cpu

        _nf4_cpu.dequantize(tensors, sizes, out)
    elif impl == "cuda":
        from userip_fast.ops import _nf4_cuda

        _nf4_cuda.dequantize(tensors, sizes, out)
    elif impl == "triton":
        from userip_fast.kernels import nf4

        nf4.dequantize(tensors, sizes, out)
    else:
        out.copy_(run(impl, tensors, sizes, out.dtype))


@torch.library.custom_op("userip_fast::nf4_dequantize", mutates_args=())
def _nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    rows: int,
    cols: int,
    blocksize: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    tensors = (packed, absmax, nested_absmax, nested_map, offset)
    return run(impl, tensors, (rows, cols, blocksize), dtype)


@_nf4_dequantize.register_fake
def _(packed, absmax, nested_absmax, nested_map, offset, rows, cols, blocksize, dtype, impl):  # type: ignore[no-untyped-def]
    return packed.new_empty(rows, cols, dtype=dtype)


def candidates(packed: Tensor) -> dict[str, WhyNot]:
    """Implementations for a weight on `packed`'s device, best first; `nf4_linear` has the same."""

    def cpu() -> str | None:
        from userip_fast.ops import _nf4_cpu

        return _nf4_cpu.why_not(packed)

    def cuda() -> str | None:
        from userip_fast.ops import _nf4_cuda

        return _nf4_cuda.why_not(packed)

    def triton() -> str | None:
        return _triton.why_not(packed)

    if packed.device.type == "cpu":
        return {"cpu": cpu, "reference": lambda: None, "triton": triton, "cuda": cuda}
    return {"cuda": cuda, "triton": triton, "reference": lambda: None, "cpu": cpu}


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
    sizes = (*weight.shape, weight.blocksize)
    if type(weight.packed) is Tensor and not torch.compiler.is_compiling():
        # No gradient to record: straight to the kernel saves 50 us, a sixth of a 1024 x 1024 call.
        return run(chosen, weight.tensors(), sizes, dtype)
    return _nf4_dequantize(*weight.tensors(), *sizes, dtype, chosen)


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
    chosen = resolve("nf4_dequantize", impl, candidates(weight.packed))
    run_into(chosen, weight.tensors(), (*weight.shape, weight.blocksize), out)

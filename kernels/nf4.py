"""Triton kernel of `userip_fast.ops.nf4_dequantize`; `userip_fast.ops.nf4_format` is the format.

packed [ceil(n / 2)] uint8, absmax [blocks] fp32 or uint8, out [n] fp32, bf16 or fp16. A program
takes TILE_BLOCKS quantisation blocks: a scale is read once per block, with the double quantisation
undone here rather than in a launch of its own, and products are in fp32. The launch turns off FMA
fusion: the nested scale is a product and a sum with a rounding each, as in the reference, so the
bits agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from userip_fast.ops.nf4_format import NESTED_BLOCKSIZE, NF4_LEVELS, Stored

_TILE = 4096  # values per program


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, levels_ptr, out_ptr,
    n, num_blocks, BLOCKSIZE: tl.constexpr, TILE_BLOCKS: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    inside = block < num_blocks
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        scale = tl.load(nested_map_ptr + code) * nested + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    codes = tl.load(packed_ptr + byte, mask=2 * byte < n, other=0)
    even = tl.load(levels_ptr + (codes >> 4).to(tl.int32)) * scale[:, None]
    odd = tl.load(levels_ptr + (codes & 15).to(tl.int32)) * scale[:, None]
    values = tl.reshape(tl.join(even, odd), [TILE_BLOCKS, BLOCKSIZE])
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=at < n)


def dequantize(weight: Stored, out: Tensor) -> None:
    """Writes the weight to `out` [rows, cols], in one launch."""
    tensors = (None if t is None else t.contiguous() for t in weight.tensors)
    tile_blocks, blocks = max(1, _TILE // weight.blocksize), weight.absmax.shape[0]
    _nf4_dequantize_kernel[(triton.cdiv(blocks, tile_blocks),)](
        *tensors, _levels(out.device), out, out.numel(), blocks,
        BLOCKSIZE=weight.blocksize, TILE_BLOCKS=tile_blocks,
        NESTED=weight.nested_absmax is not None, NESTED_BLOCKSIZE=NESTED_BLOCKSIZE,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


_LEVELS: dict[torch.device, Tensor] = {}


def _levels(device: torch.device) -> Tensor:
    """The level table on `device`, copied there once."""
    if device not in _LEVELS:
        _LEVELS[device] = torch.tensor(NF4_LEVELS, device=device)
    return _LEVELS[device]

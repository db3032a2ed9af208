"""bf16 products for work that needs no gradient, on processors that have instructions for them.

    y = bf16(x) bf16(W)^T + bias      sums and result in fp32, through torch (oneDNN)

A second copy of each linear's weight in the layers is kept in bf16, and multiplied with where no
gradient is asked for: reading an event table, inference. Everything else, and whatever has a
gradient, stays in fp32. `lm.dtype=auto` tries it on an LM that is large enough for the trial to be
worth it, and keeps it where it is faster here and the LM says the same; `float32` never does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from userip_fast.lm.layers import layer_of

ATTRIBUTE = "userip_bf16"  # of a fused linear: its weight in bf16, see `fuse.py`


def has_instructions() -> bool:
    """Whether this processor multiplies bf16 (AVX512_BF16 or AMX); emulated it would be slower."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def fused_linears(model: nn.Module) -> list[Any]:
    """The fused fp32 linears of the model's layers."""
    return [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and layer_of(name) != name
        and module.weight.dtype == torch.float32
        and "forward" in module.__dict__
    ]


def set_bf16(model: nn.Module, on: bool) -> None:
    """Makes the bf16 copies, or drops them."""
    for module in fused_linears(model):
        half = module.weight.detach().bfloat16() if on else None
        setattr(module, ATTRIBUTE, half)

"""bf16 products for work that needs no gradient, on processors that have instructions for them.

    y = bf16(x) bf16(W)^T + bias      sums and result in fp32, through torch (oneDNN)

A second copy of each linear's weight in the layers is kept in bf16, and multiplied with where no
gradient is asked for: reading an event table, inference. Everything else, and whatever has a
gradient, stays in fp32. `lm.dtype=auto` tries it on an LM that is large enough for the trial to be
worth it, and keeps it where it is faster here and the LM says the same; `float32` never does.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from userip_fast.packing import make_pack

if TYPE_CHECKING:
    from userip_fast.lm.frozen import FrozenLM

logger = logging.getLogger("userip_fast.lm")

ATTRIBUTE = "userip_bf16"  # of a fused linear: its weight in bf16, see `fuse.py`

MAX_NLL_SHIFT, MIN_SAME_CODES, MAX_TIME = 0.01, 0.95, 0.9
_WORTH = 1 << 24  # weights from which on the trial, some 1,500 rows, is a small part of a run
_USERS, _TOKENS, _CODES = 20, 12, 4


@dataclass(frozen=True)
class BF16Report:
    """How far bf16 products move what is read without a gradient, and what they gain.

    Attributes:
        nll_shift: Mean over users and codes of |NLL - NLL'| / NLL.
        same_codes: Share of users whom the same of the codes tells best.
        time: Processor time over that of fp32.
    """

    nll_shift: float
    same_codes: float
    time: float

    @property
    def passed(self) -> bool:
        return (
            self.nll_shift <= MAX_NLL_SHIFT
            and self.same_codes >= MIN_SAME_CODES
            and self.time <= MAX_TIME
        )

    def __str__(self) -> str:
        return (
            f"NLL shift {self.nll_shift:.2%} (at most {MAX_NLL_SHIFT:.0%}), unchanged codes "
            f"{self.same_codes:.0%} (at least {MIN_SAME_CODES:.0%}), {self.time:.2f} of the time "
            f"(at most {MAX_TIME})"
        )


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
    from userip_fast.lm.residency import layer_of

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


def try_out(lm: FrozenLM) -> BF16Report | None:
    """Sets bf16 products where they pass, and says what was found; None where nothing was tried."""
    linears = fused_linears(lm.model)
    weights = sum(module.weight.numel() for module in linears)
    if lm.device.type != "cpu" or weights < _WORTH or not has_instructions():
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ:  # processes that time each by itself might disagree
        return None
    exact, usual = _read(lm)
    set_bf16(lm.model, True)
    rounded, halved = _read(lm)
    report = BF16Report(
        float(((exact - rounded).abs() / exact).mean()),
        float((exact.argmin(1) == rounded.argmin(1)).double().mean()),
        halved / usual,
    )
    if not report.passed:
        set_bf16(lm.model, False)
    kept = "bf16 products without gradients" if report.passed else "fp32 products"
    logger.info("LM %s: %s; in bf16 %s", lm.source, kept, report)
    return report


@torch.no_grad()
def _read(lm: FrozenLM) -> tuple[Tensor, float]:
    """NLL [U, Z] of users of random tokens under each of Z soft rows, and the processor time.

    A soft row is the mean embedding of one of Z vocabularies, of which every user has one.
    """
    from userip_fast.lm.engine import PackedEngine
    from userip_fast.lm.gates import sample_layout, sample_users

    layout = sample_layout(lm, _CODES)
    random = np.random.default_rng(0)
    words = random.integers(len(lm.tokenizer), size=(_CODES, 6))
    drawn = random.integers(6, size=(_USERS, _TOKENS))
    ids = words[np.arange(_USERS)[:, None] % _CODES, drawn].astype(np.int32)
    behaviour = sample_users(np.repeat(ids, _CODES, 0), layout)  # under every code
    soft = lm.embed(torch.from_numpy(words)).float().mean(1)  # [Z, D]
    rows = soft.repeat(_USERS, 1).unsqueeze(1)
    engine = PackedEngine(lm, layout)
    pack = make_pack(behaviour, np.arange(behaviour.num_users), layout, lm.device)
    begin = time.process_time()
    nll = engine.nll(pack, rows).view(_USERS, _CODES)
    return nll, time.process_time() - begin

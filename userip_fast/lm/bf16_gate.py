"""The trial of bf16 products without gradients: kept where they are faster and say the same."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from userip_fast.lm.bf16 import fused_linears, has_instructions, set_bf16
from userip_fast.lm.engine import PackedEngine
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.gates import sample_layout, sample_users
from userip_fast.prompts.packing import make_pack

logger = logging.getLogger("userip_fast.lm")

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

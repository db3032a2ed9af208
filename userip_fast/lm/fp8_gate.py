"""The gate that FP8 products have to pass, and the trial of them where nobody asked.

`lm.residency=fp8` is refused where the LM reads users otherwise than the unrounded weights do;
`auto` takes FP8 only where, beside that, a step was faster in it on this device.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from userip_fast._version import __version__
from userip_fast.core import measured
from userip_fast.core.errors import UnsupportedError
from userip_fast.lm.engine import PackedEngine
from userip_fast.lm.fp8 import convert_linears, wanted, why_not
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.gates import sample_layout, sample_users, step_seconds
from userip_fast.lm.limits import free_bytes, size_text
from userip_fast.lm.residency import settle
from userip_fast.lm.trace import Workload
from userip_fast.ops import assign_codes
from userip_fast.prompts.packing import make_pack

logger = logging.getLogger("userip_fast.lm")

MIN_COSINE, MAX_NLL_SHIFT, MIN_SAME_CODES, MAX_TIME = 0.99, 0.01, 0.95, 0.9
_USERS, _TOKENS, _CODES = 48, 48, 8


@dataclass(frozen=True)
class Reading:
    """What an LM makes of the sample users: NLL per token [U], and the gradient [U, S D] of it."""

    nll: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class GateReport:
    """How far FP8 moves what the engine reads off an LM.

    Attributes:
        nll_shift: Mean over users of |NLL - NLL'| / NLL.
        cosine: Mean cosine of the theta gradients; lowest_cosine of any user.
        same_codes: Share of users with the same nearest codeword after a step along the gradient.
        time: Of a step, over that with unrounded weights; None where FP8 was asked for.
    """

    nll_shift: float
    cosine: float
    lowest_cosine: float
    same_codes: float
    time: float | None = None

    @property
    def passed(self) -> bool:
        return (
            self.nll_shift <= MAX_NLL_SHIFT
            and self.cosine >= MIN_COSINE
            and self.same_codes >= MIN_SAME_CODES
            and (self.time is None or self.time <= MAX_TIME)
        )

    def __str__(self) -> str:
        return (
            f"NLL shift {self.nll_shift:.2%} (at most {MAX_NLL_SHIFT:.0%}), theta-gradient "
            f"cosine {self.cosine:.4f} (at least {MIN_COSINE}; lowest of a user "
            f"{self.lowest_cosine:.4f}), "
            f"unchanged codes {self.same_codes:.0%} (at least {MIN_SAME_CODES:.0%})"
            + ("" if self.time is None else f", {self.time:.2f} of the time (at most {MAX_TIME})")
        )


def read_sample(lm: FrozenLM, seed: int = 0) -> Reading:
    """Reads users of random tokens, all starting at the mean embedding of theirs."""
    layout = sample_layout(lm, _CODES)
    random = np.random.default_rng(seed)
    # Every user has a small vocabulary of its own, so that there is something to tell them apart.
    own = random.integers(len(lm.tokenizer), size=(_USERS, 6))
    ids = np.take_along_axis(own, random.integers(6, size=(_USERS, _TOKENS)), 1).astype(np.int32)
    behaviour = sample_users(ids, layout)
    start = lm.embed(torch.from_numpy(ids.astype(np.int64)).to(lm.device)).float().mean((0, 1))
    theta = start.expand(_USERS, 1, -1).clone().requires_grad_()
    pack = make_pack(behaviour, np.arange(_USERS), layout, lm.device)
    nll = PackedEngine(lm, layout).nll(pack, theta)
    (gradient,) = torch.autograd.grad(nll.sum(), theta)
    return Reading(nll.detach() / (_TOKENS - 1), gradient.flatten(1).float())


def compare(exact: Reading, rounded: Reading) -> GateReport:
    """The gate's figures; codewords are the exact steps of the first users."""
    cosine = torch.cosine_similarity(exact.gradient, rounded.gradient)
    steps = [nn.functional.normalize(r.gradient) for r in (exact, rounded)]
    codes = [assign_codes(s.contiguous(), steps[0][:_CODES].contiguous())[0] for s in steps]
    return GateReport(
        float(((exact.nll - rounded.nll).abs() / exact.nll).mean()),
        float(cosine.mean()),
        float(cosine.min()),
        float((codes[0] == codes[1]).double().mean()),
    )


def settle_gated(lm: FrozenLM) -> GateReport:
    """Brings a loaded LM into FP8, and compares what it reads before and after.

    Raises:
        UnsupportedError: The gate is not passed; the LM is then left in FP8 and should be dropped.
    """
    settle(lm.model, "resident", lm.dtype)
    exact = read_sample(lm)
    settle(lm.model, "fp8", lm.dtype)
    report = compare(exact, read_sample(lm))
    logger.info("LM %s in FP8 against unrounded weights: %s", lm.source, report)
    if not report.passed:
        raise UnsupportedError(
            f"lm.residency=fp8 changes what this LM says too much: {report}; set "
            "lm.residency=resident or streamed"
        )
    return report


def try_out(lm: FrozenLM, work: Workload) -> GateReport | None:
    """Brings an LM with resident weights into FP8 where that passes; None where it was not tried.

    How long a step takes is measured once for each device, versions and weights' shapes, and kept
    (`userip_fast.core.measured`); where FP8 was no faster it is not tried again.

    Args:
        lm: After `fuse`, so that steps run as they will.
        work: The steps that are timed.
    """
    if (why := _why_not_unasked(lm, work)) is not None:
        logger.debug("LM %s: FP8 is not tried: %s", lm.source, why)
        return None
    key = _form(lm, work)
    known = measured.kept("fp8_times", key)
    if known is not None and known > MAX_TIME:
        logger.info("LM %s: no FP8, a step took %.2f of the time in it here", lm.source, known)
        return None
    dense = {n: m for n, m in lm.model.named_modules() if wanted(n, m)}
    exact, usual = read_sample(lm), 0.0 if known else step_seconds(lm, work)
    convert_linears(lm.model)
    rounded = read_sample(lm)
    taken = known or step_seconds(lm, work) / usual
    measured.keep("fp8_times", key, taken)
    report = replace(compare(exact, rounded), time=taken)
    if not report.passed:
        for name, module in dense.items():
            lm.model.set_submodule(name, module)
    kept = "FP8 products" if report.passed else "no FP8"
    logger.info("LM %s: %s; in FP8 %s", lm.source, kept, report)
    return report


def _why_not_unasked(lm: FrozenLM, work: Workload) -> str | None:
    if lm.device.type != "cuda" or lm.dtype != torch.bfloat16:
        return f"it is for bfloat16 on a GPU, this is {lm.dtype} on {lm.device.type}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "processes that time each by itself might disagree"
    if (error := why_not(lm.model)) is not None:
        return str(error)
    # Both forms lie there for the trial, and a step.
    size = sum(m.weight.nbytes for n, m in lm.model.named_modules() if wanted(n, m))
    assert lm.architecture is not None
    recompute = lm.plan is not None and lm.plan.recompute
    size += lm.architecture.step(recompute, work)
    free = free_bytes(lm.device)
    return None if size <= free else f"it would take {size_text(size)}, {size_text(free)} are free"


def _form(lm: FrozenLM, work: Workload) -> str:
    """Device, versions and all that the time of a step depends on."""
    shapes = Counter(
        "x".join(map(str, m.weight.shape)) for n, m in lm.model.named_modules() if wanted(n, m)
    )
    linears = ", ".join(f"{count} of {shape}" for shape, count in sorted(shapes.items()))
    device = torch.cuda.get_device_name(lm.device)
    versions = f"userip_fast {__version__}, torch {torch.__version__}"
    return f"{device}; {versions}; {work.pack_tokens} rows; {linears}"

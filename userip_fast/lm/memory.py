"""What a memory budget decides: residency of the weights, recomputation, and rows of a pack.

Streaming costs about 230 / T of a step of T rows, recomputation a third pass through the LM, so
they are taken in that order, and only when the step does not fit otherwise (docs/memory.md).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from userip_fast.core.errors import ConfigError, OutOfMemoryError
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.limits import free_bytes, size_text
from userip_fast.lm.trace import MIN_PACK, Architecture, Estimate, Workload

logger = logging.getLogger("userip_fast.lm")

_QUICK_ROWS = 1024  # a pack of so many rows is as fast as a larger one on a CPU
_CPU_SHARE = 0.45
"""Of a CPU's free memory, what is planned for. Processes that fitted SmolLM2-135M had 12.4 and 5.5
GiB where 6.0 and 3.3 were predicted: beside tensors there are the log, libraries and, it seems, the
allocator's gaps between packs of many shapes. Smaller packs are as fast."""


@dataclass(frozen=True)
class Plan:
    """How an LM is kept and run, and why."""

    residency: str
    recompute: bool
    pack_tokens: int
    estimate: Estimate
    reason: str

    def __str__(self) -> str:
        recompute = "with recomputation" if self.recompute else "no recomputation"
        return (
            f"lm.residency={self.residency}, {recompute}, packs of at most {self.pack_tokens} "
            f"rows: {self.reason}"
        )


def choose(
    architecture: Architecture,
    budget: int,
    work: Workload,
    *,
    residency: str = "auto",
    recompute: str = "auto",
) -> Plan:
    """The fastest way that fits.

    On a GPU: all in place, then streamed, then with recomputation; a pack is made smaller, by
    halves, only when none of these fits. On a CPU packs are made smaller first, down to 1024 rows:
    they are as fast, and cost neither decoding nor a third pass.

    Args:
        architecture: The LM.
        budget: Bytes that weights and step may take together.
        work: What is wanted.
        residency: "auto", or a mode to keep to. "auto" plans no "fp8", which is lossy and
            as large as "resident"; a load may try it in its place (`userip_fast.lm.fp8`).
        recompute: "auto", "on" or "off".

    Raises:
        ConfigError: Nothing fits, even with packs of one user; the text says what would.
    """
    modes = [residency]
    if residency == "auto":
        modes = ["resident", "streamed"] if architecture.four_bit else ["resident"]
    recomputes = {"auto": [False, True], "on": [True], "off": [False]}[recompute]
    smallest = min(work.pack_tokens, max(MIN_PACK, work.user_tokens))
    sizes = [work.pack_tokens]
    while sizes[-1] > smallest:
        sizes.append(max(smallest, sizes[-1] // 2))
    ways = [(n, again, mode) for n in sizes for again in recomputes for mode in modes]
    if architecture.device_type == "cpu":
        quick = [n for n in sizes if n >= min(_QUICK_ROWS, work.pack_tokens)]
        ways = [(n, a, m) for a in recomputes for m in modes for n in quick] + ways
    passed: list[str] = []
    for tokens, again, mode in dict.fromkeys(ways):
        now = work.of_size(tokens)
        found = architecture.estimate(mode, again, now)
        if found.total <= budget:
            reason = f"{size_text(found.total)} predicted of {size_text(budget)}"
            if passed:
                reason += "; too large: " + ", ".join(passed)
            if again and recompute == "auto":
                reason += _hint(architecture, budget, now, mode)
            return Plan(mode, again, tokens, found, reason)
        if tokens == work.pack_tokens:
            what = mode + (" with recomputation" if again else "")
            passed.append(f"{what} {size_text(found.total)}")
    raise ConfigError(
        f"the LM does not fit into {size_text(budget)}: packs of {smallest} rows take "
        f"{size_text(found.total)} ({mode}{' with recomputation' if again else ''}). Lower "
        "data.max_tokens or em.block_users, take a 4-bit LM (lm.quantization) or another device"
    )


def _hint(architecture: Architecture, budget: int, work: Workload, mode: str) -> str:
    """The smaller pack that would save the third pass, where there is one."""
    tokens = work.pack_tokens // 2
    while tokens >= max(1024, work.user_tokens):
        if architecture.estimate(mode, False, work.of_size(tokens)).total <= budget:
            return f"; em.pack_tokens={tokens} would do without recomputation"
        tokens //= 2
    return ""


def budget_bytes(device: torch.device) -> int:
    """What weights and step may take of the memory that is free."""
    free = free_bytes(device)
    return int(free * _CPU_SHARE) if device.type == "cpu" else free


def smaller_pack(lm: FrozenLM, tokens: int, user_tokens: int) -> int:
    """Rows of the largest pack that fits, after one of `tokens` rows did not.

    Call it once the failed step is forgotten, so that its memory is free again.

    Args:
        lm: The LM, loaded by `open_lm`.
        tokens: Rows of the pack that failed.
        user_tokens: Rows of the longest user, which is the smallest pack.

    Raises:
        OutOfMemoryError: The longest user alone does not fit.
    """
    if lm.device.type == "cuda":
        torch.cuda.empty_cache()
    free = free_bytes(lm.device)
    fits = tokens // 2 // 64 * 64
    if lm.architecture is not None and lm.plan is not None:
        work = Workload(pack_tokens=tokens, user_tokens=user_tokens)
        predicted = lm.architecture.largest_pack(lm.plan.recompute, work, free)
        # It failed, so the prediction is too low somewhere: stay clear of it.
        fits = min(predicted, tokens * 7 // 8 // 64 * 64)
    if fits < user_tokens:
        raise OutOfMemoryError(
            f"out of memory at packs of {tokens} rows: {size_text(free)} are free, which packs of "
            f"{fits} rows fill, and the longest user has {user_tokens}; lower data.max_tokens, "
            "set lm.recompute=on or lm.residency=streamed, or free memory"
        )
    logger.warning(
        "out of memory at packs of %d rows with %s free; going on with em.pack_tokens=%d, the "
        "largest that fits",
        tokens,
        size_text(free),
        fits,
    )
    return fits

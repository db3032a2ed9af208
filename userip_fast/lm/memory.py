"""What a memory budget decides: residency of the weights, recomputation, and rows of a pack.

Streaming costs about 230 / T of a step of T rows, recomputation a third pass through the LM, so
they are taken in that order, and only when the step does not fit otherwise (docs/memory.md).
"""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from userip_fast.errors import ConfigError, OutOfMemoryError
from userip_fast.lm.trace import MIN_PACK, Architecture, Estimate, Workload

if TYPE_CHECKING:
    from userip_fast.lm.frozen import FrozenLM

logger = logging.getLogger("userip_fast.lm")

GIB = 2**30


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
    """The fastest way that fits: all in place, then streamed, then with recomputation.

    A pack is made smaller only when none of these fits, by halves.

    Args:
        architecture: The LM.
        budget: Bytes that weights and step may take together.
        work: What is wanted.
        residency: "auto", or a mode to keep to. "auto" never takes "fp8", which is lossy and as
            large as "resident".
        recompute: "auto", "on" or "off".

    Raises:
        ConfigError: Nothing fits, even with packs of one user; the text says what would.
    """
    modes = [residency]
    if residency == "auto":
        modes = ["resident", "streamed"] if architecture.four_bit else ["resident"]
    recomputes = {"auto": [False, True], "on": [True], "off": [False]}[recompute]
    smallest = min(work.pack_tokens, max(MIN_PACK, work.user_tokens))
    tokens = work.pack_tokens
    passed: list[str] = []
    while True:
        now = work.of_size(tokens)
        for again, mode in itertools.product(recomputes, modes):
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
        if tokens == smallest:
            break
        tokens = max(smallest, tokens // 2)
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


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: of the GPU, or of the machine and this process's cgroup."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        about = Path("/proc/meminfo").read_text()
        free = 1024 * int(about.split("MemAvailable:")[1].split()[0])
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            free = min(free, max(0, int(limit) - used))
    except (OSError, IndexError, ValueError):
        pass  # not Linux, or no cgroup of version 2: what sysconf says
    return free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed to allocate, on CUDA or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def smaller_pack(lm: FrozenLM, tokens: int, user_tokens: int) -> int:
    """Rows of the largest pack that fits, after one of `tokens` rows did not.

    Call it once the failed step is forgotten, so that its memory is free again.

    Args:
        lm: The LM, loaded by `FrozenLM.load`.
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


def size_text(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"

"""How many threads to compute with: what this process may use, not what the machine has.

torch starts as many threads as the process's affinity allows. A container with a quota of 2 of 64
processors is allowed all 64 by affinity, and 64 threads then take turns on two, each paused for the
rest of a period once the quota is used up.
"""

from __future__ import annotations

import logging
import math
import os
from functools import cache
from pathlib import Path

from userip_fast.core import _extension

logger = logging.getLogger("userip_fast")

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_ROOT = Path("/sys/fs/cgroup")


def affinity() -> int:
    """Processors that the scheduler may run this process on."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def quota(root: Path = _ROOT, groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors' worth of time that the control groups grant, the least of all above; or None.

    Args:
        root: Where control groups are mounted (version 2, or version 1 with `cpu` below it).
        groups: The list of groups of this process.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    granted: list[float] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts = [root] if number == "0" else [root / "cpu", root / "cpu,cpuacct"]
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            own = mount / path.lstrip("/")
            # Within a container the path may be that of the host: then the mount itself is ours.
            for folder in {own, *own.parents, mount}:
                if folder == mount or mount in folder.parents:
                    granted += _granted(folder)
    return min(granted, default=None)


def _granted(folder: Path) -> list[float]:
    def read(name: str) -> list[str]:
        try:
            return (folder / name).read_text(encoding="utf-8").split()
        except OSError:
            return []

    texts = read("cpu.max") or [*read("cpu.cfs_quota_us"), *read("cpu.cfs_period_us")]
    try:
        microseconds, period = (float(t) for t in texts)
    except ValueError:  # "max", or no such files
        return []
    return [microseconds / period] if microseconds > 0 and period > 0 else []


def processors() -> int:
    """Processors that this process can keep busy: its affinity, or its quota where that is less."""
    granted = quota()
    return max(1, affinity() if granted is None else min(affinity(), math.ceil(granted)))


def look() -> None:
    """Has waiting threads sleep where other processes want the processors; CPU kernels look by
    themselves, so this is for loops that call none."""
    module = _extension.load()
    if module is not None:
        module.crowded()


@cache
def settle() -> int:
    """Has torch and the extension compute with `processors` threads, once per process.

    A number that was asked for stays: OMP_NUM_THREADS, MKL_NUM_THREADS, torch.set_num_threads.

    Returns:
        Threads that torch computes with.
    """
    import torch

    before, most = torch.get_num_threads(), processors()
    if before == affinity() and most < before and not any(v in os.environ for v in _VARIABLES):
        torch.set_num_threads(most)
        logger.info(
            "%d threads, as the control group grants %.3g of %d processors; OMP_NUM_THREADS "
            "overrides it", most, quota(), before,
        )  # fmt: skip
    return torch.get_num_threads()

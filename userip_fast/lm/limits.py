"""What memory there is, and how its end is told."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: of the GPU, or of the machine and this process's cgroup."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, IndexError, ValueError):  # not Linux: what sysconf says
        about = Path("/proc/meminfo").read_text()
        free = 1024 * int(about.split("MemAvailable:")[1].split()[0])
    return min([free, *_cgroups_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _cgroups_free(membership: Path, mounted: Path) -> Iterator[int]:
    """What the memory limits of this process's cgroup and of those above it leave.

    A container sees its own group as the root, whatever path it has outside; so each ancestor of
    that path is looked for, down to the root. Cached file pages are given back on demand.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        root, files = mounted, ("memory.max", "memory.current", "inactive_file")
        if controllers:
            root = mounted / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if controllers not in ("", "memory"):
            continue
        own = root / name.lstrip("/")
        for group in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # "max", or no such file
                limit, used = (int((group / file).read_text()) for file in files[:2])
                stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
                yield max(0, limit - used + int(stat[files[2]]))
            if group == root:
                break


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed to allocate, on CUDA or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def size_text(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"

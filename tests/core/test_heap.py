"""Freed memory goes back to the system where the C library can give it."""

from __future__ import annotations

import ctypes
import sys

import pytest

from userip_fast.core import heap


def resident() -> int:
    """Bytes of this process that no file has."""
    with open("/proc/self/status") as f:
        return 1024 * int(next(line for line in f if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_gaps_are_given_back():
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018
    except AttributeError:
        pytest.skip("another C library than glibc")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, count = 100_000, 400  # below the size from which glibc maps blocks of their own
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        libc.free(block)
    before = resident()
    heap.trim()
    assert before - resident() > size * count // 2
    libc.free(blocks[-1])


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap._malloc_trim.cache_clear()
    heap.trim()
    heap._malloc_trim.cache_clear()

"""Runs the CPU kernels of assign_codes under ASan with UBSan, and under TSan.

    make sanitize        (or, with cmake and pybind11 there: python tests/sanitize_assign_codes.py)

Builds csrc once for each in build/sanitize-*, then runs itself with the sanitizer's runtime in
front. Torch is not imported: sanitizers would watch it too. Each call's arrays end where they
should, so that a step past one is seen; ids are checked against NumPy. Any report ends a run with a
failure.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = {"address": "address,undefined", "thread": "thread"}  # name of the runtime -> flags
# Rows, codes, columns: one panel or many, one block of rows, codes and columns or more, and tails.
SHAPES = [
    (1, 1, 1),
    (97, 7, 100),
    (97, 17, 100),
    (300, 16, 515),
    (50, 3, 7),
    (40, 300, 300),
    (211, 70, 257),
    (1200, 33, 20),
]


def build(name: str) -> Path:
    """The extension, compiled with sanitizer `name`."""
    import pybind11

    folder = ROOT / "build" / f"sanitize-{name}"
    configure = [
        "cmake",
        f"-S{ROOT}",
        f"-B{folder}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DUSERIP_FAST_SANITIZE={SANITIZERS[name]}",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (configure, ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})
    return next(folder.glob("_C*.so"))


def run_under(name: str, extension: Path) -> int:
    """Exit code of this script's checks under sanitizer `name`."""
    print_name = [os.environ.get("CXX", "g++"), f"-print-file-name=lib{name[0]}san.so"]
    runtime = subprocess.run(print_name, check=True, capture_output=True, text=True).stdout.strip()
    env = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "OMP_NUM_THREADS": "4",
        "OPENBLAS_NUM_THREADS": "1",  # NumPy's threads are not instrumented
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, __file__, str(extension)]
    return subprocess.run(command, env=env, check=False).returncode


def call(module: Any, isa: str, x: Any, c: Any, sizes: list[int], stats: bool, cosine: bool) -> Any:
    """code_ids [J, N] of x [J, N, D] and c [sum K, D]."""
    books, rows, dim = x.shape
    ids = np.empty((books, rows), np.int64)
    near, far = np.empty((books, rows), np.float32), np.empty((books, rows), np.float32)
    counts, sums = np.empty(len(c), np.int64), np.empty(c.shape, np.float32)
    strides = [s // x.itemsize for s in x.strides]
    active = np.arange(len(c)) % 5 != 1
    module.assign_codes_cpu(
        isa=isa,
        x=x.ctypes.data,
        type={"float32": 0, "uint16": 1, "float16": 2}[x.dtype.name],
        rows=rows,
        dim=dim,
        stride_book=strides[0],
        stride_row=strides[1],
        stride_dim=strides[2],
        codewords=c.ctypes.data,
        sizes=sizes,
        active=active.ctypes.data,
        normalize=cosine,
        code_ids=ids.ctypes.data,
        sq_distance=near.ctypes.data,
        second_sq_distance=far.ctypes.data if stats else 0,
        counts=counts.ctypes.data if stats else 0,
        sums=sums.ctypes.data if stats else 0,
    )
    if stats:
        assert counts.sum() == books * rows
    return ids, active


def check(module: Any, isa: str, x: Any, values: Any, c: Any, sizes: list[int]) -> int:
    """All variants on x, whose numbers are `values` in fp32. Returns how many ran."""
    for cosine in (False, True):
        for stats in (False, True):
            ids, active = call(module, isa, x, c, sizes, stats, cosine)
            first = 0
            for j, size in enumerate(sizes):
                book = slice(first, first + size)
                v, w = values[j].astype(float), c[book].astype(float)
                if cosine:  # the kernel scales rows; codewords are scaled by its caller, here not
                    v = v / np.linalg.norm(v, axis=1, keepdims=True)
                d = (v**2).sum(1)[:, None] - 2 * v @ w.T + (w**2).sum(1)
                d[:, ~active[book]] = np.inf
                chosen = np.take_along_axis(d, ids[j][:, None], 1)[:, 0]
                assert (chosen <= d.min(1) + 1e-4 * (1 + d.min(1))).all(), (isa, x.shape, size)
                first += size
    return 4


def check_all(path: str) -> None:
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(0)
    ran = 0
    isas = module.instruction_sets()["assign_codes"]
    for isa in isas:
        for rows, k, dim in SHAPES:
            sizes = [k, 5]
            c = rng.standard_normal((sum(sizes), dim), np.float32)
            wide = rng.standard_normal((2, rows, 2 * dim), np.float32)
            plain, half = wide[:, :, :dim].copy(), wide[:, :, :dim].astype(np.float16)
            brain = (plain.view(np.uint32) >> 16).astype(np.uint16)
            as_float = (brain.astype(np.uint32) << 16).view(np.float32)
            for x in (plain, wide[:, :, ::2], wide[:, :, dim:], wide[::-1]):
                x = x[:, :, :dim]
                ran += check(module, isa, x, x, c, sizes)
            ran += check(module, isa, half, half, c, sizes)
            ran += check(module, isa, brain, as_float, c, sizes)
    print(f"{ran} runs on {isas}, nothing found")


def main() -> int:
    if len(sys.argv) == 2:
        check_all(sys.argv[1])
        return 0
    failed = []
    for name in SANITIZERS:
        print(f"== {SANITIZERS[name]}", flush=True)
        if run_under(name, build(name)) != 0:
            failed.append(SANITIZERS[name])
    print(f"sanitizers FAILED: {'; '.join(failed)}" if failed else "sanitizers clean")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

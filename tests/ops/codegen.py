"""Compiles a Triton kernel for a GPU that is not there, and counts what came out.

`compile_kernel` must run in a process without TRITON_INTERPRET; `run_isolated` starts such
processes. The assembler and `cuobjdump` are the ones inside Triton's wheel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Most shared memory a block may ask for, in bytes.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448}


class Report(NamedTuple):
    """What one kernel costs on one architecture."""

    arch: int
    registers: int
    stack: int  # bytes per thread
    spills: int  # loads and stores of local memory (LDL, STL)
    shared: int  # bytes per block
    counts: dict[str, int]  # instructions by name


_COUNTED = (
    "HGMMA",
    "HMMA",
    "IMMA",
    "UTMALDG",
    "LDGSTS",
    "LDSM",
    "STL",
    "LDL",
    "MUFU",
    "RED",
    "ATOM",
)


def compile_kernel(
    fn: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: tuple[str, ...] = (),
) -> Report:
    """Compiles `fn` for sm_`arch` without a device.

    Args:
        fn: A `triton.jit` function.
        signature: Type of each argument: "*bf16", "i32", "tensordesc<bf16[1, 64, 128]>", ...
        constants: Values of the constexpr arguments.
        arch: 80, 86, 89 or 90.
        num_warps: Launch option.
        num_stages: Launch option.
        aligned: Integer arguments known to be divisible by 16, as Triton finds out at launch;
            pointers always are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {name: i for i, name in enumerate(fn.arg_names)}
    divisible = [n for n, t in signature.items() if t.startswith("*") or n in aligned]
    source = ASTSource(
        fn=fn,
        signature={
            name: "constexpr" if name in constants else signature[name] for name in fn.arg_names
        },
        constexprs={(places[n],): v for n, v in constants.items()},
        attrs={(places[n],): [["tt.divisibility", 16]] for n in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in _COUNTED}
    # A dot that adds to a loop's argument sums in the tensor core, whatever the source says; and a
    # copy into a buffer that a pending dot may still read is a race.
    ttgir, ptx = compiled.asm["ttgir"], compiled.asm["ptx"]
    counts["CARRIED"] = len(re.findall(r"warp_group_dot %\w+, %\w+, %arg\d+", ttgir))
    counts["PENDING"] = len(re.findall(r"warp_group_dot_wait.*pending. = [1-9]", ttgir))
    counts["PENDING"] += len(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", ptx))
    return Report(
        arch,
        int(found[1]),
        int(found[2]),
        counts["STL"] + counts["LDL"],
        compiled.metadata.shared,
        counts,
    )


def run_isolated(script: Path, jobs: list[list[str]], workers: int = 2) -> list[list[Report]]:
    """Runs `script` once per job in its own process without TRITON_INTERPRET, `workers` at a time.

    The script prints one JSON list of reports as its last line (`print_reports`).
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_DEFAULT_FP_FUSION"] = "1"  # as userip_fast.ops sets it
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(script.parent), env.get("PYTHONPATH", "")])

    def one(job: list[str]) -> list[Report]:
        done = subprocess.run(
            [sys.executable, str(script), *job], capture_output=True, text=True, env=env, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [Report(**r) for r in json.loads(done.stdout.splitlines()[-1])]

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, jobs))


def print_reports(reports: list[Report]) -> None:
    """The last line that `run_isolated` reads."""
    print(json.dumps([r._asdict() for r in reports]))

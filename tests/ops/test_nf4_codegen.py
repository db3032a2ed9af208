"""Compiles the NF4, Adam, cross-entropy and posterior kernels for GPUs that are not here.

Run as a script it compiles for the architectures named and prints what came out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compile_all(arch):
    """Reports of every kernel, in its widest variants."""
    from codegen import compile_kernel
    from userip_fast.kernels import linear_cross_entropy, nf4, profile_posterior, sparse_adam

    reports = []
    for out, nested in (("*fp32", False), ("*bf16", True), ("*fp16", True)):
        pointers = {
            "packed_ptr": "*u8",
            "absmax_ptr": "*u8" if nested else "*fp32",
            "levels_ptr": "*fp32",
            "out_ptr": out,
        }
        none = {}
        for name in ("nested_absmax_ptr", "nested_map_ptr", "offset_ptr"):
            if nested:
                pointers[name] = "*fp32"
            else:
                none[name] = None
        reports.append(
            compile_kernel(
                nf4._nf4_dequantize_kernel,
                {**pointers, "n": "i32", "num_blocks": "i32"},
                {
                    **none,
                    "BLOCKSIZE": 64,
                    "TILE_BLOCKS": 64,
                    "NESTED": nested,
                    "NESTED_BLOCKSIZE": 256,
                },
                arch,
            )
        )
    reports.append(
        compile_kernel(
            sparse_adam._sparse_adam_kernel,
            {
                **dict.fromkeys(("theta_ptr", "m_ptr", "v_ptr"), "*fp32"),
                "step_ptr": "*i32",
                "rows_ptr": "*i64",
                "grad_ptr": "*bf16",
                **dict.fromkeys(("lr", "eps"), "fp32"),
                **dict.fromkeys(("N", "D"), "i32"),
            },
            {
                "BETA1": 0.9,
                "BETA2": 0.999,
                "LOG_BETA1": -0.1,
                "LOG_BETA2": -0.001,
                "BLOCK_D": 2048,
            },
            arch,
            num_warps=8,
            aligned=("D",),
        )
    )
    reports.append(
        compile_kernel(
            linear_cross_entropy._cross_entropy_kernel,
            {
                "logits_ptr": "*bf16",
                "target_ptr": "*i64",
                "loss_weight_ptr": "*fp32",
                "token_nll_ptr": "*fp32",
                "V": "i32",
                "softcap": "fp32",
            },
            {
                "bias_ptr": None,
                "HAS_BIAS": False,
                "SOFTCAP": True,
                "NEED_GRAD": True,
                "BLOCK_V": 4096,
            },
            arch,
            num_warps=8,
            aligned=("V",),
        )
    )
    for codes in (16, 128, 8192):
        block_u, block_z, num_warps = profile_posterior.block_shape(codes)
        reports.append(
            compile_kernel(
                profile_posterior._profile_posterior_kernel,
                {
                    **dict.fromkeys(("table_ptr", "weights_ptr", "log_resp_ptr"), "*fp32"),
                    **dict.fromkeys(("kinds_ptr", "offsets_ptr"), "*i64"),
                    **dict.fromkeys(("log_prior_ptr", "evidence_ptr"), "*fp64"),
                    **dict.fromkeys(("U", "E", "Z"), "i32"),
                },
                {"HAS_WEIGHTS": True, "BLOCK_U": block_u, "BLOCK_Z": block_z},
                arch,
                num_warps=num_warps,
                aligned=("Z",),
            )
        )
    return reports


def test_triton_kernels_do_not_spill():
    from codegen import run_isolated

    for reports in run_isolated(Path(__file__), [["80", "86"], ["89", "90"]]):
        for report in reports:
            assert report.stack == 0, report
            assert report.spills == 0, report
            assert report.counts["ATOM"] == report.counts["RED"] == 0, report


def test_cuda_kernel_does_not_spill_and_stores_16_bytes(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "86", "89", "90a")]
    command = [nvcc, "-std=c++20", "-O3", "-I", ROOT / "csrc", *targets, "-Xptxas", "-v", "-c"]
    binary = tmp_path / "nf4.o"
    done = subprocess.run(
        [*command, ROOT / "csrc" / "cuda" / "nf4.cu", "-o", binary], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", done.stderr)
    assert len(stacks) == 6 * len(targets)
    assert all(pair == ("0", "0") for pair in stacks)
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", done.stderr)]
    assert max(registers) <= 64  # four blocks of 256 threads on an SM
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run(
        [tool, "-sass", "-arch", "sm_90a", binary], capture_output=True, text=True, check=True
    ).stdout
    for name in ("bfloat16", "half"):
        kernels = [f for f in sass.split("Function : ")[1:] if name in f.splitlines()[0]]
        assert len(kernels) == 2
        for kernel in kernels:
            assert len(re.findall(r"STG\.E\.128", kernel)) == 4, name
            assert not re.search(r"\b(STL|LDL|ATOM|RED)\b", kernel)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    assert os.environ.get("TRITON_INTERPRET") != "1"
    from codegen import print_reports

    print_reports([r for arch in sys.argv[1:] for r in compile_all(int(arch))])

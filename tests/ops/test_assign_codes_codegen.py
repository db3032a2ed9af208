"""What the Triton kernels of assign_codes become on each GPU generation, without a GPU.

As a script: compiles for one architecture and prints the reports (see codegen.py).
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from codegen import ROOT, SHARED_LIMIT, compile_kernel, print_reports, run_isolated

ARCHES = (80, 86, 89, 90)
RANK = {
    "half_norm_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "first_ptr": "*i64",
    "ids_ptr": "*i32",
    "N": "i32",
    "D": "i32",
    "stride_xj": "i64",
    "stride_xn": "i64",
    "stride_xd": "i32",
}


def main(arch):
    from userip_fast.kernels import assign_codes as k

    def rank(config, dtype, tma, precision):
        block = (config.block_n, config.block_k, config.block_d)
        operands = {"x": f"*{dtype}", "codewords": f"*{dtype}"}
        if tma:
            operands = {
                "x": f"tensordesc<{dtype}[1, {block[0]}, {block[2]}]>",
                "codewords": f"tensordesc<{dtype}[{block[1]}, {block[2]}]>",
            }
        return compile_kernel(
            k._rank_kernel,
            operands | RANK,
            {
                "NORMALIZE": False,
                "TMA": tma,
                "PRECISION": precision,
                "BLOCK_N": block[0],
                "BLOCK_K": block[1],
                "BLOCK_D": block[2],
                "stride_xd": 1,
            },
            arch,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            aligned=("D", "stride_xj", "stride_xn"),
        )

    reports = [rank(k.POINTER, "bf16", False, "ieee"), rank(k.TF32, "fp32", False, "tf32x3")]
    if arch >= 90:
        reports.append(rank(k.TMA, "bf16", True, "ieee"))
    common = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "N": "i32", "K": "i32", "D": "i32"}
    strides = {"stride_xj": "i64", "stride_xn": "i64", "stride_xd": "i32"}
    reports.append(
        compile_kernel(
            k._decide_kernel,
            common
            | strides
            | {
                "words_ptr": "*fp32",
                "first_ptr": "*i64",
                "pair_ptr": "*i32",
                "ids_ptr": "*i64",
                "near_ptr": "*fp32",
                "far_ptr": "*fp32",
            },
            {"NORMALIZE": True, "HAS_FAR": True, "BLOCK_N": 8, "BLOCK_D": 512, "stride_xd": 1},
            arch,
            aligned=("D", "stride_xj", "stride_xn"),
        )
    )
    reports.append(
        compile_kernel(
            k._sum_kernel,
            common | strides | {"order_ptr": "*i64", "start_ptr": "*i64", "out_ptr": "*fp32"},
            {"NORMALIZE": True, "SHARES": 4, "BLOCK_N": 16, "BLOCK_D": 512, "stride_xd": 1},
            arch,
            aligned=("D", "stride_xn"),
        )
    )
    print_reports(reports)


def test_no_spills_and_tensor_cores_everywhere():
    pytest.importorskip("triton")
    for arch, reports in zip(
        ARCHES, run_isolated(Path(__file__), [[str(a)] for a in ARCHES]), strict=True
    ):
        for i, r in enumerate(reports):
            assert (r.arch, r.stack, r.spills) == (arch, 0, 0), (i, r)
            assert r.shared <= SHARED_LIMIT[arch], (i, r)
            assert r.counts["RED"] == r.counts["ATOM"] == 0, (i, r)
        rank, tf32, *rest = reports
        if arch < 90:
            assert min(rank.counts["HMMA"], tf32.counts["HMMA"]) > 0
            assert rank.counts["LDGSTS"] > 0  # asynchronous copies
        else:
            assert rank.counts["HGMMA"] > 0
            assert rest[0].counts["HGMMA"] > 0
            assert rest[0].counts["HMMA"] == 0
            assert rest[0].counts["UTMALDG"] > 0


def test_the_cuda_half_compiles_without_spills(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    source = ROOT / "csrc" / "cuda" / "assign_codes.cu"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "86", "89", "90a")]
    command = [nvcc, "-std=c++20", "-O3", "-I", ROOT / "csrc", *targets, "-Xptxas", "-v", "-c"]
    done = subprocess.run(
        [*command, source, "-o", tmp_path / "out.o"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", done.stderr
    )
    kernels = 3 * 2 * 2  # dtypes, 16 or 32 codes, cluster or not
    assert frames == [("0", "0", "0")] * (kernels * len(targets))


if __name__ == "__main__":
    main(int(sys.argv[1]))

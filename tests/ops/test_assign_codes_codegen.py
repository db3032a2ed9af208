"""What the Triton kernels of assign_codes become on each GPU generation, without a GPU.

As a script: compiles for one architecture and prints the reports (see codegen.py).
"""

import sys
from pathlib import Path

import pytest
from codegen import SHARED_LIMIT, compile_kernel, print_reports, run_isolated

ARCHES = (80, 86, 89, 90)
RANK = {
    "half_norm_ptr": "*fp32",
    "norm_ptr": "*fp32",
    "first_ptr": "*i64",
    "ids_ptr": "*i32",
    "scores_ptr": "*fp32",
    "N": "i32",
    "D": "i32",
    "stride_xj": "i64",
    "stride_xn": "i64",
    "stride_xd": "i32",
}


def main(arch):
    from userip_fast.kernels import assign_codes_few as few_codes
    from userip_fast.kernels import assign_codes_many as k
    from userip_fast.kernels import assign_codes_shared as shared
    from userip_fast.kernels import assign_codes_sums as s

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
                "SLICES": 4,
                "PACKED": dtype == "bf16",
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
        reports += [rank(config, "bf16", True, "ieee") for _, config in k.TMA]

    def few(codes, parts, config, whole, near=True):
        operands = {
            "x": f"tensordesc<bf16[{config.block_n}, {config.block_d}]>",
            "words": f"tensordesc<bf16[{config.block_k}, {config.block_d}]>",
        }
        rest = {"half_norm_ptr": "*fp32", "ids_ptr": "*i64", "near_ptr": "*fp32"}
        rest |= {"other_ptr": "*i32", "sums_ptr": "*fp32", "counts_ptr": "*i64"}
        rest |= {"N": "i32", "K": "i32", "D": "i32", "stride_xn": "i64"}
        rest |= {"mark_ptr": "*i32", "flags_ptr": "*i32", "one": "fp32"}
        constants = {
            "SUMS": whole and near,
            "NEAR": near,
            "TMA": True,
            "PRECISION": "ieee",
            "PARTS": parts,
        }
        constants |= {"CLOSE": k.CLOSE, "SMALL": few_codes.SMALL, "WHOLE": whole, "stride_xd": 1}
        constants |= {f"BLOCK_{n}": getattr(config, f"block_{n.lower()}") for n in "NKD"}
        return compile_kernel(
            few_codes._few_kernel,
            operands | rest,
            constants,
            arch,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            aligned=("D", "stride_xn"),
        )

    reports += (
        []
        if arch < 90
        else [
            few(codes, parts, *few_codes.few_config(codes, dim, parts))
            for codes in (16, 32, s.FEW)
            for dim in (few_codes.WHOLE, 4096)
            for parts in (1, 3)
        ]
        + [few(16, 1, *few_codes.few_config(16, 4096, 1), near=False)]
    )
    common = {"x_ptr": "*bf16", "N": "i32", "K": "i32", "D": "i32"}
    norm = {"norm_ptr": "*fp32"}
    strides = {"stride_xj": "i64", "stride_xn": "i64", "stride_xd": "i32"}
    decided = {
        "words_ptr": "*fp32",
        "half_norm_ptr": "*fp32",
        "mark_ptr": "*i32",
        "flags_ptr": "*i32",
        "words": "i32",
        "first_ptr": "*i64",
        "pair_ptr": "*i32",
        "scores_ptr": "*fp32",
        "ids_ptr": "*i64",
        "near_ptr": "*fp32",
        "far_ptr": "*fp32",
    }
    for normalize, block_n in ((False, 8), (True, 4)):
        constants = {"NORMALIZE": normalize, "NEAR": True, "HAS_FAR": True, "SLICES": 4}
        constants |= {"CLOSE": k.CLOSE, "CLOSE_ROUNDED": k.CLOSE_ROUNDED}
        reports.append(
            compile_kernel(
                k._decide_kernel,
                common | norm | strides | decided,
                constants | {"BLOCK_N": block_n, "BLOCK_D": 256, "stride_xd": 1},
                arch,
                aligned=("D", "stride_xj", "stride_xn"),
            )
        )
    redone = {"words_ptr": "*fp32", "other_ptr": "*i32", "ids_ptr": "*i64", "near_ptr": "*fp32"}
    reports.append(
        compile_kernel(
            few_codes._redo_kernel,
            common | strides | redone | {"flags_ptr": "*i32"},
            {"SPAN": 256, "BLOCK_N": 8, "BLOCK_D": 256, "stride_xd": 1},
            arch,
            aligned=("D", "stride_xn"),
        )
    )
    prepared = {"codewords_ptr": "*fp32", "active_ptr": "*u8", "words_ptr": "*fp32"}
    prepared |= {"half_norm_ptr": "*fp32", "mark_ptr": "*i32", "parts_ptr": "*bf16"}
    prepared |= {"flags_ptr": "*i32", "K": "i32", "D": "i32"}
    constants = {"MOST": shared.MOST, "NORMALIZE": True, "ACTIVE": True, "WORDS": True}
    constants |= {"PARTS": 3, "BLOCK_D": 1024}
    reports.append(
        compile_kernel(shared._prepare_kernel, prepared, constants, arch, aligned=("D",))
    )
    pointers = {name: "*i64" for name in ("order_ptr", "start_ptr", "first_piece_ptr", "code_ptr")}
    reports.append(
        compile_kernel(
            s._sum_kernel,
            common | norm | strides | pointers | {"out_ptr": "*fp32"},
            {"NORMALIZE": True, "PIECE": s.PIECE, "BLOCK_N": 32, "BLOCK_D": 256, "stride_xd": 1},
            arch,
            aligned=("D", "stride_xn"),
        )
    )
    outputs = {"ids_ptr": "*i64", "sums_ptr": "*fp32", "counts_ptr": "*i64", "share_rows": "i32"}
    reports += [
        compile_kernel(
            s._onehot_sum_kernel,
            common | strides | outputs,
            {"CHAIN": 1024, "BLOCK_K": codes, "BLOCK_N": 64, "BLOCK_D": width, "stride_xd": 1},
            arch,
            num_warps=4,
            num_stages=3,
            aligned=("D", "stride_xn"),
        )
        for codes, width in ((16, 128), (32, 128), (s.FEW, 64))
    ]
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
            by_tma = rest[:16]  # the ranking kernel's four tiles, then those of few codes
            assert all(r.counts["HGMMA"] > 0 and r.counts["UTMALDG"] > 0 for r in by_tma)
            # Parts of a sum are added up in fp32, and no dot is pending when x's buffer is refilled
            # (both were otherwise): see `one` in the kernel. By whole rows there is no such loop.
            few = by_tma[4:] + rest[16:17]
            for i, r in enumerate(few):
                if i % 4 >= 2 or i == 12:
                    assert (r.counts["CARRIED"], r.counts["PENDING"]) == (0, 0), (i, r)
            # The ranking kernel means to sum in the core: what is looked for can be seen.
            assert min(rank.counts["CARRIED"], by_tma[0].counts["CARRIED"]) > 0
            # Only the sums of few codes, in tiles of whole rows, have too few rows for wgmma.
            slow = [i for i, r in enumerate(by_tma) if r.counts["HMMA"] > 0]
            assert slow == [4, 5]


if __name__ == "__main__":
    main(int(sys.argv[1]))

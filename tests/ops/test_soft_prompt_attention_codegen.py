"""Compiles the attention kernels for absent GPUs; refuses spills and lost tensor cores.

Run as a script for a table: `python tests/ops/test_soft_prompt_attention_codegen.py 80 90`.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from codegen import SHARED_LIMIT, Report, compile_kernel, print_reports, run_isolated

ARCHES = (80, 86, 89, 90)
DIMS = (8, 64, 128, 256)
KERNELS = ("fwd", "dq", "dkdv")


Variant = tuple[str, int, int, int, bool, int]


def variants(arch: int) -> list[Variant]:
    """(kernel, head size, width of v, window 0 to 2, with soft cap and sinks, key heads of 32).

    Window and cap where registers run short, chunks once; without groups, as in Llama 2, for the
    kernel that walks the heads of a group; v of another width as in DeepSeek-V3, where k has none.
    """
    plain = [(kernel, dim, dim, 0, False, 8) for dim in DIMS for kernel in KERNELS]
    costly = [(kernel, dim, dim, 1, True, 8) for dim in (64, 256) for kernel in KERNELS]
    costly += [(kernel, 128, 128, 2, False, 8) for kernel in KERNELS]
    costly += [(kernel, 192, 128, 0, False, 32) for kernel in KERNELS]
    alone = [("dkdv", 128, 128, 0, False, 32)]
    return plain + alone + (costly if arch in (80, 90) else [])


def on_descriptors(kernel: str, dim: int, arch: int) -> bool:
    return arch == 90 and not (kernel == "dkdv" and dim > 128)


def compile_variant(
    kernel: str, dim: int, v_dim: int, window: int, extras: bool, kv_heads: int, arch: int
) -> Report:
    import torch
    from userip_fast.kernels import soft_prompt_attention as kernels

    fn = getattr(kernels, f"_{kernel}_kernel")
    block_d, block_v = (max(16, 1 << (n - 1).bit_length()) for n in (dim, v_dim))
    desc = on_descriptors(kernel, dim, arch)
    cut = kernels.tiling(kernel, max(dim, v_dim), torch.bfloat16, desc)
    rows, columns = (cut.step, cut.own) if kernel == "dkdv" else (cut.own, cut.step)
    signature = {}
    for name in fn.arg_names:
        width = block_v if name in ("v", "prefix_v", "d_out", "out") else block_d
        if name in ("q", "d_out", "out"):
            signature[name] = f"tensordesc<bf16[1, {rows}, {width}]>" if desc else "*bf16"
        elif name in ("k", "v", "prefix_k", "prefix_v"):
            signature[name] = f"tensordesc<bf16[1, {columns}, {width}]>" if desc else "*bf16"
        elif name in ("out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"):
            signature[name] = "*bf16"
        elif name in ("lse_ptr", "delta_ptr", "sinks_ptr"):
            signature[name] = "*fp32"
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = "*i32" if name.endswith("_ptr") else "i32"
    constants = {
        "H": 32,
        "HKV": kv_heads,
        "DIM": dim,
        "BLOCK_D": block_d,
        "DIM_V": v_dim,
        "BLOCK_V": block_v,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "WINDOW": window,
        "SOFTCAP": extras,
        "DESC": desc,
    }
    if kernel == "fwd":
        constants["SINKS"] = extras
    else:
        constants["ROW_HEADS"] = 32 + 2 * kv_heads  # as the packed block has them
    return compile_kernel(
        fn,
        signature,
        constants,
        arch,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        aligned=tuple(name for name in fn.arg_names if name.startswith("stride")),
    )


def compile_small(arch: int) -> list[Report]:
    """The work list, and the kernels of prepend_soft_prompts."""
    from userip_fast.kernels import prepend_soft_prompts
    from userip_fast.kernels import soft_prompt_attention_shared as attention

    reports = []
    for fn, pointers, constants in (
        (
            attention._work_list_kernel,
            {},
            {"TILE": 64, "LAST_FIRST": True, "BLOCK_U": 128},
        ),
        (
            prepend_soft_prompts._prepend_kernel,
            {"table_ptr": "*bf16", "soft_ptr": "*fp32", "x_ptr": "*bf16", "scale": "fp32"},
            {"BLOCK_D": 1024},
        ),
        (
            prepend_soft_prompts._prepend_backward_kernel,
            {"d_x_ptr": "*bf16", "order_ptr": "*i64", "bounds_ptr": "*i64", "d_soft_ptr": "*fp32"},
            {"BLOCK_D": 1024},
        ),
    ):
        rest = {name: "*i32" if name.endswith("_ptr") else "i32" for name in fn.arg_names}
        reports.append(compile_kernel(fn, rest | pointers, constants, arch))
    return reports


@pytest.fixture(scope="module")
def reports() -> dict[int, list[Report]]:
    jobs = [[str(arch)] for arch in ARCHES]
    return dict(zip(ARCHES, run_isolated(Path(__file__), jobs), strict=True))


@pytest.mark.parametrize("arch", ARCHES)
def test_no_spills_and_tensor_cores_and_shared_memory_fits(arch, reports):
    *attention, work_list, prepend, prepend_backward = reports[arch]
    for report in (work_list, prepend, prepend_backward):
        assert report.stack == report.spills == report.counts["RED"] == report.counts["ATOM"] == 0
    for variant, report in zip(variants(arch), attention, strict=True):
        name = f"{variant}, sm_{arch}: {report}"
        count = report.counts
        assert report.stack == report.spills == 0, name
        assert report.shared <= SHARED_LIMIT[arch], name
        assert count["RED"] == count["ATOM"] == 0, name
        if on_descriptors(*variant[:2], arch):
            assert count["HMMA"] == 0, name
            assert min(count["HGMMA"], count["UTMALDG"]) > 0, name
        else:
            assert count["HMMA"] > 0, name


def main() -> None:
    for arch in map(int, sys.argv[1:]):
        found = [compile_variant(*variant, arch) for variant in variants(arch)]
        for variant, report in zip(variants(arch), found, strict=True):
            print(variant, report, file=sys.stderr)
        print_reports(found + compile_small(arch))


if __name__ == "__main__":
    main()

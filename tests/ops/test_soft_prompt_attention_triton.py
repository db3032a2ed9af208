"""The Triton kernels: in the interpreter with small tiles here, compiled on a GPU under `gpu`."""

from itertools import pairwise

import pytest
import torch
from soft_prompt_cases import CASES, Case, compare, gradients, make_case, run_op

from userip_fast.core.errors import UnavailableError
from userip_fast.ops.soft_prompt_attention import attention_backward, attention_forward
from userip_fast.ops.soft_prompt_attention.context import Context
from userip_fast.testing import poisoned_memory

pytest.importorskip("triton")

# Lengths around one, two and three tiles of 16, prefixes of more than one.
TILE_CASES = {
    "lengths around tiles": {"behaviour": [14, 13, 31, 1], "slack": 17, "heads": 1},
    "prefix of three tiles": {"behaviour": [4], "names": (15, 17, 3), "slack": 20, "heads": 1},
    "prefix of exactly a tile": {"behaviour": [5], "names": (7, 8), "heads": 1},
    "one token of prefix": {"behaviour": [5], "names": (0,), "heads": 1},
    "window over tiles": {"behaviour": [35], "window": 20, "names": (9, 9), "heads": 1},
    "items over tiles": {"behaviour": [33], "items": 7, "virtual": 3, "window": 5, "heads": 1},
    "chunks over tiles, sinks": {"behaviour": [39], "chunk": 20, "sinks": True, "names": (9, 9)},
    "head size 40, groups of 2": {"behaviour": [18], "dim": 40, "heads": 4, "kv_heads": 2},
}
for _name in (
    "no prefix", "empty prompts, m = 3", "softcap", "narrow v", "wide v, sinks, chunks, items",
    "sinks, window, softcap",
):  # fmt: skip
    TILE_CASES[_name] = CASES[_name]


@pytest.fixture
def small_tiles(monkeypatch):
    from userip_fast.kernels import soft_prompt_attention as kernels

    def tiling(kernel, *_):
        own, step = {"fwd": (16, 16), "dq": (32, 16), "dkdv": (16, 32)}[kernel]
        return kernels.Tiling(own, step, 4, 1)

    monkeypatch.setattr(kernels, "tiling", tiling)


@pytest.mark.parametrize("name", TILE_CASES)
def test_equals_dense_fp64(name, small_tiles):
    compare(make_case(**TILE_CASES[name]), "triton")


def test_equals_dense_fp64_in_half_precision():
    case = make_case([4, 11], heads=2, slack=5, window=6, items=5, softcap=5.0, dtype=torch.float16)
    compare(case, "triton")


def test_a_user_does_not_depend_on_the_batch_and_runs_repeat(small_tiles):
    case = make_case([18, 3, 7], slack=3, heads=1)
    d_out = torch.randn_like(case.tensors[0])
    whole = gradients(run_op("triton"), case, d_out)
    again = gradients(run_op("triton"), case, d_out)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    # the users in another order, without slack
    bounds = list(pairwise(case.pack[2].tolist()))
    order = [2, 0, 1]
    rows = torch.cat([torch.arange(*bounds[u]) for u in order])
    segment, prefix_segment, _, position, prefix_position = case.pack
    lengths = torch.tensor([0] + [bounds[u][1] - bounds[u][0] for u in order])
    cu = lengths.cumsum(0).int()
    moved = Case(
        (*(x[rows] for x in case.tensors[:3]), *case.tensors[3:]),
        (segment[rows], prefix_segment, cu, position[rows], prefix_position),
        case.options,
    )
    for w, m in zip(whole, gradients(run_op("triton"), moved, d_out[rows]), strict=True):
        assert torch.equal(w[rows], m)


@pytest.mark.parametrize("last_first", [True, False])
@pytest.mark.parametrize(
    ("cu", "rows"),
    [([0, 5, 5, 40, 41], 64), ([0], 9), ([0, 16], 16), ([0, *range(3, 90, 4)], 100)],
)
def test_the_work_list_covers_every_row_once_longest_first(cu, rows, last_first):
    from userip_fast.kernels.soft_prompt_attention_shared import work_list

    with poisoned_memory():
        work, capacity = work_list(
            torch.tensor(cu, dtype=torch.int32), rows, 16, last_first, block=8
        )
    owners, walks = torch.full((rows,), -7), []
    for start, end, first in work.tolist():
        if first < 0:
            continue
        part = slice(first, min(first + 16, end))
        assert (owners[part] == -7).all()
        owners[part] = start
        user_start = cu[-1] if start < 0 else start
        walks.append((first - user_start) // 16 if last_first else (end - first - 1) // 16)
    want = torch.full((rows,), -1)
    for a, b in pairwise(cu):
        want[a:b] = a
    assert torch.equal(owners, want)
    assert walks == sorted(walks, reverse=True)
    assert len(work) == capacity == rows // 16 + len(cu)


def test_opcheck():
    case = make_case([3], names=(2,), heads=1, kv_heads=1)
    leaves = [x.detach().requires_grad_() for x in case.tensors[:3]]
    torch.library.opcheck(attention_forward.op, (*leaves, *case.context, "triton"))
    qkv = case.tensors[:3]
    out, lse = attention_forward(*qkv, case.context, "triton")
    args = (torch.ones_like(out), *qkv, out, lse, *case.context, "triton")
    torch.library.opcheck(attention_backward.op, args)


def test_refusals_say_why(monkeypatch):
    case = make_case([3])
    with pytest.raises(UnavailableError, match="interpreter cannot multiply bfloat16"):
        run_op("triton")(case.cast(torch.bfloat16))
    with pytest.raises(UnavailableError, match="float64"):
        run_op("triton")(case.cast(torch.float64))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnavailableError, match="not on a CUDA device"):
        run_op("triton")(case)


# Compiled tiles are 32 and 64 wide: lengths and prefixes around those.
GPU_CASES = {
    "ragged, GQA": {"behaviour": [61, 62, 63, 126, 200, 1], "heads": 8, "kv_heads": 2, "slack": 70},
    "long prefix": {"behaviour": [90, 5], "names": (31, 40, 2), "virtual": 2},
    "items": {"behaviour": [150, 70], "items": 13, "virtual": 2},
    "window and cap": {"behaviour": [180, 33], "window": 70, "softcap": 5.0, "heads": 4},
    "chunks and sinks": {"behaviour": [180, 33], "chunk": 70, "sinks": True, "heads": 4},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [8, 40, 64, 128, 256])
@pytest.mark.parametrize("name", GPU_CASES)
def test_compiled_equals_dense_fp64(name, dim, dtype):
    compare(make_case(**GPU_CASES[name], dim=dim, dtype=dtype), "triton", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "v_dim"), [(192, 128), (24, 64)])
def test_compiled_with_another_width_of_v(dim, v_dim):
    case = make_case(**GPU_CASES["ragged, GQA"], dim=dim, v_dim=v_dim, dtype=torch.bfloat16)
    compare(case, "triton", device="cuda")


@pytest.mark.gpu
def test_compiled_runs_repeat_bitwise():
    case = make_case([300, 20, 75, 130], heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16)
    case = case.to("cuda")
    d_out = torch.randn_like(case.tensors[0])
    first = gradients(run_op("triton"), case, d_out)
    for _ in range(20):
        again = gradients(run_op("triton"), case, d_out)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_compiled_in_a_cuda_graph_follows_new_lengths():
    case = make_case([40, 100, 7], dim=64, dtype=torch.bfloat16, slack=20).to("cuda")
    run_op("triton")(case)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_op("triton")(case)
    other = make_case([90, 20, 37], dim=64, dtype=torch.bfloat16, slack=20)
    assert other.tensors[0].shape == case.tensors[0].shape
    for old, new in zip((*case.tensors, *case.pack), (*other.tensors, *other.pack), strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(out, run_op("triton")(case))


@pytest.mark.parametrize("by_descriptor", [False, True])
def test_a_spoiled_user_spoils_nobody_else(by_descriptor, monkeypatch):
    """Rows past a user's end in its last tile are its neighbour's, who may hold NaN: 0 NaN is NaN.

    Through descriptors they are read; so is it on sm_90, where this runs as `test_spoiled_on_gpu`.
    """
    from userip_fast.kernels import soft_prompt_attention as kernels

    monkeypatch.setattr(kernels, "_descriptors_fit", lambda tensors: by_descriptor)
    spoiled_user("cpu", torch.float32, 8, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "kv_heads", "unkept"),
    [(64, 1, ()), (128, 2, ()), (128, 1, ("dk", "dv")), (256, 2, ("dq",))],  # see the kernels
)
def test_spoiled_on_gpu(dim, kv_heads, unkept):
    spoiled_user("cuda", torch.bfloat16, dim, kv_heads, unkept)


def spoiled_user(device, dtype, dim, kv_heads, unkept=()):
    from userip_fast.kernels import soft_prompt_attention as kernels

    lengths = [21, 18, 37] if device == "cpu" else [90, 75, 130]
    rows, heads, prefix = sum(lengths), 2, 5
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, d_out = made(rows, heads, dim), made(rows, heads, dim)
    k, v = made(rows, kv_heads, dim), made(rows, kv_heads, dim)
    prefix_kv = made(prefix, kv_heads, dim), made(prefix, kv_heads, dim)
    ints = {"dtype": torch.int32, "device": device}
    context = Context(
        *prefix_kv, torch.ones(rows, **ints), torch.full((prefix,), -1, **ints),
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], **ints),
        torch.arange(rows, **ints), torch.arange(prefix, **ints), None, 1, dim**-0.5,
    )  # fmt: skip

    def run():
        out, lse = kernels.forward(q, k, v, context)
        return out, *kernels.backward(d_out, q, k, v, out, lse, context)

    want = run()
    a, b = lengths[0], lengths[0] + lengths[1]
    for x in (q, k, v, d_out):
        x[a:b] = torch.nan
    for name, got, clean in zip(("out", "dq", "dk", "dv"), run(), want, strict=True):
        assert bool(got[a:b].isnan().all()), name
        assert torch.equal(got[b:], clean[b:]), name
        if name not in unkept:
            assert torch.equal(got[:a], clean[:a]), name

import os
from pathlib import Path

import pytest
import torch

from userip_fast.core import _extension
from userip_fast.ops import (
    assign_codes,
    assign_codes_reference,
    assign_codes_with_margin,
    assign_codes_with_stats,
)
from userip_fast.ops.assign_codes import Problem, _assign_codes
from userip_fast.testing import assert_close_to_oracle, poisoned_memory

IMPLS = [
    "reference",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            _extension.why_not() is not None, reason=str(_extension.why_not())
        ),
    ),
    # tests/ops/test_assign_codes_triton.py runs these for the Triton kernels.
]


def oracle_distances(x, c, metric="euclidean"):
    """[N, K] in fp64, every difference formed directly."""
    x, c = x.double(), c.double()
    if metric == "cosine":
        x, c = (torch.nn.functional.normalize(v, dim=1) for v in (x, c))
    return torch.cat([(row - c).square().sum(1)[None] for row in x]) if len(x) else x[:, :0]


def check(x, c, impl, metric="euclidean", active=None):
    """Ids nearest within the rounding of the expanded form; distances, margin and sums right."""
    with poisoned_memory():
        ids, distance, second = assign_codes_with_margin(
            x, c, metric=metric, active=active, impl=impl
        )
        again = assign_codes_with_stats(x, c, metric=metric, active=active, impl=impl)
    assert torch.equal(again[0], ids)
    d = oracle_distances(x, c, metric)
    if active is not None:
        d[:, ~active] = torch.inf
    unit = metric == "cosine"
    x2 = torch.ones(len(x), device=x.device) if unit else x.double().square().sum(1)
    c2 = 1.0 if unit else c.double().square().sum(1).max()
    # The Triton kernels rank bf16 vectors by the codebook rounded to bf16.
    rounded = impl == "triton" and x.dtype == torch.bfloat16 and c.dtype != torch.bfloat16
    eps = torch.finfo(torch.bfloat16 if rounded else torch.float32).eps
    band = 8 * eps * (x2.sqrt() + c2**0.5).square()  # [N]
    best = d.min(1).values
    chosen = d.gather(1, ids[:, None])[:, 0]
    assert ids.dtype == torch.int64
    assert bool((chosen <= best + band).all())
    reference = assign_codes(x, c, metric=metric, active=active, impl="reference")[1]
    for found in (distance, again[1]):
        assert_close_to_oracle(found, chosen, reference, name="sq_distance")
    # Few codes have a kernel of their own on sm_90, whose distance is formed otherwise.
    few = len(c) <= 64 and x.dtype == torch.bfloat16
    if not (few and impl == "triton" and x.is_cuda):
        assert torch.equal(again[1], distance)
    others = d.scatter(1, ids[:, None], torch.inf).min(1).values
    assert bool((second >= distance).all())
    if (c.shape[0] if active is None else int(active.sum())) == 1:
        assert bool(second.isinf().all())
    else:
        assert bool(((second - others).abs() <= band + 1e-5 * others).all())
    one_hot = torch.nn.functional.one_hot(ids, c.shape[0])
    assert torch.equal(again[2], one_hot.sum(0))
    xs = torch.nn.functional.normalize(x.double(), dim=1) if unit else x.double()
    sums = one_hot.double().T @ xs
    assert_close_to_oracle(again[3], sums, (one_hot.float().T @ xs.float()), name="sums")
    return ids, distance


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [1, 7, 72, 100, 257, 600])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 9, 15, 16, 17, 64, 65])
def test_nearest_by_fp64(k, dim, impl):
    for rows in (1, 5, 97):
        check(torch.randn(rows, dim), torch.randn(k, dim), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("rows", "k", "dim"),
    [
        (300, 16, 4096),
        (40, 3, 4097),
        (70, 1025, 33),
        (13, 4096, 65),
        (200, 300, 515),
        (7, 1, 4097),
        (13, 2, 4096),
        (13, 15, 4097),
        (13, 17, 4096),
        (199, 64, 4097),
        (13, 65, 4096),
        (2, 4096, 4097),
        (9, 4096, 1),
        (9, 4096, 7),
        (9, 4096, 72),
        (9, 4096, 100),
    ],
)
def test_nearest_by_fp64_large(rows, k, dim, impl):
    check(torch.randn(rows, dim), torch.randn(k, dim), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [5, 20, 70, 300])
def test_rows_across_blocks(k, impl):
    x, c = torch.randn(2 * 192 + 7, 20), torch.randn(k, 20)
    ids, distance = check(x, c, impl)
    for rows in (191, 192, 193, 384, 390):  # what a row gets does not depend on how many follow
        got = assign_codes(x[:rows], c, impl=impl)
        torch.testing.assert_close(got, (ids[:rows], distance[:rows]), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [5, 16, 130])
def test_low_precision_input_is_ranked_in_fp32(k, dtype, impl):
    x = torch.randn(50, 100).to(dtype)
    check(x, torch.randn(k, 100).to(dtype), impl)
    check(x, torch.randn(k, 100), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [9, 100])
def test_strides_and_offsets(k, impl):
    wide = torch.randn(41, 300)
    c = torch.randn(k, 60)
    for x in (
        wide[3:, 7:67],
        wide[::2, 1:61],
        wide[:, ::5],
        wide[1:37, :41].T[:, 5:6].expand(41, 60),
    ):
        check(x, c, impl)
    wide_c = torch.randn(60, 3 * k)[:, ::3].T
    check(wide[:, :60], wide_c, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [5, 300])
def test_offsets_past_32_bits(k, impl):
    far = torch.empty(2**31 + 8)  # 8 GiB of address space, of which three pages are touched
    x = far.as_strided((3, 7), (2**30, 1))
    x.copy_(torch.randn(3, 7))
    check(x, torch.randn(k, 7), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_does_not_hold_every_distance(impl):
    n, k = 40_000, 4096  # 655 MB of distances
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):
        pytest.skip("the peak of this process's memory cannot be reset here")

    def kib(key):
        return int(next(s for s in status.read_text().splitlines() if s.startswith(key)).split()[1])

    x, c = torch.randn(n, 2), torch.randn(k, 2)
    run = assign_codes_with_margin, assign_codes_with_stats
    for f in run:
        f(x[:100], c, impl=impl)
    clear.write_text("5")  # resets VmHWM
    before = kib("VmRSS")
    for f in run:
        f(x, c, impl=impl)
    limit = 30 if impl == "cpu" else 320  # MiB; the reference works in chunks of 64 MiB
    assert (kib("VmHWM") - before) / 1024 < limit


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [6, 17, 200])
def test_equal_codewords_give_the_lowest_id(k, impl):
    x, half = torch.randn(90, 37), torch.randn(k, 37)
    if impl == "triton":
        # The interpreter multiplies by NumPy, whose rounding depends on the place of a column.
        x, half = (4 * x).round(), (4 * half).round()
    c = torch.cat([half, half, half])[torch.randperm(3 * k)]
    first = (c[:, None] == c[None]).all(2).float().argmax(1)
    ids, distance, second = assign_codes_with_margin(x, c, impl=impl)
    assert torch.equal(first[ids], ids)
    assert torch.equal(distance, second)
    ids, distance = assign_codes(c, c, impl=impl)
    assert torch.equal(ids, first)
    assert bool((distance == 0).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_exact_ties_between_different_codewords(impl):
    x = torch.randint(-4, 5, (200, 3)).float()
    c = torch.randint(-4, 5, (40, 3)).float()  # small integers: all arithmetic is exact
    d = oracle_distances(x, c)
    ids, distance = assign_codes(x, c, impl=impl)
    assert torch.equal(ids, d.argmin(1))
    assert torch.equal(distance.double(), d.min(1).values)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-12, 1e8, 1e17])
def test_norms_far_from_one(scale, impl):
    check(torch.randn(60, 50) * scale, torch.randn(20, 50) * scale, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [3, 16, 70])
def test_cosine(k, impl):
    x = torch.randn(50, 40) * torch.logspace(-5, 5, 50)[:, None]
    check(x, torch.randn(k, 40) * torch.rand(k, 1), impl, metric="cosine")
    x[3] = 0
    _, distance = assign_codes(x, torch.randn(k, 40), metric="cosine", impl=impl)
    assert distance[3] == pytest.approx(1.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [2, 16, 90])
def test_retired_codes_are_never_chosen(k, impl):
    x, c = torch.randn(80, 24), torch.randn(k, 24)
    active = torch.rand(k) < 0.4
    active[k // 2] = True
    ids, _ = check(x, c, impl, active=active)
    assert bool(active[ids].all())


@pytest.mark.parametrize("impl", IMPLS)
def test_many_codebooks_of_different_sizes_in_one_call(impl):
    x = torch.randn(5, 67, 48)
    books = [torch.randn(k, 48) for k in (1, 4, 16, 33, 150)]
    active = [torch.rand(len(c)) < 0.7 for c in books]
    for a in active:
        a[0] = True
    ids, distance, counts, sums = assign_codes_with_stats(x, books, active=active, impl=impl)
    counts, sums = (v.split([len(c) for c in books]) for v in (counts, sums))
    for j, c in enumerate(books):
        one = assign_codes_with_stats(x[j], c, active=active[j], impl=impl)
        torch.testing.assert_close((ids[j], distance[j], counts[j], sums[j]), one, rtol=0, atol=0)
    same = torch.randn(5, 12, 48)
    ids, _, counts, sums = assign_codes_with_stats(x.mT.contiguous().mT, same, impl=impl)
    assert (ids.shape, counts.shape, sums.shape) == ((5, 67), (5, 12), (5, 12, 48))
    assert torch.equal(ids[3], assign_codes(x[3], same[3], impl=impl)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl):
    ids, distance, counts, sums = assign_codes_with_stats(
        torch.empty(0, 8), torch.randn(3, 8), impl=impl
    )
    assert (ids.shape, ids.dtype, distance.shape) == ((0,), torch.int64, (0,))
    assert torch.equal(counts, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(sums, torch.zeros(3, 8))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [4, 16, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_rows_that_are_not_finite_are_refused(bad, k, impl):
    x = torch.randn(60, 30)
    x[41, 17] = bad
    with pytest.raises(ValueError, match=r"x\[0, 41\] holds NaN or Inf.*1 such rows"):
        assign_codes(x, torch.randn(k, 30), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e19])
def test_codewords_that_are_not_finite_are_refused(bad, impl):
    c = torch.randn(5, 30)
    c[4, 2] = bad
    with pytest.raises(ValueError, match=r"codeword 4 .*NaN or Inf"):
        assign_codes(torch.randn(6, 30), c, impl=impl)


def test_float64_stays_float64():
    x, c = torch.randn(20, 9).double(), torch.randn(7, 9).double()
    ids, distance, _, sums = assign_codes_with_stats(x, c)
    d = oracle_distances(x, c)
    assert torch.equal(ids, d.argmin(1))
    torch.testing.assert_close(distance, d.min(1).values)
    assert sums.dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_and_full_graph_compile(impl):
    x, c = torch.randn(2, 11, 8), torch.randn(7, 8)
    for active in (None, torch.tensor([True, False, True, True, True, True, False])):
        for normalize in (False, True):
            for more in ((False, False), (True, True)):
                problem = Problem(x, c, [3, 4], active, normalize, *more)
                torch.library.opcheck(_assign_codes.op, (*problem, True, impl))
    compiled = torch.compile(
        lambda x, c: assign_codes(x, c, impl=impl), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x[0], c), assign_codes(x[0], c, impl=impl))


def test_inputs_that_require_grad_give_plain_outputs():
    x = torch.randn(6, 4, requires_grad=True)
    ids, distance = assign_codes(x, torch.randn(3, 4, requires_grad=True))
    assert not ids.requires_grad
    assert not distance.requires_grad


def test_bad_arguments_are_named():
    x, c = torch.randn(6, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"got x \(6, 4\) and 2 codebooks"):
        assign_codes(x, [c, c])
    with pytest.raises(ValueError, match=r"got x \(2, 6, 4\) and one codebook"):
        assign_codes(x.expand(2, 6, 4), c)
    with pytest.raises(ValueError, match="3 codebooks"):
        assign_codes(x.expand(2, 6, 4), torch.randn(3, 5, 4))
    with pytest.raises(ValueError, match=r"codebook 1 must be \[K, 4\]"):
        assign_codes(x.expand(2, 6, 4), [c, torch.randn(3, 5)])
    with pytest.raises(ValueError, match="K and D at least 1"):
        assign_codes(x, torch.empty(0, 4))
    with pytest.raises(ValueError, match=r"x must be fp32, bf16, fp16 or fp64, is torch.int64"):
        assign_codes(x.long(), c)
    with pytest.raises(ValueError, match=r"codebook 0 must be fp32 or torch.float32"):
        assign_codes(x, c.bfloat16())
    with pytest.raises(ValueError, match="metric='dot' is unknown"):
        assign_codes(x, c, metric="dot")
    with pytest.raises(ValueError, match=r"codebook 0 of 3 codes it is torch.float32"):
        assign_codes(x, c, active=torch.ones(3))
    with pytest.raises(ValueError, match="codebook 1 of 3 codes it is missing"):
        assign_codes(x.expand(2, 6, 4), [c, c], active=[torch.ones(3, dtype=torch.bool)])
    with pytest.raises(ValueError, match="retires all 3 codes of codebook 0"):
        assign_codes(x, c, active=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="impl='nope' is unknown"):
        assign_codes(x, c, impl="nope")


@pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not()))
def test_every_instruction_set_of_this_processor():
    from userip_fast.ops._assign_codes_cpu import assign_codes as on_cpu

    names = _extension.load().instruction_sets()["assign_codes"]
    assert names[0] == "baseline"
    for name in names:
        for k in (1, 7, 16, 40, 300):
            x, c = torch.randn(1, 70, 90), torch.randn(k, 90)
            problem = Problem(x, c, [k], need_second=True, need_stats=True)
            out, want = on_cpu(problem, name), assign_codes_reference(*problem)
            assert torch.equal(out[0], want[0]), name
            torch.testing.assert_close(out[1:], want[1:])
    with pytest.raises(ValueError, match="instruction_sets"):
        on_cpu(problem, "mmx")


@pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not()))
@pytest.mark.parametrize("k", [3, 20, 90])
def test_cpu_results_do_not_depend_on_threads_or_neighbours(k):
    x, c = torch.randn(5000, 40), torch.randn(k, 40)
    threads = torch.get_num_threads()
    try:
        outs = []
        for t in (1, 2, 5):
            torch.set_num_threads(t)
            outs.append(assign_codes_with_stats(x, c, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
    torch.testing.assert_close(outs[2], outs[0], rtol=0, atol=0)
    alone = assign_codes(x[1234:1237], c, impl="cpu")
    torch.testing.assert_close(
        alone, (outs[0][0][1234:1237], outs[0][1][1234:1237]), rtol=0, atol=0
    )


@pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not()))
@pytest.mark.parametrize("k", [3, 16, 40, 100])
@pytest.mark.parametrize("dim", [700, 1100, 3000])
def test_cpu_results_of_wide_rows_do_not_depend_on_how_they_are_read(k, dim):
    """In place or copied, in one run of memory or not: pieces of columns end elsewhere."""
    x, c = torch.randn(31, dim), torch.randn(k, dim)
    together = assign_codes(x, c, impl="cpu")
    apart = torch.full((31, dim + 24), float("nan"))[:, :dim].copy_(x)
    torch.testing.assert_close(assign_codes(apart, c, impl="cpu"), together, rtol=0, atol=0)
    one_by_one = [assign_codes(row[None], c, impl="cpu") for row in x]
    joined = tuple(torch.cat(part) for part in zip(*one_by_one, strict=True))
    torch.testing.assert_close(joined, together, rtol=0, atol=0)


@pytest.mark.skipif(_extension.why_not() is not None, reason=str(_extension.why_not()))
@pytest.mark.parametrize("k", [2, 70])
def test_cpu_sums_of_many_rows_stay_accurate(k):
    x = torch.rand(50_000, 16) + 1  # one sign: naive fp32 summation drifts
    c = torch.full((k, 16), 100.0)
    c[k - 1] = 1.5
    counts, sums = assign_codes_with_stats(x, c, impl="cpu")[2:]
    assert int(counts[k - 1]) == 50_000
    torch.testing.assert_close(sums[k - 1].double(), x.double().sum(0), rtol=1e-5, atol=0)


def test_what_was_removed_says_so():
    with pytest.raises(ValueError, match="removed, being slower"):
        assign_codes(torch.randn(3, 4), torch.randn(2, 4), impl="cuda")

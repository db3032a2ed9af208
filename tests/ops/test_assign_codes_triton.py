"""The Triton kernels: in the interpreter with small tiles here, compiled on a GPU under `gpu`."""

import pytest
import torch

pytest.importorskip("triton")

import test_assign_codes as shared
from userip_fast.kernels import assign_codes as kernel
from userip_fast.kernels import assign_codes_many as many

from userip_fast import ops
from userip_fast.core.errors import UnavailableError
from userip_fast.ops import assign_codes, assign_codes_with_stats
from userip_fast.ops.assign_codes import Problem, assign_codes_reference

ON_GPU = torch.cuda.is_available()


@pytest.fixture
def _small_tiles(monkeypatch):
    monkeypatch.setattr(many, "TF32", many.Config(32, 32, 32, 4, 2))


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("tma", "slices"), [(False, None), (True, None), (False, 3)])
@pytest.mark.parametrize(
    ("rows", "k", "dim"),
    [(1, 1, 4), (32, 32, 32), (33, 31, 36), (3, 65, 68), (2, 33, 516), (40, 200, 8)],
)
def test_nearest_across_tiles(rows, k, dim, tma, slices):
    x, c = torch.randn(2, rows, dim), torch.randn(k + 3, dim)
    active = torch.rand(k + 3) < 0.8
    active[0] = active[k] = True
    for normalize in (False, True):
        args = Problem(x, c, [k, 3], active, normalize, True, True)
        got = kernel.assign_codes(args, tma=tma, slices=slices).out
        want = assign_codes_reference(*args)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[3], want[3])
        torch.testing.assert_close(got[1:], want[1:])


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("k", [2, 17, 40])
def test_semantics(k):
    shared.check(torch.randn(40, 20, 2).half()[::2, :, 1], torch.randn(k, 20), "triton")
    shared.test_equal_codewords_give_the_lowest_id(k, "triton")
    shared.test_retired_codes_are_never_chosen(k, "triton")
    shared.test_cosine(k, "triton")


@pytest.mark.usefixtures("_small_tiles")
def test_more_semantics():
    shared.test_exact_ties_between_different_codewords("triton")
    shared.test_many_codebooks_of_different_sizes_in_one_call("triton")
    shared.test_empty("triton")
    for value in (float("inf"), 3e38):  # NumPy's maximum, used by the interpreter, stops at NaN
        shared.test_rows_that_are_not_finite_are_refused(value, 20, "triton")
    shared.test_norms_far_from_one(1e17, "triton")


@pytest.mark.parametrize(
    ("tma", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.float16)]
)
@pytest.mark.parametrize(
    ("rows", "k", "dim"),
    [(1, 1, 4), (16, 16, 32), (37, 31, 36), (100, 3, 256), (33, 64, 260), (50, 17, 516)],
)
def test_few_codes_in_one_read(rows, k, dim, tma, dtype):
    """Codewords twice, or at x, where the distance has to be formed directly; in three parts."""
    x, c = torch.randn(1, rows, dim).to(dtype), torch.randn(k, dim)
    active = torch.rand(k) < 0.8
    active[k - 1] = True
    for words in (c, torch.cat([c, c])[torch.randperm(2 * k)][:k], x[0, torch.arange(k) % rows]):
        for mask in (None, active):
            args = Problem(x, words, [k], mask, need_stats=True)
            got = kernel.assign_codes(args, tma=tma, few=True).out
            want = assign_codes_reference(*args)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[3], want[3])
            torch.testing.assert_close(got[1:], want[1:])


@pytest.mark.parametrize(
    ("rows", "dim", "dtype"),
    [(700, 5, torch.float32), (2500, 130, torch.float16)],  # in pieces; by one-hot rows, in shares
)
def test_sums_of_many_rows(rows, dim, dtype):
    x, c = torch.randn(rows, dim).to(dtype), torch.randn(2, dim)
    ids, _, counts, sums = assign_codes_with_stats(x, c, impl="triton")
    assert torch.equal(counts, torch.bincount(ids, minlength=2))
    want = torch.zeros(2, dim).index_add(0, ids, x.float())
    torch.testing.assert_close(sums, want, rtol=1e-5, atol=1e-4)
    again = assign_codes_with_stats(x, c, impl="triton")[3]
    assert torch.equal(sums, again)


@pytest.mark.skipif(ON_GPU, reason="for the interpreter")
def test_the_interpreter_refuses_bfloat16():
    x = torch.randn(4, 8).bfloat16()
    with pytest.raises(UnavailableError, match="interpreter cannot multiply bfloat16"):
        assign_codes(x, x, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "k", "dim"), [(1000, 1024, 4096), (777, 4099, 257), (4097, 100, 72), (300, 300, 4097)]
)
def test_on_gpu(rows, k, dim, dtype):
    x, c = (torch.randn(n, dim, device="cuda").to(dtype) for n in (rows, k))
    shared.check(x, c, "triton")


@pytest.mark.gpu
def test_on_gpu_repeats_bitwise_and_ignores_neighbours():
    x, c = torch.randn(5000, 512, device="cuda").bfloat16(), torch.randn(2000, 512, device="cuda")
    first = assign_codes_with_stats(x, c, impl="triton")
    for _ in range(20):
        again = assign_codes_with_stats(x, c, impl="triton")
        torch.testing.assert_close(again, first, rtol=0, atol=0)
    alone = assign_codes(x[1001:1004], c, impl="triton")
    torch.testing.assert_close(alone, (first[0][1001:1004], first[1][1001:1004]), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 64])
@pytest.mark.parametrize("dim", [8, 72, 256, 1000, 4096])
def test_few_codes_on_gpu(dim, k):
    for rows in (1, 63, 64, 65, 5000):
        x, c = torch.randn(rows, dim, device="cuda").bfloat16(), torch.randn(k, dim, device="cuda")
        for words in (c, c.bfloat16()):
            shared.check(x, words, "triton")
    active = torch.rand(k, device="cuda") < 0.5
    active[k - 1] = True
    shared.check(x, c, "triton", active=active)
    near = torch.cat([c, c])[torch.randint(2 * k, (3000,), device="cuda")].bfloat16()
    shared.check(near, torch.cat([c, c])[:k], "triton")
    wide = torch.randn(300, dim + 16, device="cuda").bfloat16()
    for first in (0, 8, 3):  # the last is not aligned
        shared.check(wide[1:, first : first + dim], c, "triton")


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dim", [256, 1032])
def test_few_codes_on_gpu_repeat_bitwise(dim):
    x, c = torch.randn(70_000, dim, device="cuda").bfloat16(), torch.randn(16, dim, device="cuda")
    first = assign_codes_with_stats(x, c, impl="triton")
    for _ in range(10):
        again = assign_codes_with_stats(x, c, impl="triton")
        torch.testing.assert_close(again, first, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [264, 1032, 4096])
def test_few_codes_in_parts_read_no_row_that_is_being_replaced(dim):
    """Were x's buffer refilled while a product still reads it, a row would get another's code now
    and then: so many tiles, and again and again. Codewords in bf16 are a kernel of their own."""
    x = torch.randn(40_000, dim, device="cuda").bfloat16()
    c = torch.randn(16, dim, device="cuda").bfloat16()
    ids, distance = shared.check(x, c, "triton")
    for _ in range(20):
        again = assign_codes(x, c, impl="triton")
        assert torch.equal(again[0], ids)
        torch.testing.assert_close(again[1], distance, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [2, 40])
def test_sums_of_many_rows_on_gpu_stay_accurate(k):
    x = (torch.rand(2_000_000, 64, device="cuda") + 1).bfloat16()  # one sign: truncation drifts
    c = torch.full((k, 64), 100.0, device="cuda")
    c[k - 1] = 1.5
    counts, sums = assign_codes_with_stats(x, c, impl="triton")[2:]
    assert int(counts[k - 1]) == len(x)
    torch.testing.assert_close(sums[k - 1].double(), x.double().sum(0), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 3e38])
def test_on_gpu_rows_that_are_not_finite_are_refused(bad, k, dtype):
    x, c = (torch.randn(n, 32, device="cuda").to(dtype) for n in (60, k))
    x[41, 17] = bad
    with pytest.raises(ValueError, match=r"x\[0, 41\] holds NaN or Inf.*1 such rows"):
        assign_codes(x, c, impl="triton")


@pytest.mark.gpu
def test_offsets_past_32_bits():
    x = torch.zeros(1 << 19, 4160, device="cuda", dtype=torch.bfloat16)  # 2.2e9 elements
    c = torch.randn(70, 4160, device="cuda").bfloat16()
    x[-70:] = c
    ids, distance = assign_codes(x, c, impl="triton")
    assert torch.equal(ids[-70:], torch.arange(70, device="cuda"))
    assert float(distance[-70:].max()) == 0.0


def test_the_packed_best_two_are_the_best_two_to_within_their_lost_bits():
    """Of bf16 vectors only, which the interpreter cannot multiply: the reduction by itself."""
    import triton
    import triton.language as tl

    @triton.jit
    def both(score_ptr, out_ptr, at_ptr, ROWS: tl.constexpr, K: tl.constexpr):
        k, n = tl.arange(0, K), tl.arange(0, ROWS)
        score = tl.load(score_ptr + n[:, None] * K + k[None, :])
        top, at, second, second_at = many._packed_top_two(score, k, K)
        tl.store(out_ptr + n, top)
        tl.store(out_ptr + ROWS + n, second)
        tl.store(at_ptr + n, at)
        tl.store(at_ptr + ROWS + n, second_at)

    score = torch.randn(16, 32) * torch.logspace(-20, 20, 16)[:, None]
    score[1] = -score[1].abs()  # all below zero
    score[2] = 0.5  # all equal: the lowest columns
    score[3, 4:] = -torch.inf  # retired
    score[4, 1:] = -torch.inf
    score[5, 9] = score[5, 20] = score[5].max() + 1
    out, at = torch.empty(2, 16), torch.empty(2, 16, dtype=torch.int32)
    both[(1,)](score, out, at, ROWS=16, K=32)
    want, place = score.sort(dim=1, descending=True, stable=True)
    finite = want[:, :2].T.isfinite()
    torch.testing.assert_close(out[finite], want[:, :2].T[finite], rtol=2.0**-18, atol=0)
    assert bool((out[~finite] == -torch.inf).all())
    near = want[:, 0] - want[:, 1] <= 2.0**-17 * want[:, 0].abs()
    assert torch.equal(at[0].long()[~near], place[:, 0][~near])
    assert at[:, 2].tolist() == [0, 1]
    assert at[:, 5].tolist() == [9, 20]
    picked = score.gather(1, at.T.long()).T
    torch.testing.assert_close(picked, want[:, :2].T, rtol=2.0**-17, atol=0)


def test_ids_alone_and_one_look_at_the_flags(monkeypatch):
    x, c = torch.randn(1, 37, 40), torch.randn(20, 40)
    looks = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: looks.append(t.shape) or plain(t))
    for few in (False, True):
        found = kernel.assign_codes(Problem(x, c, [20]), tma=False, few=few, need_distance=False)
        assert found.usable()
        assert torch.equal(found.out[0], assign_codes_reference(x, c, [20])[0])
        assert found.out[1].shape == (1, 0)
    assert looks == [(4,), (4,)]
    monkeypatch.undo()
    for spoil, what in ((x, "x"), (c, "codeword")):
        kept = spoil.flatten()[7].item()
        spoil.view(-1)[7] = torch.inf  # NaN in all of a row is too much for the interpreter
        for few in (False, True):
            found = kernel.assign_codes(
                Problem(x, c, [20]), tma=False, few=few, need_distance=False
            )
            assert not found.usable(), what
        spoil.view(-1)[7] = kept
    ids = ops.assign_code_ids(x[0], c, impl="triton")
    assert torch.equal(ids, ops.assign_codes(x[0], c, impl="reference")[0])
    spoilt = x[0].clone()
    spoilt[3, 0] = torch.inf
    with pytest.raises(ValueError, match=r"x\[0, 3\] holds NaN"):
        ops.assign_code_ids(spoilt, c, impl="triton")

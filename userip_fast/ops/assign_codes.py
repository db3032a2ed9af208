"""Nearest codeword of each vector, for J codebooks in one call, never an N x K matrix.

    code_ids[n] = argmin_k |x_n - c_k|^2        (ties to the lowest id)

The fast implementations rank codewords by x.c - |c|^2 / 2 (|x|^2 is the same for all), keep the
best two, and decide between those by their distance computed directly, so that the rounding of the
expanded form cannot flip a near tie between them and `sq_distance` is exactly 0 on a codeword.
Counts and sums per code (for k-means and EMA) come from the same call. Nothing here is summed by
atomics or depends on the number of threads: results are bitwise repeatable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from userip_fast.core import _extension
from userip_fast.ops import _triton
from userip_fast.ops._dispatch import by_device, resolve
from userip_fast.ops._operator import flat, operator

_CHUNK_BYTES = 64 << 20  # the reference's distance matrix for one chunk of rows
_MAX_SQ_NORM = 1e37  # of a codeword: then x.c overflows float32 only where |x - c|^2 does too

Assignment = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""code_ids, sq_distance, second_sq_distance (all [J, N]), counts [sum K], sums [sum K, D]."""


class Problem(NamedTuple):
    """What is asked of an implementation.

    Args:
        x: [J, N, D].
        codewords: [sum K, D], the J codebooks one after the other.
        sizes: K of each codebook.
        active: [sum K] bool or None; a code that is False is never chosen.
        normalize: Cosine: rows of `x` and codewords are scaled to length 1 first (0 stays 0).
        need_second: Without it second_sq_distance is empty.
        need_stats: Without it counts and sums are empty.
    """

    x: Tensor
    codewords: Tensor
    sizes: Sequence[int]
    active: Tensor | None = None
    normalize: bool = False
    need_second: bool = False
    need_stats: bool = False


def reference(problem: Problem) -> Assignment:
    """The oracle: every distance computed directly, in float32 (float64 for float64 input).

    Rows that are not finite have code id -1. See `Problem` and `Assignment`.
    """
    x, codewords, sizes, active, normalize, need_second, need_stats = problem
    books, rows, dim = x.shape
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = codewords.shape[0] if need_stats else 0
    code_ids = x.new_empty((books, rows), dtype=torch.int64)
    distance = x.new_empty((books, rows), dtype=acc)
    second = torch.empty_like(distance if need_second else distance[:, :0])
    counts = x.new_zeros(total, dtype=torch.int64)
    sums = x.new_zeros((total, dim), dtype=torch.float64)
    step = max(1, _CHUNK_BYTES // (4 * max(dim, *sizes)))
    first = 0
    for j, size in enumerate(sizes):
        book = slice(first, first + size)
        c = codewords[book].to(acc)
        c = torch.nn.functional.normalize(c, dim=1) if normalize else c
        for n in range(0, rows, step):
            part = slice(n, n + step)
            xs = x[j, part].to(acc)
            xs = torch.nn.functional.normalize(xs, dim=1) if normalize else xs
            d = torch.cdist(xs, c, compute_mode="donot_use_mm_for_euclid_dist")
            if active is not None:
                d[:, ~active[book]] = torch.inf
            ids = d.argmin(1)  # the first of equals
            distance[j, part] = near = (xs - c[ids]).square().sum(1)
            code_ids[j, part] = torch.where(near.isfinite(), ids, -1)
            if need_second:
                least, other = d.scatter_(1, ids.unsqueeze(1), torch.inf).min(1)
                far = torch.maximum(near, (xs - c[other]).square().sum(1))
                second[j, part] = torch.where(least.isinf(), least, far)
            if need_stats:
                counts[book] += torch.bincount(ids, minlength=size)
                sums[book].index_add_(0, ids, xs.double())
        first += size
    return code_ids, distance, second, counts, sums.to(acc)


assign_codes_reference = flat(reference)


def _why_not_cpu(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if x.dtype == torch.float64:
        return "float64 is for the reference only"
    return _extension.why_not()


def _why_not_triton(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "float64 is for the reference only"
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16"
    return _triton.why_not(x)


def _resolve(impl: str, x: Tensor) -> str:
    if impl == "cuda":
        raise ValueError(
            "assign_codes: impl='cuda' was removed, being slower than Triton's; use 'auto'"
        )
    found = by_device(x, cpu=lambda: _why_not_cpu(x), triton=lambda: _why_not_triton(x))
    return resolve("assign_codes", impl, found)


def _of_reference(problem: Problem, need_distance: bool) -> Assignment:
    return _checked(reference, problem, need_distance)


def _fake(problem: Problem, need_distance: bool, impl: str) -> Assignment:
    x, rows = problem.x, problem.x.shape[1]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = problem.codewords.shape[0] if problem.need_stats else 0
    return (
        x.new_empty(x.shape[:2], dtype=torch.int64),
        x.new_empty((x.shape[0], rows if need_distance else 0), dtype=acc),
        x.new_empty((x.shape[0], rows if problem.need_second else 0), dtype=acc),
        x.new_empty(total, dtype=torch.int64),
        x.new_empty((total, x.shape[2]), dtype=acc),
    )


@operator("assign_codes", _of_reference, fake=_fake)
def _assign_codes(problem: Problem, need_distance: bool, impl: str) -> Assignment:
    chosen = _resolve(impl, problem.x)  # in here, where torch.compile does not look
    if chosen == "reference":
        return _of_reference(problem, need_distance)
    if chosen == "cpu":
        from userip_fast.ops import _assign_codes_cpu

        return _checked(_assign_codes_cpu.assign_codes, problem, need_distance)
    from userip_fast.kernels import assign_codes as kernels

    found = kernels.assign_codes(problem, need_distance=need_distance)
    if found.usable():  # a device is waited for once
        return found.out
    _refuse_codewords(*_norms(problem.codewords))
    if not need_distance:  # scores overflow before distances do
        found = kernels.assign_codes(problem)
        if found.usable():
            return _without_distance(found.out)
    raise _bad_rows(found.out[0])


def _checked(
    run: Callable[[Problem], Assignment], problem: Problem, need_distance: bool
) -> Assignment:
    sq_norm, good = _norms(problem.codewords)
    if problem.x.device.type == "cpu":
        _refuse_codewords(sq_norm, good)
    out = run(problem)
    # One look at N distances, not a second read of x. NaN is the greatest.
    largest = out[1].amax() if out[1].numel() else out[1].new_zeros(())
    if bool(good & (largest < torch.inf)):
        return out if need_distance else _without_distance(out)
    _refuse_codewords(sq_norm, good)
    raise _bad_rows(out[0])


def _without_distance(out: Assignment) -> Assignment:
    return (out[0], out[1][:, :0].clone(), *out[2:])


def _norms(codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms, and whether all are small enough."""
    # In fp32 too large becomes Inf and is refused too; fp64 would copy the codebook.
    wide = torch.promote_types(codewords.dtype, torch.float32)
    sq_norm = torch.linalg.vector_norm(codewords, dim=1, dtype=wide).square()
    return sq_norm, (sq_norm <= _MAX_SQ_NORM).all()


def _bad_rows(ids: Tensor) -> ValueError:
    bad = (ids < 0).nonzero()
    j, n = bad[0].tolist()
    return ValueError(
        f"assign_codes: x[{j}, {n}] holds NaN or Inf, or its squared distance overflows "
        f"float32 ({len(bad)} such rows); drop or repair them before quantising"
    )


def _refuse_codewords(sq_norm: Tensor, good: Tensor) -> None:
    if bool(good):
        return
    k = int((~(sq_norm <= _MAX_SQ_NORM)).nonzero()[0])
    raise ValueError(
        f"assign_codes: codeword {k} (counted over all books) holds NaN or Inf, or its squared "
        f"norm {float(sq_norm[k])} is over {_MAX_SQ_NORM}; repair it or scale the data down"
    )


def assign_codes(
    x: Tensor,
    codebook: Tensor | Sequence[Tensor],
    *,
    metric: str = "euclidean",
    active: Tensor | Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The nearest codeword of each vector.

    Args:
        x: [N, D] with one codebook, or [J, N, D] with J of them; fp32, bf16, fp16 or fp64, any
            strides. Not differentiable.
        codebook: [K, D]; or [J, K, D]; or J tensors [K_j, D] of different sizes. fp32 or as `x`.
        metric: "euclidean"; or "cosine", which scales vectors and codewords to length 1 first (a
            zero vector stays zero), so that `sq_distance` is 2 - 2 cos.
        active: bool, as `codebook` without D; codes that are False are retired: never chosen.
        impl: "auto", "cpu" (C++), "triton" or "reference".

    Returns:
        code_ids: [N] or [J, N] int64, position in its codebook; of equally near ones the lowest.
        sq_distance: Same shape, fp32 (fp64 for fp64 input), |x - codeword|^2.

    Raises:
        ValueError: A shape, dtype or argument breaks the rules above; `x` or `codebook` holds NaN
            or Inf, or squared distances overflow float32.
        UnavailableError: `impl` was asked for by name and cannot run this call.
    """
    ids, distance, _, _, _ = _run(x, codebook, metric, active, impl)
    return ids, distance


def assign_code_ids(
    x: Tensor,
    codebook: Tensor | Sequence[Tensor],
    *,
    metric: str = "euclidean",
    active: Tensor | Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """The ids of `assign_codes` alone, which on a GPU is less work.

    There codes are ranked by scores alone: of codewords whose distances differ by less than the
    rounding of a score (of bf16 vectors and more than 64 codes: of a codeword to bf16) any may be
    named, of equal ones the lowest. Elsewhere the ids are those of `assign_codes`.

    Args:
        x, codebook, metric, active, impl: As `assign_codes`.

    Returns:
        code_ids: [N] or [J, N] int64.

    Raises:
        ValueError: As `assign_codes`, but for distances that overflow and scores that do not.
        UnavailableError: `impl` was asked for by name and cannot run this call.
    """
    return _run(x, codebook, metric, active, impl, need_distance=False)[0]


def assign_codes_with_margin(
    x: Tensor,
    codebook: Tensor | Sequence[Tensor],
    *,
    metric: str = "euclidean",
    active: Tensor | Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`assign_codes`, and the squared distance to the second nearest code.

    Returns:
        code_ids, sq_distance: As `assign_codes`.
        second_sq_distance: Same shape; at least `sq_distance` (equal for duplicated codewords), Inf
            where only one code is active.
    """
    ids, distance, second, _, _ = _run(x, codebook, metric, active, impl, need_second=True)
    return ids, distance, second


def assign_codes_with_stats(
    x: Tensor,
    codebook: Tensor | Sequence[Tensor],
    *,
    metric: str = "euclidean",
    active: Tensor | Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`assign_codes`, and what k-means or EMA needs from the same read of `x`.

    Returns:
        code_ids, sq_distance: As `assign_codes`.
        counts: int64, vectors per code: [K], [J, K], or [sum K_j] where `codebook` is a sequence.
        sums: fp32 (fp64 for fp64 input), the sum of those vectors (scaled to length 1 for
            "cosine"): [K, D], [J, K, D] or [sum K_j, D].
    """
    ids, distance, _, counts, sums = _run(x, codebook, metric, active, impl, need_stats=True)
    if isinstance(codebook, Tensor):
        counts, sums = counts.view(codebook.shape[:-1]), sums.view(codebook.shape)
    return ids, distance, counts, sums


def _run(
    x: Tensor,
    codebook: Tensor | Sequence[Tensor],
    metric: str,
    active: Tensor | Sequence[Tensor] | None,
    impl: str,
    need_second: bool = False,
    need_stats: bool = False,
    need_distance: bool = True,
) -> Assignment:
    """Checks, and brings everything to the op's layout."""
    books = [codebook] if isinstance(codebook, Tensor) and codebook.dim() == 2 else codebook
    one = books is not codebook
    if x.dim() != (2 if one else 3) or (not one and x.shape[0] != len(books)) or not len(books):
        raise ValueError(
            f"assign_codes: x must be [N, D] with a codebook [K, D], or [J, N, D] with J of them; "
            f"got x {tuple(x.shape)} and {'one codebook' if one else f'{len(books)} codebooks'}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            f"assign_codes: x must be fp32, bf16, fp16 or fp64, is {x.dtype}; cast it first"
        )
    for j, c in enumerate(books):
        if c.dim() != 2 or c.shape[0] == 0 or c.shape[1] == 0 or c.shape[1] != x.shape[-1]:
            raise ValueError(
                f"assign_codes: codebook {j} must be [K, {x.shape[-1]}] as x is {tuple(x.shape)}, "
                f"with K and D at least 1; got {tuple(c.shape)}"
            )
        if c.dtype not in (x.dtype, torch.float32) or c.device != x.device:
            raise ValueError(
                f"assign_codes: codebook {j} must be fp32 or {x.dtype} on {x.device} as x is, got "
                f"{c.dtype} on {c.device}"
            )
    if metric not in ("euclidean", "cosine"):
        raise ValueError(
            f"assign_codes: metric={metric!r} is unknown; choose 'euclidean' or 'cosine'"
        )
    sizes = [c.shape[0] for c in books]
    mask = None
    if active is not None:
        masks = [active] if one and isinstance(active, Tensor) else active
        for j, size in enumerate(sizes):
            a = masks[j] if j < len(masks) else None
            if a is None or a.shape != (size,) or a.dtype != torch.bool or a.device != x.device:
                raise ValueError(
                    f"assign_codes: active must be bool [K] on {x.device} for each codebook; for "
                    f"codebook {j} of {size} codes it is "
                    f"{'missing' if a is None else f'{a.dtype} {tuple(a.shape)} on {a.device}'}"
                )
            if not bool(a.any()):
                raise ValueError(
                    f"assign_codes: active retires all {size} codes of codebook {j}; keep one"
                )
        mask = torch.cat(list(masks))
    whole = isinstance(codebook, Tensor)
    words = codebook.reshape(-1, x.shape[-1]) if whole else torch.cat(list(books))  # type: ignore[union-attr]
    problem = Problem(
        (x.unsqueeze(0) if one else x).detach(), words.detach(), sizes, mask, metric == "cosine",
        need_second, need_stats,
    )  # fmt: skip
    ids, distance, second, counts, sums = _assign_codes(problem, need_distance, impl)
    if one:
        ids, distance, second = ids[0], distance[0], second[0]
    return ids, distance, second, counts, sums

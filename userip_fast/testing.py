"""How kernels are judged: error against fp64 bounded by what the same maths costs in low precision.

Shipped, so that a user can check a kernel on a machine of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_close_to_oracle(
    got: Tensor,
    oracle: Tensor,
    low_precision: Tensor,
    *,
    ulps: float = 4.0,
    name: str = "output",
) -> None:
    """Asserts `|got - oracle| <= 2 * max|low_precision - oracle| + ulps * eps * max|oracle|`.

    Args:
        got: Result of the implementation under test.
        oracle: The same, computed in float64.
        low_precision: The plain PyTorch reference in `got`'s dtype; its own error sets the budget.
        ulps: Width of the rounding band, in eps of `got`'s dtype at the oracle's largest magnitude.

    Raises:
        AssertionError: Shapes or dtypes differ, `got` is not finite, or the budget is exceeded.
    """
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, is {oracle.dtype}"
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)} != {tuple(oracle.shape)}"
    assert got.dtype == low_precision.dtype, f"{name}: dtype {got.dtype} != {low_precision.dtype}"
    if got.numel() == 0:
        return
    assert bool(torch.isfinite(got).all()), f"{name}: not finite"
    error = (got.double() - oracle).abs().max().item()
    reference_error = (low_precision.double() - oracle).abs().max().item()
    band = ulps * torch.finfo(got.dtype).eps * oracle.abs().max().item()
    budget = 2 * reference_error + band
    assert error <= budget, (
        f"{name}: max error {error:.3e} over the budget {budget:.3e} "
        f"(reference error {reference_error:.3e}, rounding band {band:.3e})"
    )


class _Poison(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills what `empty` and its kin return, so that an unwritten output cannot pass a test."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in (
            "empty",
            "empty_like",
            "new_empty",
            "empty_strided",
            "new_empty_strided",
        ):
            poison_(out)
        return out


def poison_(x: Tensor) -> Tensor:
    """Fills `x` with NaN (floats) or a value far out of any range (integers), in place."""
    if x.is_floating_point():
        return x.fill_(float("nan"))
    if x.dtype == torch.bool:
        return x
    return x.fill_(torch.iinfo(x.dtype).max)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, freshly allocated tensors are full of NaN instead of whatever lay there."""
    with _Poison():  # type: ignore[no-untyped-call]
        yield


def peak_bytes(run: Callable[[], Any], device: torch.device | str) -> int:
    """Tensor memory that one call holds at its worst moment, its result included."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

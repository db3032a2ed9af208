"""Users' posteriors over codes from a table of what each kind of event says of each code.

    joint[u, z]    = log_prior[z] + sum_n weights[n] table[kinds[n], z],  n from offsets[u] to
                                                                          offsets[u + 1]
    evidence[u]    = log sum_z exp joint[u, z]
    log_resp[u, z] = joint[u, z] - evidence[u]

A gather, a sum and a softmax: the E-step of all users, once the LM has read the kinds. Sums are in
fp64 (on CPU a few events at a time in fp32), so that histories of thousands of events lose nothing,
and in an order of the user's own: neither threads, nor its place, nor who else is asked for, change
a bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.ops import _triton
from userip_fast.ops._dispatch import WhyNot, by_device, extension, resolve, why_not_cpu
from userip_fast.ops._operator import operator

_TRITON_CODES = 8192  # a program holds all codes of its users


def profile_posterior_reference(
    table: Tensor, kinds: Tensor, offsets: Tensor, log_prior: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The oracle, for `table` in any precision."""
    sums = F.embedding_bag(
        kinds,
        table.double(),
        offsets,
        mode="sum",
        per_sample_weights=None if weights is None else weights.double(),
        include_last_offset=True,
    )
    joint = sums + log_prior.double()
    evidence = joint.logsumexp(1)
    return (joint - evidence[:, None]).to(table.dtype), evidence


def _results(table: Tensor, kinds: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """log_resp and evidence, to be written."""
    users = offsets.shape[0] - 1
    log_resp = table.new_empty(users, table.shape[1])
    return log_resp, table.new_empty(users, dtype=torch.float64)


@operator("profile_posterior", profile_posterior_reference, fake=_results)
def _profile_posterior(*args: Any) -> tuple[Tensor, Tensor]:
    table, kinds, offsets, log_prior, weights, impl = args
    out, prior = _results(table, kinds, offsets), log_prior.double()
    if impl == "triton":
        from userip_fast.kernels import profile_posterior as kernel

        kernel.profile_posterior(table, kinds, offsets, prior, weights, *out)
    else:
        events, users = (kinds, weights, len(kinds)), (offsets, len(offsets) - 1)
        extension("profile_posterior", table, *table.shape, *events, *users, prior, *out)
    return out


def _candidates(table: Tensor) -> dict[str, WhyNot]:
    def triton() -> str | None:
        if table.shape[1] > _TRITON_CODES:
            return f"table has {table.shape[1]} codes, more than {_TRITON_CODES}"
        return _triton.why_not(table)

    return by_device(table, lambda: why_not_cpu(table, "profile_posterior"), triton=triton)


def profile_posterior(
    table: Tensor,
    kinds: Tensor,
    offsets: Tensor,
    log_prior: Tensor,
    weights: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log responsibilities and evidence of U users over Z codes.

    Args:
        table: [E, Z] fp32, contiguous; log p(event of this kind | code), finite.
        kinds: [N] int64, contiguous; rows of `table`, the users' events one user after another.
        offsets: [U + 1] int64, contiguous, ascending from 0 to N; user u has events
            `offsets[u]:offsets[u + 1]`, maybe none: then its posterior is the prior.
        log_prior: [Z] floating, contiguous; -inf takes a code out, but not all of them.
        weights: [N] fp32, contiguous; how often an event counts. None for once.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        log_resp [U, Z] fp32 and evidence [U] fp64, in nats. With a prior that sums to one the
        evidence is log p(the user's events).

    Raises:
        ValueError: A shape, dtype, layout or value breaks the rules above. On CUDA offsets and
            kinds are the caller's promise, since a check would wait for the device.
        UnavailableError: `impl` was asked for by name and cannot run this call.
    """
    if table.dim() != 2 or table.shape[1] == 0 or table.dtype != torch.float32:
        raise ValueError(
            f"profile_posterior: table must be float32 [E, Z] with at least one code, got "
            f"{table.dtype} {tuple(table.shape)}"
        )
    for name, t in (("kinds", kinds), ("offsets", offsets)):
        if t.dim() != 1 or t.dtype != torch.int64:
            raise ValueError(
                f"profile_posterior: {name} must be int64 of one axis, got {t.dtype} "
                f"{tuple(t.shape)}"
            )
    if len(offsets) == 0:
        raise ValueError("profile_posterior: offsets must have one entry more than users, is empty")
    if log_prior.shape != table.shape[1:] or not log_prior.is_floating_point():
        raise ValueError(
            f"profile_posterior: log_prior must be floating [{table.shape[1]}], got "
            f"{log_prior.dtype} {tuple(log_prior.shape)}"
        )
    if weights is not None and (weights.shape != kinds.shape or weights.dtype != torch.float32):
        raise ValueError(
            f"profile_posterior: weights must be float32 [{len(kinds)}] like kinds, got "
            f"{weights.dtype} {tuple(weights.shape)}"
        )
    tensors = {"table": table, "kinds": kinds, "offsets": offsets, "log_prior": log_prior}
    for name, x in {**tensors, "weights": weights}.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(
                f"profile_posterior: {name} must be contiguous, has strides {x.stride()}"
            )
        if x is not None and x.device != table.device:
            raise ValueError(
                f"profile_posterior: {name} must be on {table.device} like table, is on {x.device}"
            )
    chosen = resolve("profile_posterior", impl, _candidates(table))
    if table.device.type == "cpu":
        _check_events(kinds, offsets, len(table), chosen)
    found = _profile_posterior(table, kinds, offsets, log_prior, weights, chosen)
    log_resp, evidence = found
    return log_resp, evidence


def _check_events(kinds: Tensor, offsets: Tensor, num_kinds: int, impl: str) -> None:
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != len(kinds):
        raise ValueError(
            f"profile_posterior: offsets must go from 0 to the {len(kinds)} events, go from "
            f"{first} to {last}"
        )
    if impl == "cpu":  # checks the rest itself, as it goes
        return
    if bool((offsets.diff() < 0).any()):
        raise ValueError("profile_posterior: offsets must ascend")
    if len(kinds) and (int(kinds.min()) < 0 or int(kinds.max()) >= num_kinds):
        raise ValueError(
            f"profile_posterior: kinds must be rows of the table, in [0, {num_kinds}), got "
            f"{int(kinds.min())} .. {int(kinds.max())}"
        )

"""Triton kernel of `userip_fast.ops.profile_posterior`; the op's module has the formula.

table [E, Z] fp32, kinds [N] and offsets [U + 1] int64, log_prior [Z] fp64, weights [N] fp32 or
none, all contiguous; log_resp [U, Z] fp32 and evidence [U] fp64 are written. A program owns
BLOCK_U users and all their codes: with few codes, several users fill its threads. Sums are in fp64
in the order of a user's events, nothing is atomic, and the work is bound by reading table rows. A
kind out of range reads nothing and makes its user NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _profile_posterior_kernel(
    table_ptr, kinds_ptr, offsets_ptr, log_prior_ptr, weights_ptr, log_resp_ptr, evidence_ptr,
    U, E, Z, HAS_WEIGHTS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    z = tl.arange(0, BLOCK_Z)
    there, code = u < U, z < Z
    begin = tl.load(offsets_ptr + u, mask=there, other=0)
    count = tl.load(offsets_ptr + u + 1, mask=there, other=0) - begin
    joint = tl.zeros((BLOCK_U, BLOCK_Z), tl.float64)
    joint += tl.load(log_prior_ptr + z, mask=code, other=float("-inf"))[None, :]
    for n in range(0, tl.max(count, 0)):
        has = n < count
        kind = tl.load(kinds_ptr + begin + n, mask=has, other=0)
        fits = has & (kind >= 0) & (kind < E)
        at = kind[:, None] * Z + z[None, :]
        row = tl.load(table_ptr + at, mask=fits[:, None] & code[None, :], other=0.0).to(tl.float64)
        if HAS_WEIGHTS:
            row *= tl.load(weights_ptr + begin + n, mask=has, other=0.0).to(tl.float64)[:, None]
        joint += tl.where((has & (fits == 0))[:, None], float("nan"), row)
    high = tl.max(joint, 1)
    total = tl.sum(tl.exp((joint - high[:, None]).to(tl.float32)), 1)
    evidence = high + tl.log(total.to(tl.float64))
    resp = (joint - evidence[:, None]).to(tl.float32)
    tl.store(log_resp_ptr + u[:, None] * Z + z[None, :], resp, mask=there[:, None] & code[None, :])
    tl.store(evidence_ptr + u, evidence, mask=there)


def profile_posterior(
    table: Tensor, kinds: Tensor, offsets: Tensor, log_prior: Tensor, weights: Tensor | None,
    log_resp: Tensor, evidence: Tensor,
) -> None:  # fmt: skip
    """Launches one program per `block_shape` users."""
    users, (num_kinds, codes) = len(evidence), table.shape
    if users == 0:
        return
    block_u, block_z, num_warps = block_shape(codes)
    _profile_posterior_kernel[(triton.cdiv(users, block_u),)](
        table, kinds, offsets, log_prior, weights, log_resp, evidence, users, num_kinds, codes,
        HAS_WEIGHTS=weights is not None, BLOCK_U=block_u, BLOCK_Z=block_z, num_warps=num_warps,
    )  # fmt: skip


def block_shape(codes: int) -> tuple[int, int, int]:
    """BLOCK_U, BLOCK_Z and num_warps: at most 16 sums per thread in registers."""
    block_z = triton.next_power_of_2(codes)
    block_u = max(1, 512 // block_z)
    return block_u, block_z, max(4, min(16, block_u * block_z // 512))

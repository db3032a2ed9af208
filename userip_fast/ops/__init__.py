"""Operators: the public kernel API.

Each op's module reads top to bottom: what it computes, reference, schema, fake kernel, autograd, and the
public function with its checks and dispatch. Fast implementations are imported when first used.
"""

from userip_fast.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

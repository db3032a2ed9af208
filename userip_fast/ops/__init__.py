"""Operators: the public kernel API.

Each op's module reads top to bottom: what it computes, reference, schema, fake kernel, autograd,
and the public function with its checks and dispatch. Fast implementations are imported when first
used.
"""

from userip_fast.ops.assign_codes import (
    assign_code_ids,
    assign_codes,
    assign_codes_reference,
    assign_codes_with_margin,
    assign_codes_with_stats,
)
from userip_fast.ops.frozen_block import gated, rms_norm, rotate
from userip_fast.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from userip_fast.ops.nf4_dequantize import nf4_dequantize, nf4_dequantize_reference
from userip_fast.ops.nf4_linear import nf4_linear, nf4_linear_reference
from userip_fast.ops.prepend_soft_prompts import (
    SLACK_ROW,
    prepend_soft_prompts,
    prepend_soft_prompts_reference,
)
from userip_fast.ops.profile_posterior import profile_posterior, profile_posterior_reference
from userip_fast.ops.soft_prompt_attention import (
    soft_prompt_attention,
    soft_prompt_attention_reference,
)
from userip_fast.ops.sparse_adam import sparse_adam, sparse_adam_reference

__all__ = [
    "SLACK_ROW",
    "assign_code_ids",
    "assign_codes",
    "assign_codes_reference",
    "assign_codes_with_margin",
    "assign_codes_with_stats",
    "gated",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "nf4_dequantize",
    "nf4_dequantize_reference",
    "nf4_linear",
    "nf4_linear_reference",
    "prepend_soft_prompts",
    "prepend_soft_prompts_reference",
    "profile_posterior",
    "profile_posterior_reference",
    "rms_norm",
    "rotate",
    "soft_prompt_attention",
    "soft_prompt_attention_reference",
    "sparse_adam",
    "sparse_adam_reference",
]

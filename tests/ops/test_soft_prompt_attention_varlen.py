"""The merged route with a plain segment attention in the place of flash kernels."""

import math
import types
from itertools import pairwise

import pytest
import torch
from soft_prompt_cases import dense_attention, gradients, make_case, run_op

from userip_fast.errors import UnavailableError, UnsupportedError
from userip_fast.ops import _soft_prompt_attention_varlen as varlen
from userip_fast.ops.soft_prompt_attention import (
    soft_prompt_attention_backward_reference,
    soft_prompt_attention_reference,
)

KERNELS = types.SimpleNamespace(
    forward=soft_prompt_attention_reference, backward=soft_prompt_attention_backward_reference
)


class PlainSegments:
    """Dense attention per segment; the backward pass trusts the out and lse that it is given."""

    def _segments(self, q, k, bounds):
        for (a, b), (c, d) in zip(
            pairwise(bounds.cu_q.tolist()), pairwise(bounds.cu_k.tolist()), strict=True
        ):
            yield slice(a, b), slice(c, d)

    def _scores(self, q, k, bounds, scale):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        s = torch.einsum("rhd,chd->hrc", q, keys) * scale
        return s.masked_fill(s.new_ones(s.shape[1:]).triu(1) > 0, -math.inf) if bounds.causal else s

    def forward(self, q, k, v, bounds, scale):
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
        for r, c in self._segments(q, k, bounds):
            s = self._scores(q[r], k[c], bounds, scale)
            values = v[c].repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[r] = torch.einsum("hrc,chd->rhd", s.softmax(-1), values)
            lse[:, r] = s.logsumexp(-1)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, bounds, scale):
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        delta = (d_out * out).sum(-1).T
        for r, c in self._segments(q, k, bounds):
            p = (self._scores(q[r], k[c], bounds, scale) - lse[:, r, None]).exp()
            keys, values = (x[c].repeat_interleave(group, 1) for x in (k, v))
            dp = torch.einsum("rhd,chd->hrc", d_out[r], values)
            ds = p * (dp - delta[:, r, None]) * scale
            dq[r] = torch.einsum("hrc,chd->rhd", ds, keys)
            for full, x in (
                (dk, torch.einsum("hrc,rhd->chd", ds, q[r])),
                (dv, torch.einsum("hrc,rhd->chd", p, d_out[r])),
            ):
                full[c] = x.view(x.shape[0], -1, group, x.shape[2]).sum(2)
        return dq, dk, dv


@pytest.mark.parametrize(
    "spec",
    [
        {"behaviour": [5, 1, 9]},
        {"behaviour": [4, 11], "heads": 4, "kv_heads": 2, "slack": 5, "virtual": 3},
        {"behaviour": [3, 6], "names": (0, 0), "bos": False},
        {"behaviour": [8, 2], "spread": 5.0},
    ],
)
def test_merged_segments_equal_the_whole(spec):
    case = make_case(**spec, dtype=torch.float64)
    d_out = torch.randn_like(case.tensors[0])
    fields, scale = case.options["num_fields"], case.options["scale"]
    extra = (fields, scale, 0, 0.0, 0, KERNELS, PlainSegments())
    out, lse = varlen.forward(*case.tensors, case.pack, *extra)
    grads = varlen.backward(d_out, *case.tensors, case.pack, out, lse, *extra)
    oracle = gradients(dense_attention, case, d_out)
    for got, want in zip((out, *grads), oracle, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_refusals_say_why():
    with pytest.raises(UnavailableError, match="neither sinks nor chunks"):
        run_op("varlen")(make_case([3], sinks=True))
    with pytest.raises(UnavailableError, match="needs a CUDA device"):
        run_op("varlen")(make_case([3]))
    for spec, reason in (({"items": 2}, "independent items"), ({"window": 3}, "neither window")):
        case = make_case([5], **spec)
        options = (case.options[x] for x in ("num_fields", "scale", "window", "softcap"))
        with pytest.raises(UnsupportedError, match=reason):
            varlen.forward(*case.tensors, case.pack, *options, 0, KERNELS, PlainSegments())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_device_equals_triton(dtype):
    case = make_case([61, 130, 7], heads=8, kv_heads=2, dim=64, slack=20, dtype=dtype)
    case = case.to("cuda")
    d_out = torch.randn_like(case.tensors[0])
    both = (gradients(run_op(impl), case, d_out) for impl in ("varlen", "triton"))
    for a, b in zip(*both, strict=True):
        bound = 8 * torch.finfo(dtype).eps * float(b.float().abs().max())
        assert float((a.float() - b.float()).abs().max()) <= bound

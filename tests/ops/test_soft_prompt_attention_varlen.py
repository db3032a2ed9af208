"""The merged route with a plain segment attention in the place of flash kernels."""

import logging
import math
import sys
import types
from importlib import metadata
from itertools import pairwise

import pytest
import torch
from soft_prompt_cases import dense_attention, gradients, make_case, run_op

from userip_fast.core.errors import UnavailableError, UnsupportedError
from userip_fast.ops.soft_prompt_attention import reference, varlen


class PlainSegments:
    """Dense attention per segment; the backward pass trusts the out and lse that it is given."""

    def _segments(self, q, k, bounds):
        for (a, b), (c, d) in zip(
            pairwise(bounds.cu_q.tolist()), pairwise(bounds.cu_k.tolist()), strict=True
        ):
            yield slice(a, b), slice(c, d)

    def _scores(self, q, k, bounds):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        s = torch.einsum("rhd,chd->hrc", q, keys) * bounds.scale
        return s.masked_fill(s.new_ones(s.shape[1:]).triu(1) > 0, -math.inf) if bounds.causal else s

    def forward(self, q, k, v, bounds):
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
        for r, c in self._segments(q, k, bounds):
            s = self._scores(q[r], k[c], bounds)
            values = v[c].repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[r] = torch.einsum("hrc,chd->rhd", s.softmax(-1), values)
            lse[:, r] = s.logsumexp(-1)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, bounds):
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        delta = (d_out * out).sum(-1).T
        for r, c in self._segments(q, k, bounds):
            p = (self._scores(q[r], k[c], bounds) - lse[:, r, None]).exp()
            keys, values = (x[c].repeat_interleave(group, 1) for x in (k, v))
            dp = torch.einsum("rhd,chd->hrc", d_out[r], values)
            ds = p * (dp - delta[:, r, None]) * bounds.scale
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
    merged_equals_dense(case, d_out, PlainSegments())


def merged_equals_dense(case, d_out, flash):
    qkv = case.tensors[:3]
    out, lse = varlen.forward(*qkv, case.context, reference, flash)
    grads = varlen.backward(d_out, *qkv, out, lse, case.context, reference, flash)
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
        with pytest.raises(UnsupportedError, match=reason):
            varlen.forward(*case.tensors[:3], case.context, reference, PlainSegments())


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in of flash-attn 2.7's interface, argument by argument."""
    plain, calls = PlainSegments(), []

    def bounds(cu_q, cu_k, max_q, max_k, causal, scale):
        for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
            assert cu.dtype == torch.int32
            assert int(cu.diff().max()) <= longest
        return types.SimpleNamespace(cu_q=cu_q, cu_k=cu_k, causal=causal, scale=scale)

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        calls.append("forward")
        segment = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
        out, lse = plain.forward(q, k, v, bounds(*segment))
        return out, lse, torch.empty(0), torch.empty(2)

    def backward(
        d_out, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        assert deterministic
        assert alibi_slopes is None
        calls.append("backward")
        segment = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
        grads = plain.backward(d_out, q, k, v, out, softmax_lse, bounds(*segment))
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)
        return torch.empty(0)

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = forward
    interface._flash_attn_varlen_backward = backward
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return calls


def test_flash_attn_is_called_as_it_wants_to_be(flash_attn):
    case = make_case([5, 1, 9], heads=4, kv_heads=2, slack=3, virtual=2, dtype=torch.float64)
    d_out = torch.randn_like(case.tensors[0])
    merged_equals_dense(case, d_out, varlen.FlashAttn())
    assert flash_attn == ["forward"] * 2 + ["backward"] * 2


def test_the_faster_library_is_measured_once_and_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    q, k = torch.empty(4, 8, 64), torch.empty(4, 2, 64)
    timed = []

    def time_of(torchs, theirs):
        varlen._fastest.cache_clear()

        def time(flash, *form):
            timed.append(form)
            return theirs if isinstance(flash, varlen.FlashAttn) else torchs

        monkeypatch.setattr(varlen, "_time", time)
        return type(varlen.flash_for(q, k))

    def version(name, versions={"flash-attn": "2.8"}):  # noqa: B006
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    try:
        monkeypatch.setattr(varlen.metadata, "version", lambda name: version(name, {}))
        assert time_of(1.0, 0.1) is varlen.TorchFlash  # it is not there
        assert not timed
        monkeypatch.setattr(varlen.metadata, "version", version)
        with caplog.at_level(logging.INFO, "userip_fast"):
            assert time_of(1.0, 0.5) is varlen.FlashAttn
        assert "varlen attention by flash-attn" in caplog.text
        assert timed == [(q.device, q.dtype, 8, 2, 64)] * 2
        assert time_of(0.1, 9.0) is varlen.FlashAttn  # kept for the next process
        assert len(timed) == 2
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
        assert time_of(1.0, 0.97) is varlen.TorchFlash
        assert time_of(1.0, 0.1) is varlen.TorchFlash
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a third card")
        assert time_of(1.0, float("inf")) is varlen.TorchFlash  # it cannot run
    finally:
        varlen._fastest.cache_clear()


def test_what_cannot_run_is_the_slowest():
    class Fails:
        def forward(self, *args):
            raise RuntimeError("no kernel image is available")

    assert varlen._time(Fails(), torch.device("cpu"), torch.float32, 2, 1, 8) == math.inf


@pytest.mark.gpu
def test_the_library_chosen_on_a_device_runs(tmp_path, monkeypatch):
    """flash-attn where it is installed, and torch's kernels, by the clock."""
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path))
    q = torch.empty(1, 8, 64, dtype=torch.bfloat16, device="cuda")
    varlen._fastest.cache_clear()
    flash = varlen.flash_for(q, q[:, :2])
    form = (q.device, q.dtype, 8, 2, 64)
    assert varlen._time(flash, *form) < math.inf
    varlen._fastest.cache_clear()


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

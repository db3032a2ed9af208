"""FP8 residency: two e4m3 copies of each frozen weight, and the gate that a load has to pass.

    y  = (x8 W8^T) sx sw + bias      W8 [N, K] with a scale per output row, x8 one per token
    dx = (g8 T8^T) sg st             T8 = W^T in e4m3 [K, N], a scale per row of it; g8 per token

Two copies, because 8-bit tensor cores read both operands along the summed axis. The gradient's
product promotes its sums to fp32 (`use_fast_accum=False`): Hopper adds e4m3 products in about 14
bits otherwise. On CUDA the products are `torch._scaled_mm` (sm_89 and later); elsewhere the same
roundings are followed by an fp32 product, which is for tests and for the gate, not for speed.

It is lossy, so `lm.residency=fp8` is refused where the gate finds that the LM reads users otherwise
than the unrounded weights do, and `auto` takes it only where, beside that, a step was faster in it
on this device.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from userip_fast import measured
from userip_fast._version import __version__
from userip_fast.errors import UnavailableError, UnsupportedError, UserIPError
from userip_fast.lm.memory import free_bytes, size_text
from userip_fast.lm.nf4 import swap_modules
from userip_fast.ops import assign_codes
from userip_fast.ops.packed_block import cast_rows
from userip_fast.packing import make_pack

if TYPE_CHECKING:
    from userip_fast.lm.frozen import FrozenLM
    from userip_fast.lm.trace import Workload

logger = logging.getLogger("userip_fast.lm")

MIN_COSINE, MAX_NLL_SHIFT, MIN_SAME_CODES, MAX_TIME = 0.99, 0.01, 0.95, 0.9
_USERS, _TOKENS, _CODES = 48, 48, 8
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears of one input


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] to e4m3 [M, K] and the fp32 scale [M] of each row; a row of zeros has scale 1."""
    x = x if x.stride(1) == 1 else x.contiguous()  # tensor cores read row by row
    return cast_rows(x, "triton" if x.is_cuda or x.is_meta else "reference")


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """a [M, K] b^T [K, N], each row of either scaled: [M, N] in `dtype`, sums in fp32.

    Args:
        fast: On CUDA, add up in the tensor core's own precision.
    """
    if a.is_cuda or a.is_meta:
        out = torch._scaled_mm(
            a, b.t(), a_scale[:, None], b_scale[None], out_dtype=torch.bfloat16, use_fast_accum=fast
        )
        return out.to(dtype)
    return (a.float() @ b.float().t()).mul_(a_scale[:, None]).mul_(b_scale).to(dtype)


class FP8Linear(nn.Module):
    """See the module. Only the input gets a gradient, and nothing is saved for it.

    Linears of one input are rounded together: their rows of W^T share a scale, so that their token
    gradients go through one product (`userip_fast.lm.products`). Each is still a linear of its own.

    Args:
        weight: [N, K] dense.
        bias: [N] or None.
        rounded: W and W^T with their scales, where they were rounded with others.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rounded: tuple[Tensor, ...] | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        if rounded is None:
            rounded = (*quantize_rows(weight), *quantize_rows(weight.t().contiguous()))
        names = ("forward_weight", "forward_scale", "backward_weight", "backward_scale")
        for name, tensor in zip(names, rounded, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())

    def dense_weight(self) -> Tensor:
        """[N, K], the values that the forward pass multiplies with."""
        values: Any = self.forward_weight
        scale: Any = self.forward_scale
        return (values.float() * scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        y: Tensor = _FP8Product.apply(x.reshape(-1, self.in_features), self)  # type: ignore[no-untyped-call]
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


class _FP8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        weight = linear.forward_weight, linear.forward_scale
        return scaled_product(*quantize_rows(x), *weight, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight = ctx.linear.backward_weight, ctx.linear.backward_scale
        return scaled_product(*quantize_rows(grads[0]), *weight, grads[0].dtype, fast=False), None


def _wanted(name: str, module: nn.Module) -> bool:
    """Whether it is a dense linear of a layer."""
    from userip_fast.lm.residency import layer_of

    return type(module) is nn.Linear and layer_of(name) != name


def why_not(model: nn.Module) -> UserIPError | None:
    """What `convert_linears` would raise."""
    linears: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if _wanted(n, m)]
    for name, module in linears:
        weight = module.weight
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
            return UnavailableError(
                "lm.residency=fp8 needs a GPU with FP8 tensor cores (compute capability 8.9 or "
                f"later), this one has {torch.cuda.get_device_capability(weight.device)}"
            )
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            return UnsupportedError(
                f"lm.residency=fp8 needs weights whose sizes are multiples of 16, {name} is "
                f"{tuple(weight.shape)}; set lm.residency=resident"
            )
    if not linears:
        return UnsupportedError(
            "lm.residency=fp8 finds no linear in this model's layers; set lm.residency=resident"
        )
    return None


def convert_linears(model: nn.Module) -> int:
    """Replaces the dense linears of the model's layers by `FP8Linear`, in place; how many.

    Raises:
        UnavailableError: The GPU has no FP8 tensor cores.
        UnsupportedError: A weight's sizes are not multiples of 16, which they need, or there is no
            linear to convert.
    """
    if (error := why_not(model)) is not None:
        raise error
    count = 0
    for parent in list(model.modules()):
        for names in _TOGETHER:
            linears = [getattr(parent, n, None) for n in names]
            if all(type(m) is nn.Linear for m in linears):
                for name, linear in zip(names, _rounded_together(linears), strict=True):
                    setattr(parent, name, linear)
                count += len(names)
    return count + swap_modules(model, _wanted, lambda m: FP8Linear(m.weight, m.bias))


def _rounded_together(linears: Sequence[Any]) -> list[FP8Linear]:
    """Linears of one input; their buffers are parts of joined ones."""
    sizes = [m.out_features for m in linears]
    whole = torch.cat([m.weight.detach() for m in linears])
    values, scale = quantize_rows(whole)
    back, back_scale = quantize_rows(whole.t().contiguous())
    parts = zip(
        torch.split(values, sizes), torch.split(scale, sizes), torch.split(back, sizes, 1),
        strict=True,
    )  # fmt: skip
    return [
        FP8Linear(m.weight, m.bias, (v, s, b, back_scale)).train(m.training)
        for m, (v, s, b) in zip(linears, parts, strict=True)
    ]


def joined_weights(linears: Sequence[Any]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """W [sum N, K] and W^T [K, sum N] with their scales, of linears that were rounded together."""
    first = linears[0]
    rows = sum(m.out_features for m in linears)
    forward, backward = first.forward_weight, first.backward_weight
    if len(linears) == 1:
        return (forward, first.forward_scale), (backward, first.backward_scale)
    columns = first.in_features
    return (
        (
            forward.as_strided((rows, columns), (columns, 1), forward.storage_offset()),
            first.forward_scale.as_strided((rows,), (1,), first.forward_scale.storage_offset()),
        ),
        (
            backward.as_strided((columns, rows), (rows, 1), backward.storage_offset()),
            first.backward_scale,
        ),
    )


@dataclass(frozen=True)
class Reading:
    """What an LM makes of the sample users: NLL per token [U], and the gradient [U, S D] of it."""

    nll: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class GateReport:
    """How far FP8 moves what the engine reads off an LM.

    Attributes:
        nll_shift: Mean over users of |NLL - NLL'| / NLL.
        cosine: Mean cosine of the theta gradients; lowest_cosine of any user.
        same_codes: Share of users with the same nearest codeword after a step along the gradient.
        time: Of a step, over that with unrounded weights; None where FP8 was asked for.
    """

    nll_shift: float
    cosine: float
    lowest_cosine: float
    same_codes: float
    time: float | None = None

    @property
    def passed(self) -> bool:
        return (
            self.nll_shift <= MAX_NLL_SHIFT
            and self.cosine >= MIN_COSINE
            and self.same_codes >= MIN_SAME_CODES
            and (self.time is None or self.time <= MAX_TIME)
        )

    def __str__(self) -> str:
        return (
            f"NLL shift {self.nll_shift:.2%} (at most {MAX_NLL_SHIFT:.0%}), theta-gradient "
            f"cosine {self.cosine:.4f} (at least {MIN_COSINE}; lowest of a user "
            f"{self.lowest_cosine:.4f}), "
            f"unchanged codes {self.same_codes:.0%} (at least {MIN_SAME_CODES:.0%})"
            + ("" if self.time is None else f", {self.time:.2f} of the time (at most {MAX_TIME})")
        )


def read_sample(lm: FrozenLM, seed: int = 0) -> Reading:
    """Reads users of random tokens, all starting at the mean embedding of theirs."""
    from userip_fast.lm.engine import PackedEngine
    from userip_fast.lm.gates import sample_layout, sample_users

    layout = sample_layout(lm, _CODES)
    random = np.random.default_rng(seed)
    # Every user has a small vocabulary of its own, so that there is something to tell them apart.
    own = random.integers(len(lm.tokenizer), size=(_USERS, 6))
    ids = np.take_along_axis(own, random.integers(6, size=(_USERS, _TOKENS)), 1).astype(np.int32)
    behaviour = sample_users(ids, layout)
    start = lm.embed(torch.from_numpy(ids.astype(np.int64)).to(lm.device)).float().mean((0, 1))
    theta = start.expand(_USERS, 1, -1).clone().requires_grad_()
    pack = make_pack(behaviour, np.arange(_USERS), layout, lm.device)
    nll = PackedEngine(lm, layout).nll(pack, theta)
    (gradient,) = torch.autograd.grad(nll.sum(), theta)
    return Reading(nll.detach() / (_TOKENS - 1), gradient.flatten(1).float())


def compare(exact: Reading, rounded: Reading) -> GateReport:
    """The gate's figures; codewords are the exact steps of the first users."""
    cosine = torch.cosine_similarity(exact.gradient, rounded.gradient)
    steps = [nn.functional.normalize(r.gradient) for r in (exact, rounded)]
    codes = [assign_codes(s.contiguous(), steps[0][:_CODES].contiguous())[0] for s in steps]
    return GateReport(
        float(((exact.nll - rounded.nll).abs() / exact.nll).mean()),
        float(cosine.mean()),
        float(cosine.min()),
        float((codes[0] == codes[1]).double().mean()),
    )


def settle_gated(lm: FrozenLM) -> GateReport:
    """Brings a loaded LM into FP8, and compares what it reads before and after.

    Raises:
        UnsupportedError: The gate is not passed; the LM is then left in FP8 and should be dropped.
    """
    from userip_fast.lm.residency import settle

    settle(lm.model, "resident", lm.dtype)
    exact = read_sample(lm)
    settle(lm.model, "fp8", lm.dtype)
    report = compare(exact, read_sample(lm))
    logger.info("LM %s in FP8 against unrounded weights: %s", lm.source, report)
    if not report.passed:
        raise UnsupportedError(
            f"lm.residency=fp8 changes what this LM says too much: {report}; set "
            "lm.residency=resident or streamed"
        )
    return report


def try_out(lm: FrozenLM, work: Workload) -> GateReport | None:
    """Brings an LM with resident weights into FP8 where that passes; None where it was not tried.

    How long a step takes is measured once for each device, versions and weights' shapes, and kept
    (`userip_fast.measured`); where FP8 was no faster it is not tried again.

    Args:
        lm: After `fuse`, so that steps run as they will.
        work: The steps that are timed.
    """
    from userip_fast.lm.gates import step_seconds

    if (why := _why_not_unasked(lm, work)) is not None:
        logger.debug("LM %s: FP8 is not tried: %s", lm.source, why)
        return None
    key = _form(lm, work)
    known = measured.kept("fp8_times", key)
    if known is not None and known > MAX_TIME:
        logger.info("LM %s: no FP8, a step took %.2f of the time in it here", lm.source, known)
        return None
    dense = {n: m for n, m in lm.model.named_modules() if _wanted(n, m)}
    exact, usual = read_sample(lm), 0.0 if known else step_seconds(lm, work)
    convert_linears(lm.model)
    rounded = read_sample(lm)
    taken = known or step_seconds(lm, work) / usual
    measured.keep("fp8_times", key, taken)
    report = replace(compare(exact, rounded), time=taken)
    if not report.passed:
        for name, module in dense.items():
            lm.model.set_submodule(name, module)
    kept = "FP8 products" if report.passed else "no FP8"
    logger.info("LM %s: %s; in FP8 %s", lm.source, kept, report)
    return report


def _why_not_unasked(lm: FrozenLM, work: Workload) -> str | None:
    if lm.device.type != "cuda" or lm.dtype != torch.bfloat16:
        return f"it is for bfloat16 on a GPU, this is {lm.dtype} on {lm.device.type}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "processes that time each by itself might disagree"
    if (error := why_not(lm.model)) is not None:
        return str(error)
    # Both forms lie there for the trial, and a step.
    size = sum(m.weight.nbytes for n, m in lm.model.named_modules() if _wanted(n, m))
    assert lm.architecture is not None
    recompute = lm.plan is not None and lm.plan.recompute
    size += lm.architecture.step(recompute, work)
    free = free_bytes(lm.device)
    return None if size <= free else f"it would take {size_text(size)}, {size_text(free)} are free"


def _form(lm: FrozenLM, work: Workload) -> str:
    """Device, versions and all that the time of a step depends on."""
    shapes = Counter(
        "x".join(map(str, m.weight.shape)) for n, m in lm.model.named_modules() if _wanted(n, m)
    )
    linears = ", ".join(f"{count} of {shape}" for shape, count in sorted(shapes.items()))
    device = torch.cuda.get_device_name(lm.device)
    versions = f"userip_fast {__version__}, torch {torch.__version__}"
    return f"{device}; {versions}; {work.pack_tokens} rows; {linears}"

"""FP8 residency: two e4m3 copies of each frozen weight, and the gate that a load has to pass.

    y  = (x8 W8^T) sx sw + bias      W8 [N, K] with a scale per output row, x8 one per token
    dx = (g8 T8^T) sg st             T8 = W^T in e4m3 [K, N], a scale per row of it; g8 per token

Two copies, because 8-bit tensor cores read both operands along the summed axis. The gradient's
product promotes its sums to fp32 (`use_fast_accum=False`): Hopper adds e4m3 products in about 14
bits otherwise. On CUDA the products are `torch._scaled_mm` (sm_89 and later); elsewhere the same
roundings are followed by an fp32 product, which is for tests and for the gate, not for speed.

It is lossy, so `lm.residency=fp8` is never chosen unasked, and is refused where the gate finds that
the LM reads users otherwise than the unrounded weights do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from userip_fast.errors import UnavailableError, UnsupportedError
from userip_fast.lm.nf4 import swap_modules
from userip_fast.ops import assign_codes
from userip_fast.ops.packed_block import cast_rows
from userip_fast.packing import Behaviour, make_pack
from userip_fast.prompts import ProfileField, PromptTemplate

if TYPE_CHECKING:
    from userip_fast.lm.frozen import FrozenLM

logger = logging.getLogger("userip_fast.lm")

MIN_COSINE, MAX_NLL_SHIFT, MIN_SAME_CODES = 0.99, 0.01, 0.95
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


def convert_linears(model: nn.Module) -> int:
    """Replaces the dense linears of the model's layers by `FP8Linear`, in place; how many.

    Raises:
        UnavailableError: The GPU has no FP8 tensor cores.
        UnsupportedError: A weight's sizes are not multiples of 16, which they need, or there is no
            linear to convert.
    """
    from userip_fast.lm.residency import layer_of

    def wanted(name: str, module: nn.Module) -> bool:
        return type(module) is nn.Linear and layer_of(name) != name

    for name, module in model.named_modules():
        if not wanted(name, module):
            continue
        weight: Any = module.weight
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
            raise UnavailableError(
                "lm.residency=fp8 needs a GPU with FP8 tensor cores (compute capability 8.9 or "
                f"later), this one has {torch.cuda.get_device_capability(weight.device)}"
            )
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise UnsupportedError(
                f"lm.residency=fp8 needs weights whose sizes are multiples of 16, {name} is "
                f"{tuple(weight.shape)}; set lm.residency=resident"
            )
    count = 0
    for parent in list(model.modules()):
        for names in _TOGETHER:
            linears = [getattr(parent, n, None) for n in names]
            if all(type(m) is nn.Linear for m in linears):
                for name, linear in zip(names, _rounded_together(linears), strict=True):
                    setattr(parent, name, linear)
                count += len(names)
    count += swap_modules(model, wanted, lambda m: FP8Linear(m.weight, m.bias))
    if not count:
        raise UnsupportedError(
            "lm.residency=fp8 finds no linear in this model's layers; set lm.residency=resident"
        )
    return count


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
    """

    nll_shift: float
    cosine: float
    lowest_cosine: float
    same_codes: float

    @property
    def passed(self) -> bool:
        return (
            self.nll_shift <= MAX_NLL_SHIFT
            and self.cosine >= MIN_COSINE
            and self.same_codes >= MIN_SAME_CODES
        )

    def __str__(self) -> str:
        return (
            f"NLL shift {self.nll_shift:.2%} (at most {MAX_NLL_SHIFT:.0%}), theta-gradient "
            f"cosine {self.cosine:.4f} (at least {MIN_COSINE}; lowest of a user "
            f"{self.lowest_cosine:.4f}), "
            f"unchanged codes {self.same_codes:.0%} (at least {MIN_SAME_CODES:.0%})"
        )


def read_sample(lm: FrozenLM, seed: int = 0) -> Reading:
    """Reads users of random tokens, all starting at the mean embedding of theirs."""
    from userip_fast.lm.engine import PackedEngine

    template = PromptTemplate((ProfileField("sample", "The user likes", 1, _CODES),))
    layout = template.layout(lm.tokenizer)
    random = np.random.default_rng(seed)
    # Every user has a small vocabulary of its own, so that there is something to tell them apart.
    own = random.integers(len(lm.tokenizer), size=(_USERS, 6))
    ids = np.take_along_axis(own, random.integers(6, size=(_USERS, _TOKENS)), 1).astype(np.int32)
    offsets = np.arange(0, ids.size + 1, _TOKENS)
    weight = np.ones(ids.shape, np.float32)
    weight[:, 0] = 0.0
    behaviour = Behaviour(
        ids.ravel(),
        np.full(ids.size, layout.num_fields, np.int32),
        np.tile(layout.behaviour_start + np.arange(_TOKENS, dtype=np.int32), _USERS),
        weight.ravel(),
        offsets,
        np.ones(_USERS, np.int64),
    )
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

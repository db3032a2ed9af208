"""Frozen NF4 linears inside a Hugging Face model, run by `ops.nf4_linear`.

`replace_linear4bit` swaps bitsandbytes' layers for ours (same weights, same output, shared memory);
`quantize_linears` makes a dense model 4-bit where bitsandbytes is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from userip_fast.ops import nf4_dequantize, nf4_linear
from userip_fast.ops.nf4_format import NF4Weight

_TENSORS = ("packed", "absmax", "nested_absmax", "nested_map", "offset")


class NF4Linear(nn.Module):
    """`y = x W^T + bias` with W frozen in NF4; only the input gets a gradient.

    Its state dict has the key names and bits of bitsandbytes' `Linear4bit`.

    Args:
        weight: The weight, shape (out_features, in_features).
        bias: [out_features] or None.
        compute_dtype: dtype to compute in; None for the input's. The output has the input's dtype.
        impl: Implementation of `ops.nf4_linear`.
    """

    def __init__(
        self,
        weight: NF4Weight,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.impl = impl
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._set_weight(weight)

    def _set_weight(self, weight: NF4Weight) -> None:
        for name, tensor in zip(_TENSORS, weight.tensors(), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.nf4_weight = weight

    @classmethod
    def from_linear4bit(cls, module: Any) -> NF4Linear:
        """Takes over a quantised `bitsandbytes.nn.Linear4bit`; see `NF4Weight.from_bnb`."""
        compute_dtype = module.compute_dtype if module.compute_type_is_set else None
        return cls(NF4Weight.from_bnb(module), module.bias, compute_dtype=compute_dtype)

    @classmethod
    def from_linear(
        cls, module: nn.Module, *, blocksize: int = 64, nested: bool = True
    ) -> NF4Linear:
        """Quantises an `nn.Linear`, or GPT-2's `Conv1D`, which keeps its weight transposed."""
        weight: Any = module.weight
        if type(module).__name__ == "Conv1D":
            weight = weight.T.contiguous()
        quantized = NF4Weight.quantize(weight, blocksize=blocksize, nested=nested)
        bias: Any = module.bias
        return cls(quantized, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        inner = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return nf4_linear(inner, self.nf4_weight, self.bias, impl=self.impl).to(x.dtype)

    def dense_weight(self) -> Tensor:
        """[N, K], dequantised to the dtype computed in (the weight's own where that is open)."""
        return nf4_dequantize(self.nf4_weight, dtype=self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # Devices change, dtypes must not: `.to(torch.bfloat16)` would round the fp32 scales.
        if self.bias is not None:
            self.bias = fn(self.bias)
        self._set_weight(self.nf4_weight.to(fn(self.nf4_weight.packed).device))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.nf4_weight.state_dict(prefix + "weight"))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = prefix + "weight"
        weight = NF4Weight.from_state_dict(state_dict, name)
        weight = weight.to(self.nf4_weight.packed.device)
        for key in [k for k in state_dict if k == name or k.startswith(name + ".")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._set_weight(weight)
        self.out_features, self.in_features = weight.shape

    def extra_repr(self) -> str:
        """Shape and block size, shown by `print(model)`."""
        w = self.nf4_weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocksize={w.blocksize}, nested={w.nested}"
        )


def is_linear4bit(module: nn.Module) -> bool:
    """Whether it is a 4-bit layer of bitsandbytes' own: wrappers of others bear its name too."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.partition(".")[0] == "bitsandbytes"
        for kind in type(module).__mro__
    )


def replace_linear4bit(model: nn.Module) -> int:
    """Swaps every bitsandbytes `Linear4bit` in `model` for an `NF4Linear`, in place.

    Returns:
        How many layers were swapped.

    Raises:
        UnsupportedError: A layer is FP4, not quantised yet, or repacked for AVX512-BF16; the model
            is then unchanged.
    """
    return swap_modules(model, lambda name, m: is_linear4bit(m), NF4Linear.from_linear4bit)


def quantize_linears(
    model: nn.Module,
    *,
    blocksize: int = 64,
    nested: bool = True,
    skip: Iterable[str] = ("lm_head",),
) -> int:
    """Quantises every dense linear of `model` in place, as bitsandbytes would.

    Args:
        model: A dense model.
        blocksize: Values per scale.
        nested: Quantise the scales too.
        skip: Last parts of module names that stay dense.

    Returns:
        How many layers were swapped.
    """
    skipped = set(skip)
    return swap_modules(
        model,
        lambda name, m: (
            (type(m) is nn.Linear or type(m).__name__ == "Conv1D")
            and name.rpartition(".")[2] not in skipped
        ),
        lambda m: NF4Linear.from_linear(m, blocksize=blocksize, nested=nested),
    )


def swap_modules(
    model: nn.Module,
    wanted: Callable[[str, nn.Module], bool],
    make: Callable[[Any], nn.Module],
) -> int:
    """Makes all new modules before it puts in the first, so that an error leaves `model` whole."""
    new = {name: make(m) for name, m in model.named_modules() if wanted(name, m)}
    for name, module in new.items():
        model.set_submodule(name, module.train(model.get_submodule(name).training))
    return len(new)

"""Frozen products of one input: several linears side by side, as one, in either direction.

q, k and v are one product, and gate and up are one: two kernels where there were five, one read of
the input, and no sums of their input gradients. The modules' weights become views of the joined
one, so nothing is held twice and everything else still sees the modules as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from userip_fast.lm.fp8 import FP8Linear, joined_weights, scaled_product
from userip_fast.lm.residency import StreamedLinear

Cast = tuple[Tensor, Tensor]
"""e4m3 values and the scale of each row."""


class Product(Protocol):
    """`out`: x [T, K] to x W^T + bias [T, N]. `back`: g [T, N] to g W [T, K].

    Where `e4m3`, both take a `Cast`.
    """

    e4m3: bool
    dtype: torch.dtype

    def out(self, x: Any) -> Tensor: ...

    def back(self, g: Any) -> Tensor: ...


class DenseProduct:
    """Of `nn.Linear`s."""

    e4m3 = False

    def __init__(self, linears: Sequence[Any]) -> None:
        self.weight = _joined([m.weight for m in linears])
        for linear, part in zip(linears, _rows(self.weight, linears), strict=True):
            linear.weight.data = part
        self.bias = _joined_bias(linears)
        self.dtype = self.weight.dtype

    def out(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def back(self, g: Tensor) -> Tensor:
        return g @ self.weight


class StreamedProduct:
    """Of `StreamedLinear`s that follow one another in a buffer of their stream."""

    e4m3 = False

    def __init__(self, linears: Sequence[Any]) -> None:
        self.stream, self.layer = linears[0].stream, linears[0].layer
        self.first, self.count = linears[0].index, len(linears)
        self.bias = _joined_bias(linears)
        self.dtype = self.stream.dtype

    def out(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight(), self.bias)

    def back(self, g: Tensor) -> Tensor:
        return g @ self._weight()

    def _weight(self) -> Tensor:
        return self.stream.joined(self.layer, self.first, self.count)

    @staticmethod
    def fits(linears: Sequence[Any]) -> bool:
        """Whether they lie side by side, without a gap."""
        first = linears[0]
        return all(
            m.stream is first.stream and m.layer == first.layer and m.index == first.index + i
            for i, m in enumerate(linears)
        ) and all(m.in_features * m.out_features % 64 == 0 for m in linears)


class E4M3Product:
    """Of `FP8Linear`s whose weights were rounded together."""

    e4m3 = True

    def __init__(self, linears: Sequence[Any]) -> None:
        self.dtype = linears[0].dtype
        self.forward, self.backward = joined_weights(linears)
        self.bias = _joined_bias(linears)

    def out(self, x: Cast) -> Tensor:
        y = scaled_product(*x, *self.forward, self.dtype, fast=True)
        return y if self.bias is None else y + self.bias

    def back(self, g: Cast) -> Tensor:
        return scaled_product(*g, *self.backward, self.dtype, fast=False)


def product_of(linears: Sequence[nn.Module]) -> Product | None:
    """Their product, None where they are not of one kind that can be joined."""
    kinds = {type(m) for m in linears}
    first: Any = linears[0]
    if len(kinds) != 1 or len({getattr(m, "bias", None) is None for m in linears}) != 1:
        return None
    if isinstance(first, FP8Linear):
        weights: list[Any] = [m.forward_weight for m in linears]
        memory = {w.untyped_storage()._cdata for w in weights}
        return E4M3Product(linears) if len(memory) == 1 else None
    if isinstance(first, StreamedLinear):
        return StreamedProduct(linears) if StreamedProduct.fits(linears) else None
    if type(first) is nn.Linear and first.weight.is_floating_point():
        return DenseProduct(linears)
    return None


def _rows(weight: Tensor, linears: Sequence[Any]) -> tuple[Tensor, ...]:
    return torch.split(weight, [m.weight.shape[0] for m in linears])


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """[sum N, K]; the memory they share already, where they lie there one after the other."""
    first = weights[0].detach()
    if len(weights) == 1:
        return first
    at, follow = first.storage_offset(), True
    for w in weights:
        follow &= (
            w.is_contiguous()
            and w.untyped_storage()._cdata == first.untyped_storage()._cdata
            and w.storage_offset() == at
        )
        at += w.numel()
    if not follow:
        return torch.cat([w.detach() for w in weights])
    rows = sum(w.shape[0] for w in weights)
    return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def _joined_bias(linears: Sequence[Any]) -> Tensor | None:
    if linears[0].bias is None:
        return None
    return torch.cat([m.bias.detach() for m in linears]) if len(linears) > 1 else linears[0].bias

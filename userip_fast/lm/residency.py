"""In which form the frozen weights lie in memory: `resident`, `streamed` or `fp8`.

- `resident`: each 4-bit weight is dequantised once, at load; a layer is then a plain linear.
- `streamed`: weights stay in 4 bits. Two buffers hold whole layers, dequantised: the layer at work,
  and the one after it, which on CUDA is decoded on a side stream meanwhile. Nothing but the two
  buffers is dense, and the values are those of `resident`, bit for bit.
- `fp8`: two e4m3 copies, see `userip_fast.lm.fp8`.

A frozen linear keeps neither its input nor a weight for backward, in any mode. Which mode a load
takes is decided in `userip_fast.lm.memory`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from userip_fast.core.errors import UnsupportedError
from userip_fast.lm import attention
from userip_fast.lm.fp8 import convert_linears
from userip_fast.lm.layers import layer_of
from userip_fast.lm.nf4 import NF4Linear, is_linear4bit, replace_linear4bit
from userip_fast.ops.nf4_dequantize import nf4_dequantize, nf4_dequantize_into
from userip_fast.ops.nf4_format import NF4Weight


def settle(model: nn.Module, mode: str, dtype: torch.dtype) -> None:
    """Brings the frozen linears of `model` into `mode`, in place.

    Args:
        model: As loaded: dense, or 4-bit as bitsandbytes or `quantize_linears` made it.
        mode: "resident", "streamed" or "fp8".
        dtype: Of the activations, to which weights are dequantised.

    Raises:
        UnsupportedError: The weights are not of a kind that can be brought into this mode.
        UnavailableError: The GPU cannot compute in this mode.
    """
    if mode == "streamed":
        stream_layers(model, dtype)
        return
    make_resident(model, dtype)
    if mode == "fp8":
        convert_linears(model)


def set_recompute(model: Any, on: bool) -> None:
    """Whether layers keep only their input for backward and run again there; bits do not change.

    The last layer keeps its activations: backward begins with it, so nothing is won by running it
    twice.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if on:
        # Nothing is random; attention is the same.
        settings = {
            "use_reentrant": False,
            "preserve_rng_state": False,
            "context_fn": partial(attention.again, model),
        }
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)(settings)
    # A layer recomputes where it is in training mode; the rest stays in eval mode, without dropout.
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[:-1]:
        layer.training = on


def make_resident(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every frozen linear of ours or bitsandbytes' by a dense one with the same values."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "dense_weight"):
            weight = module.dense_weight()
        elif is_linear4bit(module):
            weight = _bitsandbytes_weight(module)
        elif _is_linear8bit(module):
            weight = _int8_weight(module)
        else:
            continue
        model.set_submodule(name, dense_linear(weight.to(dtype), module.bias))


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen `nn.Linear` around a weight [N, K]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return linear.eval()


def _bitsandbytes_weight(module: Any) -> Tensor:
    """FP4 too, which is not ours to decode."""
    state = module.weight.quant_state
    if state.quant_type == "nf4":
        return nf4_dequantize(NF4Weight.from_bnb(module))
    import bitsandbytes.functional as bnb

    # As one row: on CPUs with AVX-512 bitsandbytes (0.50) takes every row for whole blocks.
    flat = copy.copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    weight: Tensor = bnb.dequantize_4bit(module.weight.data, flat)
    return weight.view(state.shape)


def _is_linear8bit(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Linear8bitLt" and kind.__module__.partition(".")[0] == "bitsandbytes"


def _int8_weight(module: Any) -> Tensor:
    """Rows of int8 [N, K] with the largest magnitude of each: 127 of what is stored."""
    largest = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    dense: Tensor = module.weight.data.float() * (largest.float() / 127)[:, None]
    return dense


def stream_layers(model: nn.Module, dtype: torch.dtype) -> LayerStream:
    """Replaces every 4-bit linear by one whose weight comes through a `LayerStream`.

    Raises:
        UnsupportedError: There is no 4-bit linear, or it is not NF4.
    """
    replace_linear4bit(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    if not linears:
        raise UnsupportedError(
            "lm.residency=streamed keeps weights in 4 bits, and this model has none; set "
            "lm.quantization=nf4-double, or lm.residency=resident"
        )
    layers: dict[str, list[str]] = {}
    for name in linears:
        layers.setdefault(layer_of(name), []).append(name)
    stream = LayerStream(
        [[linears[n].nf4_weight for n in names] for names in layers.values()], dtype
    )
    places = {n: (i, j) for i, names in enumerate(layers.values()) for j, n in enumerate(names)}
    for name, (i, j) in places.items():
        model.set_submodule(name, StreamedLinear(stream, i, j, linears[name].bias))
    return stream


class LayerStream:
    """Two dense buffers that layers pass through, on demand and one ahead.

    Which layer comes next follows from the last two asked for, so forward, backward and
    recomputation need no schedule of their own. At the turn from forward to backward both buffers
    hold what comes next already.

    Args:
        layers: 4-bit weights of each layer, in the order of the forward pass.
        dtype: To dequantise to.
    """

    def __init__(self, layers: Sequence[Sequence[NF4Weight]], dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype
        self.device = layers[0][0].packed.device
        size = max(sum(_padded(w.numel) for w in layer) for layer in layers)
        self.buffers = [torch.empty(size, dtype=dtype, device=self.device) for _ in range(2)]
        self.views: list[list[Tensor]] = [[], []]
        self.held = [-1, -1]  # which layer each buffer holds
        self.current = -1
        self.slot = 0
        self.decoded = 0  # layers dequantised so far
        self.side: Any = None
        if self.device.type == "cuda":
            self.side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.ready: list[Any] = [None, None]

    def weight(self, layer: int, index: int) -> Tensor:
        """[N, K] of one linear; good until a layer is asked for that is neither of the two held."""
        if layer != self.current:
            self._enter(layer)
        return self.views[self.slot][index]

    def joined(self, layer: int, first: int, count: int) -> Tensor:
        """[sum N, K] of `count` linears of one K that follow one another without a gap."""
        weight = self.weight(layer, first)
        rows = sum(w.shape[0] for w in self.layers[layer][first : first + count])
        return weight.as_strided((rows, weight.shape[1]), weight.stride(), weight.storage_offset())

    def _enter(self, layer: int) -> None:
        before = self.current
        if layer not in self.held:
            self._decode(layer, 1 - self.slot)
        self.current, self.slot = layer, self.held.index(layer)
        if self.side is None:
            return
        torch.cuda.current_stream(self.device).wait_event(self.ready[self.slot])
        ahead = layer + (1 if layer > before else -1)
        if 0 <= ahead < len(self.layers) and ahead not in self.held:
            self._decode(ahead, 1 - self.slot)

    def _decode(self, layer: int, slot: int) -> None:
        self.held[slot] = -1  # until it is full: an exception must not leave another layer's values
        self.views[slot], at = [], 0
        for weight in self.layers[layer]:
            flat = self.buffers[slot][at : at + weight.numel]
            self.views[slot].append(flat.view(weight.shape))
            at += _padded(weight.numel)
        if self.side is None:
            self._fill(layer, slot)
            self._holds(layer, slot)
            return
        # What still reads this buffer was enqueued before now, so the side stream waits for it.
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            self._fill(layer, slot)
            self.ready[slot] = self.side.record_event()
        self._holds(layer, slot)

    def _holds(self, layer: int, slot: int) -> None:
        self.held[slot] = layer
        self.decoded += 1

    def _fill(self, layer: int, slot: int) -> None:
        if self.device.type == "meta":
            return
        for weight, view in zip(self.layers[layer], self.views[slot], strict=True):
            nf4_dequantize_into(weight, view)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStream:
        # A copied model gets buffers of its own; the 4-bit weights are never written to.
        memo[id(self)] = copied = LayerStream(self.layers, self.dtype)
        return copied


def _padded(values: int) -> int:
    """Room for so many values, such that the next weight begins at a multiple of 64 values."""
    return -(-values // 64) * 64


class StreamedLinear(nn.Module):
    """`y = x W^T + bias`, W from a `LayerStream` both ways; only the input gets a gradient."""

    def __init__(self, stream: LayerStream, layer: int, index: int, bias: Tensor | None) -> None:
        super().__init__()
        self.stream, self.layer, self.index = stream, layer, index
        self.out_features, self.in_features = self.nf4_weight.shape
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().to(stream.dtype))

    @property
    def nf4_weight(self) -> NF4Weight:
        return self.stream.layers[self.layer][self.index]

    def dense_weight(self) -> Tensor:
        """[N, K] in the stream's dtype, as a tensor of its own."""
        return self.stream.weight(self.layer, self.index).clone()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the stream's dtype."""
        out: Tensor = _StreamedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        """Shape and place, shown by `print(model)`."""
        return f"{self.in_features}, {self.out_features}, layer={self.layer}"


class _StreamedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: StreamedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.stream.weight(linear.layer, linear.index), linear.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        linear = ctx.linear
        return grads[0] @ linear.stream.weight(linear.layer, linear.index), None

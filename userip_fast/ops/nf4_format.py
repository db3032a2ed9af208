"""The NF4 weight format, compatible with bitsandbytes to the bit: layout, quantiser, state dicts.

A weight [N, K] is flattened row by row and cut into blocks of `blocksize` values (which may cross
rows). A value is `NF4_LEVELS[code] * absmax[block]`; two 4-bit codes share a byte, the even element
in the high nibble. With double quantisation the scales are stored in 8 bits in blocks of 256:

    absmax[b] = nested_map[absmax_u8[b]] * nested_absmax[b // 256] + offset,   offset = mean(absmax)

bitsandbytes is the usual way in (`NF4Weight.from_bnb`), but nothing here needs it. Sources: QLoRA
(arXiv 2305.14314) for NF4 and double quantisation, arXiv 2110.02861 for the dynamic 8-bit map.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from userip_fast.core.errors import DataError, FormatError, UnavailableError, UnsupportedError

# Quantiles of the standard normal, normalised to [-1, 1] with an exact zero (QLoRA, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_STATE_KEY = "quant_state.bitsandbytes__nf4"


class Stored(NamedTuple):
    """A weight as operators take it."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: Tensor | None
    rows: int
    cols: int
    blocksize: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first five."""
        return self[:5]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(rows, cols, blocksize)."""
        return self[5:]


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """One frozen weight in NF4.

    Args:
        packed: [ceil(N * K / 2)] uint8, two codes per byte, even element in the high nibble.
        absmax: [ceil(N * K / blocksize)] float32, or uint8 with double quantisation.
        shape: (N, K) = (out_features, in_features).
        blocksize: Values per scale, one of `BLOCKSIZES`.
        dtype: dtype of the weight before quantisation, which is what it dequantises to by default.
        nested_absmax: [ceil(blocks / 256)] float32; this and the next two are None without double
            quantisation.
        nested_map: [256] float32, the value of each 8-bit code.
        offset: [] float32, mean of the scales.

    Raises:
        FormatError: A shape or dtype breaks the rules above.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    dtype: torch.dtype = torch.float32
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise FormatError(f"NF4Weight: shape must be (N, K) with N, K >= 1, got {self.shape}")
        if self.blocksize not in BLOCKSIZES:
            raise FormatError(
                f"NF4Weight: blocksize must be one of {BLOCKSIZES}, got {self.blocksize}"
            )
        if self.dtype not in DTYPES:
            raise FormatError(f"NF4Weight: dtype must be one of {DTYPES}, got {self.dtype}")
        blocks = math.ceil(self.numel / self.blocksize)
        _expect("packed", self.packed, torch.uint8, (math.ceil(self.numel / 2),))
        nested = (self.nested_absmax, self.nested_map, self.offset)
        if all(t is None for t in nested):
            _expect("absmax", self.absmax, torch.float32, (blocks,))
            return
        _expect("absmax", self.absmax, torch.uint8, (blocks,))
        groups = math.ceil(blocks / NESTED_BLOCKSIZE)
        _expect("nested_absmax", self.nested_absmax, torch.float32, (groups,))
        _expect("nested_map", self.nested_map, torch.float32, (256,))
        _expect("offset", self.offset, torch.float32, ())

    @property
    def numel(self) -> int:
        """Number of weight values, N * K."""
        return self.shape[0] * self.shape[1]

    @property
    def nested(self) -> bool:
        """Whether the scales are themselves quantised."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """(packed, absmax, nested_absmax, nested_map, offset)."""
        return self.stored().tensors

    def stored(self) -> Stored:
        """As operators take it."""
        return Stored(
            self.packed, self.absmax, self.nested_absmax, self.nested_map, self.offset,
            *self.shape, self.blocksize,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device; dtypes never change."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=move(self.nested_absmax),
            nested_map=move(self.nested_map),
            offset=move(self.offset),
        )

    @classmethod
    def quantize(cls, weight: Tensor, *, blocksize: int = 64, nested: bool = True) -> NF4Weight:
        """Quantises a weight, with the bits that bitsandbytes gives on CPU.

        Args:
            weight: [N, K] fp32, bf16 or fp16, finite.
            blocksize: Values per scale, one of `BLOCKSIZES`.
            nested: Quantise the scales too (double quantisation).

        Raises:
            DataError: `weight` is not a finite matrix of such a dtype.
        """
        if weight.dim() != 2 or weight.numel() == 0 or weight.dtype not in DTYPES:
            raise DataError(
                f"NF4Weight.quantize: weight must be a non-empty matrix of one of {DTYPES}, got "
                f"{weight.dtype} {tuple(weight.shape)}"
            )
        if blocksize not in BLOCKSIZES:
            raise DataError(f"NF4Weight.quantize: blocksize {blocksize} is not in {BLOCKSIZES}")
        if not bool(torch.isfinite(weight).all()):
            raise DataError("NF4Weight.quantize: weight holds NaN or infinity")
        packed, absmax = _quantize_4bit(weight.detach(), blocksize)
        shape = (weight.shape[0], weight.shape[1])
        if not nested:
            return cls(packed, absmax, shape, blocksize, weight.dtype)
        offset = absmax.mean()
        nested_map = dynamic_map().to(weight.device)
        codes, nested_absmax = _quantize_8bit(absmax - offset, nested_map)
        return cls(packed, codes, shape, blocksize, weight.dtype, nested_absmax, nested_map, offset)

    @classmethod
    def from_bnb(cls, source: Any) -> NF4Weight:
        """Reads a quantised `bitsandbytes.nn.Linear4bit` or `Params4bit`; memory is shared.

        Raises:
            UnsupportedError: Not quantised yet, not NF4, or already repacked for AVX512-BF16.
        """
        params = getattr(source, "weight", source)
        state = getattr(params, "quant_state", None) or getattr(source, "quant_state", None)
        if state is None:
            raise UnsupportedError(
                "NF4Weight.from_bnb: the layer is not quantised; move it to a device first "
                "(bitsandbytes quantises in `.to(device)`)"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedError(
                "NF4Weight.from_bnb: bitsandbytes has repacked this weight for AVX512-BF16, which "
                "loses the double quantisation; convert before the first forward pass, or set "
                "`support_avx512bf16_for_cpu = False` on every Linear4bit after loading"
            )
        if state.quant_type != "nf4":
            raise UnsupportedError(
                f"NF4Weight.from_bnb: quant_type must be 'nf4', got {state.quant_type!r}"
            )
        nested: dict[str, Tensor] = {}
        if state.nested:
            if state.state2.blocksize != NESTED_BLOCKSIZE:
                raise UnsupportedError(
                    f"NF4Weight.from_bnb: nested blocksize must be {NESTED_BLOCKSIZE}, got "
                    f"{state.state2.blocksize}"
                )
            nested = {
                "nested_absmax": state.state2.absmax.float(),
                "nested_map": state.state2.code.float(),
                "offset": state.offset.float().reshape(()),
            }
        _check_levels(state.code)
        return cls(
            packed=params.detach().data.contiguous().view(torch.uint8).reshape(-1),
            absmax=state.absmax if state.nested else state.absmax.float(),
            shape=tuple(state.shape),
            blocksize=state.blocksize,
            dtype=state.dtype,
            **nested,
        )

    def to_bnb(self) -> Any:
        """The same weight as a `bitsandbytes.nn.Params4bit`.

        Raises:
            UnavailableError: bitsandbytes is not installed.
        """
        try:
            from bitsandbytes.nn import Params4bit
        except ImportError as e:
            raise UnavailableError(
                "NF4Weight.to_bnb: bitsandbytes is not installed; pip install bitsandbytes"
            ) from e
        state = self.state_dict()
        data = state.pop("weight")
        return Params4bit.from_prequantized(data, state, device=self.packed.device)

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """Tensors under the key names of a bitsandbytes 4-bit checkpoint."""
        info: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.shape,
        }
        device = self.packed.device
        out = {
            prefix: self.packed.unsqueeze(1),
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": torch.tensor(NF4_LEVELS, device=device),
        }
        if self.nested:
            assert self.nested_absmax is not None
            assert self.nested_map is not None
            assert self.offset is not None
            info |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.offset.item(),
            }
            out[f"{prefix}.nested_absmax"] = self.nested_absmax
            out[f"{prefix}.nested_quant_map"] = self.nested_map
        blob = json.dumps(info).encode()
        out[f"{prefix}.{_STATE_KEY}"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        return out

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> NF4Weight:
        """Reads what `state_dict` (ours or bitsandbytes') wrote; other keys are left alone.

        Raises:
            FormatError: A key is missing, or a value does not fit the others.
        """
        try:
            blob = bytes(state[f"{prefix}.{_STATE_KEY}"].cpu().numpy().tobytes())
            info = json.loads(blob)
            packed = state[prefix].contiguous().view(torch.uint8).reshape(-1)
            absmax = state[f"{prefix}.absmax"]
            _check_levels(state[f"{prefix}.quant_map"])
            shape = (int(info["shape"][0]), int(info["shape"][1]))
            dtype = {str(d).removeprefix("torch."): d for d in DTYPES}[info["dtype"]]
            nested: dict[str, Tensor] = {}
            if "nested_offset" in info:
                if info["nested_blocksize"] != NESTED_BLOCKSIZE:
                    raise FormatError(
                        f"{prefix}: nested_blocksize must be {NESTED_BLOCKSIZE}, got "
                        f"{info['nested_blocksize']}"
                    )
                nested = {
                    "nested_absmax": state[f"{prefix}.nested_absmax"],
                    "nested_map": state[f"{prefix}.nested_quant_map"],
                    "offset": torch.tensor(float(info["nested_offset"]), device=packed.device),
                }
            return cls(packed, absmax, shape, int(info["blocksize"]), dtype, **nested)
        except FormatError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
            raise FormatError(f"{prefix}: not an NF4 weight of a 4-bit checkpoint ({e!r})") from e


def _expect(name: str, t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t is None or t.dtype != dtype or tuple(t.shape) != shape:
        got = "None" if t is None else f"{t.dtype} {tuple(t.shape)}"
        raise FormatError(f"NF4Weight: {name} must be {dtype} {shape}, got {got}")


def _check_levels(quant_map: Tensor) -> None:
    if quant_map.tolist() != torch.tensor(NF4_LEVELS).tolist():
        raise FormatError("NF4Weight: the checkpoint's quant_map is not the NF4 table")


@functools.cache
def dynamic_map() -> Tensor:
    """[256] float32, ascending: the signed dynamic 8-bit map for scales (arXiv 2110.02861).

    Seven decades 1e-6 .. 1; decade i holds 2**i evenly spaced magnitudes of either sign, so that
    large values get most codes. Zero and one are exact.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        magnitudes = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += magnitudes + [-x for x in magnitudes]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize_4bit(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """packed [ceil(n / 2)] uint8 and absmax [ceil(n / blocksize)] fp32 of the nearest NF4 codes."""
    flat = weight.reshape(-1).float()
    full = flat.numel() // blocksize * blocksize
    absmax = flat[:full].view(-1, blocksize).abs().amax(1)
    # The guard keeps an all-zero block at zero. bitsandbytes multiplies whole blocks by the
    # reciprocal but divides the last partial one: the rounding differs, so we do the same.
    scaled = (flat[:full].view(-1, blocksize) * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if full < flat.numel():
        last = flat[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, flat[full:] / last])
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(scaled.clamp_(-1, 1), midpoints, out_int32=True).to(torch.uint8)
    if codes.numel() % 2:  # the spare nibble gets the code of 0.0
        codes = torch.cat([codes, codes.new_tensor([NF4_LEVELS.index(0.0)])])
    return (codes[::2] << 4) | codes[1::2], absmax


def _quantize_8bit(values: Tensor, code_values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n] uint8 and absmax [ceil(n / 256)] fp32, in blocks of 256.

    bitsandbytes looks the code up in a table of 65536 steps over [-1, 1]; near a midpoint that is
    not always the nearest code, so the same steps are taken here, in the same fp32 operations.
    """
    n = values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax = padded.abs().amax(1)
    scaled = (padded * (1.0 / absmax)[:, None]).clamp_(-1, 1)
    steps = 65535
    grid = torch.arange(steps + 1, device=values.device).mul(2.0).div_(steps).add_(-1.0)
    midpoints = 0.5 * (code_values[:-1] + code_values[1:])
    table = torch.bucketize(grid, midpoints).to(torch.uint8)
    half = ((scaled + 1.0) * 0.5).double()  # double: the multiply-add is one rounding (FMA)
    index = (half * steps + 0.5).float().nan_to_num_(0.0).long()  # NaN: an all-zero block
    codes = torch.where((absmax == 0)[:, None], 0, table[index])
    return codes.view(-1)[:n].to(torch.uint8), absmax

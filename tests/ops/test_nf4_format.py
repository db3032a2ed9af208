"""The NF4 format against bitsandbytes on CPU, bit for bit."""

import copy

import pytest
import torch

from userip_fast.core.errors import DataError, FormatError, UnsupportedError
from userip_fast.core.files import read_tensors, write_tensors
from userip_fast.ops import nf4_dequantize
from userip_fast.ops.nf4_format import BLOCKSIZES, NF4_LEVELS, NF4Weight, dynamic_map

bnb = pytest.importorskip("bitsandbytes", reason="the oracle of the format is bitsandbytes")


@pytest.fixture(autouse=True)
def _no_compilation():
    """bitsandbytes compiles its path for odd shapes: half a minute for the same bits."""
    with torch.compiler.set_stance("force_eager"):
        yield


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks that cross rows, a last partial block, an odd number of values, many groups of 256 scales.
SHAPES = [(1, 1), (3, 7), (33, 71), (64, 64), (7, 330), (513, 258)]


def make(shape, dtype, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weight[0, : shape[1] // 2] = 0  # whole blocks of zeros in the wider shapes
    return weight.to(dtype)


def decoded(packed, state):
    """By bitsandbytes, as one row: its AVX-512 code (0.50) takes every row for whole blocks."""
    flat = copy.copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    return bnb.functional.dequantize_4bit(packed, flat).view(state.shape)


def bits_equal(a, b):
    return a.dtype == b.dtype and torch.equal(a.reshape(-1), b.reshape(-1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_and_dequantise_have_bitsandbytes_bits(shape, dtype, nested):
    for blocksize in (32, 64, 256, 4096):
        weight = make(shape, dtype)
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
        )
        ours = NF4Weight.quantize(weight, blocksize=blocksize, nested=nested)
        assert bits_equal(ours.packed, packed)
        assert bits_equal(ours.absmax, state.absmax)
        if nested:
            assert bits_equal(ours.nested_absmax, state.state2.absmax)
            assert bits_equal(ours.nested_map, state.state2.code)
            assert bits_equal(ours.offset, state.offset)
        if packed.numel() > 1:  # bitsandbytes reads a single byte as a transposed weight
            assert bits_equal(
                nf4_dequantize(ours, impl="reference"),
                decoded(packed, state),
            )


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(blocksize):
    weight = make((90, 200), torch.float32)
    packed, _ = bnb.functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    assert bits_equal(NF4Weight.quantize(weight, blocksize=blocksize).packed, packed)


def test_tables():
    assert torch.equal(dynamic_map(), bnb.functional.create_dynamic_map())
    assert torch.equal(torch.tensor(NF4_LEVELS), bnb.functional.get_4bit_type("nf4", device="cpu"))


def layer(nested=True, shape=(48, 80), bias=True, **kwargs):
    torch.manual_seed(1)
    module = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=bias, quant_type="nf4", compress_statistics=nested, **kwargs
    )
    return module.to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_from_bnb_shares_memory_and_to_bnb_gives_it_back(nested, storage):
    module = layer(nested, quant_storage=storage)
    weight = NF4Weight.from_bnb(module)
    assert weight.packed.data_ptr() == module.weight.data_ptr()
    assert weight.nested == nested
    assert bits_equal(
        nf4_dequantize(weight),
        decoded(module.weight.data, module.weight.quant_state),
    )
    back = weight.to_bnb()
    assert bits_equal(back.data, module.weight.data.view(torch.uint8))
    assert back.quant_state == module.weight.quant_state


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_has_bitsandbytes_keys_and_bytes(nested, tmp_path):
    module = layer(nested)
    theirs = {k: v for k, v in module.state_dict().items() if k.startswith("weight")}
    ours = NF4Weight.from_bnb(module).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(bits_equal(ours[k], theirs[k]) for k in ours)
    write_tensors(tmp_path / "w.safetensors", theirs)
    loaded = NF4Weight.from_state_dict(read_tensors(tmp_path / "w.safetensors"))
    assert bits_equal(nf4_dequantize(loaded), nf4_dequantize(NF4Weight.from_bnb(module)))


def test_damaged_state_dicts_are_refused():
    good = NF4Weight.quantize(make((48, 80), torch.float32)).state_dict()
    blob = "weight.quant_state.bitsandbytes__nf4"

    def broken(**changes):
        state = {k: v.clone() for k, v in good.items()}
        for key, value in changes.items():
            state[key] = value
        return state

    for key in good:
        state = dict(good)
        del state[key]
        with pytest.raises(FormatError, match="weight"):
            NF4Weight.from_state_dict(state)
    cases = [
        broken(weight=good["weight"][:-1]),
        broken(**{"weight.absmax": good["weight.absmax"][:-1]}),
        broken(**{"weight.absmax": good["weight.absmax"].float()}),
        broken(**{"weight.quant_map": good["weight.quant_map"] + 1}),
        broken(**{blob: good[blob][:-3]}),
        broken(**{blob: torch.tensor(list(b"[]"), dtype=torch.uint8)}),
    ]
    for state in cases:
        with pytest.raises(FormatError):
            NF4Weight.from_state_dict(state)


def test_bad_input_is_named():
    with pytest.raises(DataError, match="NaN"):
        NF4Weight.quantize(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(DataError, match="blocksize 48"):
        NF4Weight.quantize(torch.ones(2, 2), blocksize=48)
    with pytest.raises(DataError, match="non-empty matrix"):
        NF4Weight.quantize(torch.ones(3))
    with pytest.raises(UnsupportedError, match="not quantised"):
        NF4Weight.from_bnb(bnb.nn.Linear4bit(8, 8, quant_type="nf4"))
    with pytest.raises(UnsupportedError, match="'fp4'"):
        NF4Weight.from_bnb(bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu"))


def test_avx512_bf16_repacking_is_refused():
    module = layer(shape=(64, 64))
    before = nf4_dequantize(NF4Weight.from_bnb(module))
    taken = NF4Weight.from_bnb(module)
    module.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(
        module.weight.data, copy.copy(module.weight.quant_state)
    )
    assert bits_equal(nf4_dequantize(taken), before)  # what was read before stays good
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedError, match="support_avx512bf16_for_cpu = False"):
        NF4Weight.from_bnb(module)

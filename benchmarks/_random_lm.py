"""Random language models of published shapes, made where they are needed: nothing is downloaded.

Weights are drawn on the device, 4-bit ones as their bytes, so that a 7B model stands in seconds and
no time goes into quantising it. What such a model says means nothing; what a step of it takes does.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from userip_fast.lm import FrozenLM
from userip_fast.lm.attention import NAME, register
from userip_fast.lm.fuse import fuse
from userip_fast.lm.layers import layer_of
from userip_fast.lm.nf4 import NF4Linear, swap_modules
from userip_fast.lm.residency import settle
from userip_fast.ops.nf4_format import NESTED_BLOCKSIZE, NF4Weight, dynamic_map

_ABSMAX, _SPREAD = 0.036, 0.004  # such that values have the standard deviation of Llama's, 0.02


class NoTokenizer:
    """Stands in for a tokenizer: what is read is made of token ids."""

    def get_vocab(self) -> dict[str, int]:
        return {}


def shapes() -> dict[str, Any]:
    """Configurations by name, as published; `tiny` is for trying scripts out."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    return {
        "llama-2-7b": LlamaConfig(),
        "qwen2.5-0.5b": Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, vocab_size=151936,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        "qwen3-0.6b": Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128,
            num_attention_heads=16, num_key_value_heads=8, vocab_size=151936,
            tie_word_embeddings=True,
        ),
        "llama-3-70b": LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256,
            num_attention_heads=64, num_key_value_heads=8, rope_theta=500000.0,
        ),
        "tiny": LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512,
            num_attention_heads=4, num_key_value_heads=2,
        ),
    }  # fmt: skip


def random_nf4(shape: tuple[int, int], device: Any, dtype: torch.dtype) -> NF4Weight:
    """A weight [N, K] in NF4 with double quantisation, of random bytes."""
    blocks = -(-shape[0] * shape[1] // 64)

    def full(count: int, value: float) -> torch.Tensor:
        return torch.full((count,), value, device=device)

    return NF4Weight(
        torch.randint(256, (-(-shape[0] * shape[1] // 2),), dtype=torch.uint8, device=device),
        torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        shape,
        dtype=dtype,
        nested_absmax=full(-(-blocks // NESTED_BLOCKSIZE), _SPREAD),
        nested_map=dynamic_map().to(device),
        offset=full(1, _ABSMAX)[0],
    )


def to_nf4(model: nn.Module) -> None:
    """Puts random 4-bit weights in the place of the layers' dense ones, one after another."""
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and layer_of(name) != name
    ]
    for name in names:  # of these no two dense ones are held beside their 4-bit ones

        def four_bit(m: Any) -> NF4Linear:
            weight = m.weight
            return NF4Linear(random_nf4(tuple(weight.shape), weight.device, weight.dtype), m.bias)

        swap_modules(model, lambda n, _, name=name: n == name, four_bit)


def random_model(config: Any, device: str, dtype: torch.dtype, attention: str = NAME) -> Any:
    """A frozen Hugging Face model with weights drawn on `device`."""
    from transformers import AutoModelForCausalLM

    register()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=attention, dtype=dtype
        )
    return model.requires_grad_(False).eval()


def random_lm(
    config: Any, device: str, dtype: torch.dtype, residency: str = "resident"
) -> FrozenLM:
    """As `FrozenLM.load` leaves one: settled in `residency`, element-wise parts fused."""
    model = random_model(config, device, dtype)
    if residency == "streamed":
        to_nf4(model)
    settle(model, residency, dtype)
    fuse(model, "auto" if device == "cuda" else "reference")
    four_bit = "nf4-double" if residency == "streamed" else "none"
    return FrozenLM(model, NoTokenizer(), source="random", quantization=four_bit)

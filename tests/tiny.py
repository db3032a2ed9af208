"""Tiny models and behaviours that tests share."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from userip_fast.lm import FrozenLM
from userip_fast.lm.attention import register
from userip_fast.prompts.layout import Layout, ProfileField, PromptTemplate, tokenize_events
from userip_fast.prompts.packing import Behaviour, build_behaviour

TEXTS = [
    "red rod", "blue reel", "cheap tent and a long rope", "lamp", "old brass compass", "paint",
]  # fmt: skip


def write_log(folder: Path, users: int) -> None:
    """log.parquet and items.parquet: three rated events of each of so many users."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    user = np.repeat(np.arange(users), 3)
    log = {
        "user_id": user,
        "item_id": random.integers(0, len(TEXTS), len(user)),
        "rating": random.integers(1, 6, len(user)),
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    items = pa.table({"item_id": range(len(TEXTS)), "title": TEXTS})
    pq.write_table(items, folder / "items.parquet")


@cache
def tokenizer(bos: bool = True) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(["; " + t + ": liked" for t in TEXTS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **({"bos_token": "<s>"} if bos else {}))


def config(family: str) -> Any:
    import transformers as tf

    common = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    grouped = {**common, "num_key_value_heads": 2}
    return {
        "llama": lambda: tf.LlamaConfig(**grouped),
        "llama_tied": lambda: tf.LlamaConfig(**grouped, tie_word_embeddings=True),
        "mistral": lambda: tf.MistralConfig(**grouped, sliding_window=8, head_dim=8),
        "qwen2": lambda: tf.Qwen2Config(**grouped),
        "qwen2_window": lambda: tf.Qwen2Config(
            **grouped, use_sliding_window=True, sliding_window=8, max_window_layers=1,
        ),
        "qwen3": lambda: tf.Qwen3Config(**grouped, head_dim=8),
        "gemma2": lambda: tf.Gemma2Config(
            **grouped, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
            attn_logit_softcapping=4.0, final_logit_softcapping=8.0,
        ),
        "gemma3": lambda: tf.Gemma3TextConfig(
            **{**grouped, "num_hidden_layers": 3}, head_dim=8, sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        "gpt2": lambda: tf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=320, n_positions=256,
            bos_token_id=0, eos_token_id=None,
        ),
    }[family]()  # fmt: skip


FAMILIES = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"]


def model(family: str, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> Any:
    """A random model whose weights are large enough for attention and loss to be far from flat."""
    from transformers import AutoModelForCausalLM

    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = AutoModelForCausalLM.from_config(
            copy.deepcopy(config(family)), attn_implementation="userip_packed", dtype=dtype
        )
        with torch.no_grad():
            for name, p in made.named_parameters():
                if p.dim() > 1:
                    p.mul_(scale)
                elif "bias" in name:
                    p.normal_(0, 0.1)
    return made


def frozen(family: str, dtype: torch.dtype = torch.float32) -> FrozenLM:
    return FrozenLM(model(family, dtype), tokenizer(), source=family, quantization="none")


def save(family: str, folder: Path) -> Path:
    model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def template(fields: int = 2, m: int = 1) -> PromptTemplate:
    prompts = ["The user's hobby is", "", "spending level", "likes"] * 2
    return PromptTemplate(
        tuple(ProfileField(f"f{j}", prompts[j], m, 3, ("rod", "lamp")) for j in range(fields))
    )


def behaviour(
    layout: Layout, users: int = 5, *, context: str = "sequence", feedback: bool = True,
    text_weight: float = 0.5, max_tokens: int = 100, chunk_tokens: int | None = None,
) -> Behaviour:  # fmt: skip
    """Ragged histories of 1 to 6 events."""
    words = [["liked", "disliked"][i % 2] for i in range(len(TEXTS))] if feedback else None
    shape = "{text}: {feedback}" if feedback else "{text}"
    table = tokenize_events(tokenizer(), TEXTS, words, shape, "; ")
    random = np.random.default_rng(0)
    lengths = random.integers(1, 7, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return build_behaviour(
        table, random.integers(0, len(TEXTS), offsets[-1]), offsets, layout, max_tokens=max_tokens,
        chunk_tokens=chunk_tokens, context=context, text_weight=text_weight, feedback_weight=1.0,
    )  # fmt: skip

"""Families of language models: each is exact or refused by name, and never a traceback.

python tests/lm/test_families.py > docs/families.md
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script

import tiny
import torch

from userip_fast.config import LMConfig
from userip_fast.doctor import FIELDS, diagnose
from userip_fast.errors import UnsupportedError
from userip_fast.lm import FrozenLM, PackedEngine, ReferenceEngine
from userip_fast.packing import make_pack
from userip_fast.prompts import PromptTemplate

DOCS = Path(__file__).resolve().parents[2] / "docs" / "families.md"
COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 320,
       "bos_token_id": 0, "eos_token_id": None}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}  # fmt: skip
WINDOW = {"head_dim": 8, "sliding_window": 8}
MLA = {"num_key_value_heads": 4, "n_routed_experts": 4, "q_lora_rank": 16, "kv_lora_rank": 8,
       "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "n_group": 1,
       "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
PER_LAYER = {"head_dim": 8, "sliding_window": 8, "vocab_size_per_layer_input": 320,
             "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4,
             "layer_types": ["sliding_attention", "full_attention"],
             "intermediate_size": [64, 64], "activation_sparsity_pattern": [0.0, 0.0]}  # fmt: skip
LINEAR = {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
CHUNKS = {"head_dim": 8, "attention_chunk_size": 8, "interleave_moe_layer_step": 1,
          "intermediate_size_mlp": 64}  # fmt: skip
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 320,
       "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256}  # fmt: skip


def rope(kind: str, **others: float) -> dict[str, Any]:
    longest = {} if kind == "dynamic" else {"original_max_position_embeddings": 64}
    about = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **longest, **others}
    return {"rope_parameters": about}


def of(name: str, common: dict[str, Any] = COMMON, **others: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, f"{name}Config")(**{**common, **others})


EXACT: dict[str, Callable[[], Any]] = {
    "Llama": of("Llama"),
    "Llama, llama3 rope": of(
        "Llama", **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "Llama, yarn rope": of("Llama", **rope("yarn")),
    "Mistral": of("Mistral", **WINDOW),
    "Ministral": of("Ministral", **WINDOW),
    "Qwen2": of("Qwen2"),
    "Qwen3": of("Qwen3", head_dim=8),
    "Gemma": of("Gemma", head_dim=8),
    "Gemma 2": of("Gemma2", **WINDOW, query_pre_attn_scalar=8),
    "Gemma 3": of("Gemma3Text", **WINDOW),
    "Phi": of("Phi"),
    "Phi-3": of("Phi3"),
    "SmolLM3": of("SmolLM3"),
    "OLMo": of("Olmo"),
    "OLMo 2": of("Olmo2"),
    "OLMo 3": of("Olmo3", sliding_window=8),
    "StarCoder2": of("Starcoder2"),
    "GLM": of("Glm", head_dim=8),
    "GLM-4": of("Glm4", head_dim=8),
    "GPT-NeoX": of("GPTNeoX"),
    "GPT-2": of("GPT2", GPT),
    "GPT-BigCode": of("GPTBigCode", GPT),
    "GPT-J": of("GPTJ", GPT, rotary_dim=4),
    "CodeGen": of("CodeGen", GPT, rotary_dim=4),
    "OPT": of("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "EXAONE 4": of("Exaone4", sliding_window=8),
    "ERNIE 4.5": of("Ernie4_5"),
    "Helium": of("Helium", head_dim=8),
    "Granite": of("Granite", logits_scaling=8.0),
    "Cohere": of("Cohere", logit_scale=0.0625),
    "Cohere 2": of("Cohere2", sliding_window=8, logit_scale=0.0625),
    "Mixtral": of("Mixtral", **EXPERTS),
    "Qwen2-MoE": of("Qwen2Moe", **EXPERTS),
    "Qwen3-MoE": of("Qwen3Moe", **EXPERTS, head_dim=8),
    "PhiMoE": of("Phimoe", **EXPERTS),
    "OLMoE": of("Olmoe", **EXPERTS),
}  # fmt: skip
INTERFACE = "does not call attention through transformers' attention interface"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "Llama, dynamic rope": (of("Llama", **rope("dynamic")), "rope type 'dynamic'"),
    "Gemma 3n": (of("Gemma3nText", **PER_LAYER), "Gemma3nForCausalLM cannot be run on packed rows"),
    "Gemma 4, heads of 512": (of("Gemma4Text", **WINDOW), "head size must be 8 to 256"),
    "DeepSeek-V3 (MLA)": (of("DeepseekV3", **EXPERTS, **MLA), "soft_prompt_attention: v must be"),
    "gpt-oss": (of("GptOss", **EXPERTS, **WINDOW), "asks attention for 's_aux'"),
    "Nemotron": (of("Nemotron"), "does not pass keyword arguments on to attention"),
    "DiffLlama": (of("DiffLlama"), "tells attention of sliding windows"),
    "Llama-4": (of("Llama4Text", **EXPERTS, **CHUNKS), "layers of type 'chunked_attention'"),
    "Qwen3-Next": (of("Qwen3Next", **EXPERTS, **LINEAR), INTERFACE),
    "GPT-Neo": (of("GPTNeo", NEO), INTERFACE),
    "Falcon": (of("Falcon"), INTERFACE),
    "StableLM": (of("StableLm"), INTERFACE),
    "Bloom": (of("Bloom", {}, hidden_size=32, n_layer=2, n_head=4, vocab_size=320), INTERFACE),
    "MPT": (of("Mpt", {}, d_model=32, n_layers=2, n_heads=4, vocab_size=320), INTERFACE),
    "Mamba": (of("Mamba", {}, hidden_size=32, num_hidden_layers=2, vocab_size=320), INTERFACE),
    "Jamba": (of("Jamba", **EXPERTS), INTERFACE),
    "BERT": (of("Bert"), "lets a token see later ones"),
}
BY_REFERENCE = {"gpt-oss", "Nemotron", "DiffLlama"}
"""Where the message says that em.engine=reference can."""


def saved(make: Callable[[], Any], folder: Path) -> str:
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(make())
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)  # so that attention and loss are far from flat
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def load(make: Callable[[], Any], folder: Path) -> FrozenLM:
    return FrozenLM.load(saved(make, folder), LMConfig(quantization="none"))


@pytest.mark.parametrize("family", EXACT)
def test_packed_users_are_read_as_float64_reads_each_alone(family: str, tmp_path: Path) -> None:
    lm = load(EXACT[family], tmp_path)
    PackedEngine(lm, PromptTemplate(FIELDS).layout(lm.tokenizer))
    failed = [c for c in diagnose(lm, users=3) if not c.passed]
    assert failed == []


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_by_name(family: str, tmp_path: Path, caplog: Any) -> None:
    make, why = REFUSED[family]
    layout = PromptTemplate(FIELDS).layout(tiny.tokenizer())
    with pytest.raises(UnsupportedError, match=re.escape(why)) as found:
        PackedEngine(load(make, tmp_path), layout)
    assert "\n" not in str(found.value)
    assert ("em.engine=reference" in str(found.value)) is (family in BY_REFERENCE)


@pytest.mark.parametrize("family", sorted(BY_REFERENCE))
def test_the_reference_engine_reads_them_where_the_message_says_so(
    family: str, tmp_path: Path
) -> None:
    lm = load(REFUSED[family][0], tmp_path)
    layout = tiny.template().layout(lm.tokenizer)
    behaviour = tiny.behaviour(layout, 3)
    pack = make_pack(behaviour, [0, 1, 2], layout, lm.device)
    theta = torch.zeros(3, layout.num_soft, lm.hidden_size).requires_grad_()
    nll = ReferenceEngine(lm, layout).nll(pack, theta)
    assert (nll > 0).all()
    assert torch.autograd.grad(nll.sum(), theta)[0].isfinite().all()


def test_a_trace_or_fusion_that_fails_is_told_and_left_out(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="userip_fast.lm"):
        lm = load(REFUSED["gpt-oss"][0], tmp_path)
    assert lm.plan is None
    assert "what a step takes cannot be predicted (UnsupportedError: GptOss" in caplog.text
    assert "GptOssAttention (model.layers.0.self_attn) cannot be fused (" in caplog.text
    attention = lm.model.model.layers[0].self_attn
    assert "forward" not in attention.__dict__


def table() -> str:
    lines = [
        "# Which language models load",
        "",
        "Written by `python tests/lm/test_families.py`, whose tests load a small random model of",
        "each. Exact: NLL and theta gradient of packed users are those of a float64 copy that",
        "reads one user at a time, within float32's own rounding (`userip doctor` on your model).",
        "In mixtures of experts company decides how sums are rounded: last bits of a user move.",
        "",
        "| family | |",
        "|---|---|",
    ]
    lines += [f"| {family} | exact |" for family in EXACT]
    for family, (_, why) in REFUSED.items():
        other = "; `em.engine=reference` reads it" if family in BY_REFERENCE else ""
        lines.append(f"| {family} | refused: {why}{other} |")
    return "\n".join(lines)


def test_the_page_is_of_these_tests() -> None:
    assert DOCS.read_text().rstrip("\n") == table()


if __name__ == "__main__":
    print(table())

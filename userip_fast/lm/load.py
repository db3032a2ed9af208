"""From a folder, a hub id or a GGUF file to a frozen LM whose weights are kept as memory allows."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from userip_fast.core.config import LMConfig
from userip_fast.core.errors import ConfigError, UnavailableError, UnsupportedError
from userip_fast.core.quiet import quiet_libraries
from userip_fast.lm import attention, bf16_gate, fp8_gate, gguf, stored
from userip_fast.lm.foldin import FoldIn
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.fuse import fuse, pays
from userip_fast.lm.memory import budget_bytes, choose
from userip_fast.lm.nf4 import is_linear4bit, quantize_linears
from userip_fast.lm.residency import set_recompute, settle
from userip_fast.lm.stored import first_line, told
from userip_fast.lm.trace import Architecture, Workload

logger = logging.getLogger("userip_fast.lm")

_LOADING = threading.Lock()


@quiet_libraries()
def open_lm(path: str, config: LMConfig | None = None, work: Workload | None = None) -> FrozenLM:
    """Loads a model folder or hub id, and settles how its weights are kept.

    Args:
        path: A folder in Hugging Face format, a hub id, a GGUF file or a folder with one, or a
            short name (`userip_fast.lm.gguf`).
        config: Quantisation, dtype, device, residency; whether to read all bytes again.
        work: What an E-step will ask of it; decides what fits into memory.

    Raises:
        ConfigError: It does not fit, in any way allowed.
        UnsupportedError: The model is not a causal LM that can be read through embeddings and
            the attention interface, or its weights do not allow the residency asked for, or FP8
            changes what it says; the text names the property.
        UnavailableError: The GPU lacks FP8, or a 4-bit checkpoint needs bitsandbytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = config or LMConfig()
    file = gguf.file_of(path)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if file is None:
        stored.check_path(path)
    else:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    attention.register()
    device = resolve_device(config.device)
    dtype = _resolve_dtype(config.dtype, device)
    remote = {"trust_remote_code": config.trust_remote_code}
    with told(f"LM {path!r} cannot be loaded"):
        hf_config = AutoConfig.from_pretrained(**where, **remote)
        tokenizer = AutoTokenizer.from_pretrained(**where, **remote)
    packed = getattr(hf_config, "quantization_config", None)
    quantization = config.quantization.replace("auto", "nf4-double" if file is None else "none")
    if packed:
        quantization = stored.quantization_of(path, packed)
    # Of a GGUF file we quantise, not bitsandbytes: it takes part in transformers' own loading.
    bitsandbytes = file is None and importlib.util.find_spec("bitsandbytes") is not None
    if packed and not bitsandbytes:
        raise UnavailableError(
            f"LM {path!r} is stored as {quantization} by bitsandbytes, which is not "
            "installed: pip install bitsandbytes accelerate"
        )
    kwargs: dict[str, Any] = {"attn_implementation": attention.NAME, "dtype": dtype, **remote}
    if not packed and quantization.startswith("nf4") and bitsandbytes:
        kwargs["quantization_config"] = _bnb_config(quantization, dtype)
    if device.type == "cuda":
        kwargs["device_map"] = {"": device}
    # transformers makes models under switches of the whole process.
    with told(f"LM {path!r} cannot be loaded"), _LOADING:
        model, info = AutoModelForCausalLM.from_pretrained(
            **where, output_loading_info=True, **kwargs
        )
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedError(
            f"LM {path!r} is no causal LM of class {type(model).__name__}: its files lack "
            f"{missing[0]} and {len(missing) - 1} other weights"
        )
    for module in model.modules():
        if is_linear4bit(module):
            # On AVX512-BF16 its first forward pass would repack the weight, with other values.
            module.support_avx512bf16_for_cpu = False
    _check_finite(path, model)
    if not packed and quantization.startswith("nf4") and not bitsandbytes:
        quantize_linears(model, nested=quantization == "nf4-double")
    with told(f"LM {path!r} cannot be used"):  # its files may hold any value of any type
        lm = FrozenLM(model, tokenizer, source=str(path), quantization=quantization)
        lm.folder = file or stored.folder_of(path)
        lm.foldin = None if lm.folder is None else FoldIn.load(lm.folder)
        lm.fingerprint = stored.fingerprint(lm.folder, tokenizer, again=config.verify)
    _settle(lm, config, work or Workload())
    logger.info(
        "LM %s: %s, %s, %s, D=%d; %s",
        path,
        quantization,
        lm.dtype,
        lm.device,
        lm.hidden_size,
        lm.plan,
    )
    return lm


def _settle(lm: FrozenLM, config: LMConfig, work: Workload) -> None:
    """Decides residency, recomputation and pack size from memory, and carries it out."""
    four_bit = lm.quantization.startswith("nf4")
    fused = config.fused == "auto" and pays(lm.token_embedding)
    try:
        _make_plan(lm, config, work, four_bit, fused)
    except ConfigError:  # it does not fit
        raise
    except Exception as e:  # of a library's code for this family, on a device without memory
        lm.architecture = None
        logger.warning(
            "LM %s: what a step takes cannot be predicted (%s: %s); packs are as large as "
            "em.pack_tokens says",
            lm.source,
            type(e).__name__,
            first_line(e),
        )
    residency: str = "resident" if config.residency == "auto" else config.residency
    recompute = config.recompute == "on"
    if lm.plan is not None:
        residency, recompute = lm.plan.residency, lm.plan.recompute
    if residency == "fp8":
        lm.fp8_report = fp8_gate.settle_gated(lm)
    else:
        settle(lm.model, residency, lm.dtype)
    set_recompute(lm.model, recompute)
    if fused:
        logger.info("fused element-wise parts of %s", dict(fuse(lm.model)) or "no module")
        if config.memory_gib is None:  # trials hold more than the plan says
            _try_lossy(lm, config, work)


def _try_lossy(lm: FrozenLM, config: LMConfig, work: Workload) -> None:
    """Products that round more, unasked, where they pass."""
    if config.dtype == "auto":
        lm.bf16_report = bf16_gate.try_out(lm)
    plan = lm.plan
    if config.residency == "auto" and plan is not None and plan.residency == "resident":
        report = lm.fp8_report = fp8_gate.try_out(lm, work.of_size(plan.pack_tokens))
        if report is not None and report.passed:
            lm.plan = replace(plan, residency="fp8", reason=f"{plan.reason}; FP8: {report}")


def _make_plan(lm: FrozenLM, config: LMConfig, work: Workload, four_bit: bool, fused: bool) -> None:
    lm.architecture = Architecture(
        lm.model.config, lm.dtype, lm.device.type, four_bit=four_bit, fused=fused
    )
    budget = int((config.memory_gib or 0) * 2**30)
    if not budget:
        kept = (*lm.model.parameters(), *lm.model.buffers())
        held = {t.data_ptr(): t.nbytes for t in kept}
        budget = budget_bytes(lm.device) + sum(held.values())
    lm.plan = choose(
        lm.architecture,
        budget,
        work,
        residency=config.residency,
        recompute=config.recompute,
    )
    if lm.plan.pack_tokens < work.pack_tokens:
        logger.warning(
            "LM %s: em.pack_tokens=%d does not fit into memory; %s",
            lm.source,
            work.pack_tokens,
            lm.plan,
        )


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU (under torchrun each process's own) where there is one, else CPU."""
    if name == "auto":
        own = f":{os.environ['LOCAL_RANK']}" if "TORCHELASTIC_RUN_ID" in os.environ else ""
        return torch.device(f"cuda{own}" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            raise UnavailableError(
                f"lm.device={name!r}: torch sees {count} CUDA device(s); use cpu or auto"
            )
    return device


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        # bf16 matrix products without bf16 instructions take a scalar path, about 50x slower.
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _check_finite(path: str, model: Any) -> None:
    """Refuses NaN and infinity in weights and scales: they would be read as if they meant it."""
    for name, x in model.state_dict().items():
        if x.is_floating_point() and x.numel() and not _finite(x):
            raise UnsupportedError(f"LM {path!r} has NaN or infinity in {name}: it is damaged")
    for name, module in model.named_modules():
        state = module.weight.quant_state if is_linear4bit(module) else None
        if state is not None and state.nested and not bool(state.offset.isfinite()):
            raise UnsupportedError(f"LM {path!r} has NaN or infinity in {name}: it is damaged")


def _finite(x: Tensor) -> bool:
    if x.dtype.itemsize < 2:
        x = x.float()
    low, high = torch.aminmax(x)  # no copy of the weight
    return bool((low.isfinite() & high.isfinite()).item())


def _bnb_config(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization == "nf4-double",
        bnb_4bit_compute_dtype=dtype,
    )

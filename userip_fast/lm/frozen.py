"""A Hugging Face causal LM, frozen: loaded, checked, fingerprinted.

Frozen means: no parameter requires grad, the model is in eval mode, and nothing here ever changes
that. What the packed engine relies on is probed on load, so a model that differs is refused by
name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from userip_fast.config import LMConfig
from userip_fast.errors import MismatchError, UnavailableError, UnsupportedError
from userip_fast.lm import attention

logger = logging.getLogger("userip_fast.lm")


class FrozenLM:
    """A frozen causal LM and its tokenizer.

    Attributes:
        model: The Hugging Face model; its base returns final hidden states (after the last norm).
        tokenizer: Its fast tokenizer.
        device, dtype: Of the activations.
        hidden_size: D.
        source: Path or hub id it came from.
        embedded: Whether it is the embedded default, which is saved with a model.
        quantization: "none", "nf4" or "nf4-double".
        fingerprint: Hex digest of the vocabulary and a sample of every tensor as it is stored, so
            that it does not depend on dtype, quantisation or device.
        head_weight, head_bias, softcap: The frozen head, for `ops.linear_cross_entropy`.
        token_embedding, embedding_scale: Token t enters the model as `embedding_scale * row t`.
        embedding_rms: Root mean square of an entry of an embedded token; the unit of `em.lr`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        source: str,
        quantization: str,
        fingerprint: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.embedded = False
        self.quantization = quantization
        model.eval()
        model.requires_grad_(False)
        embedding = model.get_input_embeddings()
        if embedding is None or not isinstance(getattr(embedding, "weight", None), Tensor):
            raise UnsupportedError(f"{source}: the model has no input embeddings to put prompts in")
        head = model.get_output_embeddings()
        if head is None:
            raise UnsupportedError(f"{source}: the model has no LM head to score behaviour with")
        self.token_embedding: Tensor = embedding.weight
        self.device = self.token_embedding.device
        self.dtype = self.token_embedding.dtype
        self.hidden_size = int(self.token_embedding.shape[1])
        self.head_weight: Tensor = head.weight
        self.head_bias: Tensor | None = getattr(head, "bias", None)
        text_config = model.config.get_text_config()
        self.softcap = float(getattr(text_config, "final_logit_softcapping", None) or 0.0)
        self.max_positions = int(getattr(text_config, "max_position_embeddings", 2**31 - 1))
        scale = getattr(embedding, "embed_scale", 1.0)
        self.embedding_scale = float(scale)
        rows = self.embed(
            torch.arange(min(4096, self.token_embedding.shape[0]), device=self.device)
        )
        self.embedding_rms = float(rows.float().square().mean().sqrt())
        self.fingerprint = fingerprint or _digest(tokenizer, _model_tensors(model))
        self._probe()

    @classmethod
    def load(cls, path: str, config: LMConfig | None = None) -> FrozenLM:
        """Loads a model folder or hub id.

        Args:
            path: A folder in Hugging Face format, or a hub id.
            config: Quantisation, dtype, device.

        Raises:
            UnsupportedError: The model is not a causal LM that can be read through embeddings and
                the attention interface; the text names the property.
            UnavailableError: NF4 was asked for and bitsandbytes is not installed.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        config = config or LMConfig()
        attention.register()
        device = resolve_device(config.device)
        dtype = _resolve_dtype(config.dtype, device)
        remote = {"trust_remote_code": config.trust_remote_code}
        try:
            hf_config = AutoConfig.from_pretrained(path, **remote)
            tokenizer = AutoTokenizer.from_pretrained(path, **remote)
        except (OSError, ValueError, KeyError) as e:
            raise UnsupportedError(f"LM {path!r} cannot be loaded: {e}") from e
        stored = getattr(hf_config, "quantization_config", None)
        quantization = "stored" if stored else resolve_quantization(config.quantization)
        kwargs: dict[str, Any] = {"attn_implementation": attention.NAME, "dtype": dtype, **remote}
        if quantization.startswith("nf4"):
            kwargs["quantization_config"] = _bnb_config(quantization, dtype)
        if device.type == "cuda":
            kwargs["device_map"] = {"": device}
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, **kwargs
            )
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise UnsupportedError(f"LM {path!r} cannot be loaded: {e}") from e
        if missing := sorted(info["missing_keys"]):
            raise UnsupportedError(
                f"LM {path!r} is no causal LM of class {type(model).__name__}: its files lack "
                f"{missing[0]} and {len(missing) - 1} other weights"
            )
        if device.type == "cpu":
            make_resident(model, dtype)
        if stored:
            quantization = str(_get(stored, "bnb_4bit_quant_type", "stored"))
            if _get(stored, "bnb_4bit_use_double_quant", False):
                quantization += "-double"
        lm = cls(
            model,
            tokenizer,
            source=str(path),
            quantization=quantization,
            fingerprint=_digest(tokenizer, _stored_tensors(_folder(path))),
        )
        logger.info(
            "LM %s: %s, %s, %s, D=%d, attention %s",
            path,
            quantization,
            lm.dtype,
            lm.device,
            lm.hidden_size,
            attention.NAME,
        )
        return lm

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] to input embeddings [..., D], as the model itself does it."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids)

    def word_embedding(self, word: str) -> Tensor:
        """Mean input embedding [D] fp32 of a word's tokens, the word standing after a space."""
        ids = self.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        if not ids:
            raise MismatchError(f"word {word!r} has no tokens in the LM's vocabulary")
        return self.embed(torch.tensor(ids, device=self.device)).float().mean(0)

    def vocabulary_words(self) -> tuple[Tensor, list[str]]:
        """Token ids that read as a whole word, and the words."""
        size = len(self.tokenizer)
        texts = self.tokenizer.batch_decode([[i] for i in range(size)])
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(size)))
        # Byte-level BPE and SentencePiece mark the start of a word, WordPiece its continuation.
        starts = [p[:1] in "\u0120\u2581" for p in pieces]
        whole = starts if any(starts) else [not p.startswith("##") for p in pieces]
        special = set(self.tokenizer.all_special_ids)
        ids = [
            i
            for i, text in enumerate(texts)
            if whole[i] and i not in special and text.strip().isalpha() and len(text.strip()) > 1
        ]
        return torch.tensor(ids, dtype=torch.int64, device=self.device), [
            texts[i].strip() for i in ids
        ]

    def _probe(self) -> None:
        """Refuses what would otherwise be a silent difference between the engines and the model."""
        name = type(self.model).__name__
        if not getattr(self.model, "_supports_attention_backend", False):
            raise UnsupportedError(
                f"{name} does not call attention through transformers' attention interface"
            )
        text_config = self.model.config.get_text_config()
        rope = getattr(text_config, "rope_parameters", None) or getattr(
            text_config, "rope_scaling", None
        )
        kind = _get(rope or {}, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"{name} uses rope type {kind!r}, whose angles depend on the batch"
            )
        kinds = set(getattr(text_config, "layer_types", None) or [])
        if strange := sorted(kinds - {"full_attention", "sliding_attention"}):
            raise UnsupportedError(f"{name} has layers of type {strange[0]!r}")
        ids = torch.arange(2, device=self.device)
        scaled = self.token_embedding[ids] * torch.tensor(self.embedding_scale, dtype=self.dtype)
        if not torch.equal(self.embed(ids), scaled):
            raise UnsupportedError(f"{name} changes token embeddings in a way other than a scale")
        with torch.no_grad(), self.attention("eager"):
            inputs = {"input_ids": ids[None], "use_cache": False}
            hidden = self.model.base_model(**inputs).last_hidden_state
            first = self.model.base_model(input_ids=ids[None, :1], use_cache=False)
            change = (first.last_hidden_state[0, 0] - hidden[0, 0]).abs().max()
            if change > 0.05 * hidden[0, 0].abs().max():
                raise UnsupportedError(f"{name} lets a token see later ones: not a causal LM")
            want = self.model(**inputs).logits[0, -1].float()
            got = (hidden[0, -1:] @ self.head_weight.T).float()[0]
            if self.head_bias is not None:
                got = got + self.head_bias.float()
            if self.softcap:
                got = self.softcap * torch.tanh(got / self.softcap)
        if not torch.allclose(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max())):
            raise UnsupportedError(
                f"{name} does more between hidden states and logits than a linear "
                "head with a soft cap"
            )

    def attention(self, implementation: str) -> _Attention:
        """Context manager: the model runs with another attention implementation inside it."""
        return _Attention(self.model, implementation)


class _Attention:
    def __init__(self, model: Any, implementation: str) -> None:
        self.model, self.implementation = model, implementation

    def __enter__(self) -> None:
        self.before = self.model.config.get_text_config()._attn_implementation
        if self.before != self.implementation:
            self.model.set_attn_implementation(self.implementation)

    def __exit__(self, *_: object) -> None:
        if self.before != self.implementation:
            self.model.set_attn_implementation(self.before)


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(f"lm.device={name!r}: torch sees no CUDA device; use cpu or auto")
    return device


def resolve_quantization(name: str) -> str:
    """ "auto" is NF4 with double quantisation where bitsandbytes is installed, else none."""
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if name == "auto":
        if not installed:
            logger.info("lm.quantization=none (bitsandbytes is not installed)")
        return "nf4-double" if installed else "none"
    if name != "none" and not installed:
        raise UnavailableError(
            f"lm.quantization={name!r} needs bitsandbytes: pip install 'userip-fast[nf4]'"
        )
    return name


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        # bf16 matrix products without bf16 instructions take a scalar path, about 50x slower.
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _bnb_config(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization == "nf4-double",
        bnb_4bit_compute_dtype=dtype,
    )


def make_resident(model: Any, dtype: torch.dtype) -> None:
    """Replaces each 4-bit linear by a dense one that holds its dequantised weight, bit for bit.

    On a CPU this turns a dequantisation per call into one per load; the values are the same.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            state = getattr(weight, "quant_state", None)
            if type(child).__name__ != "Linear4bit" or state is None:
                continue
            import bitsandbytes.functional as bnb

            assert weight is not None
            dense = torch.nn.Linear(
                child.in_features, child.out_features, bias=child.bias is not None, device="meta"
            )
            dense.weight = torch.nn.Parameter(
                bnb.dequantize_4bit(weight.data, state).to(dtype), requires_grad=False
            )
            if child.bias is not None:
                dense.bias = torch.nn.Parameter(child.bias.data.to(dtype), requires_grad=False)
            setattr(parent, name, dense)


def _get(mapping: Any, key: str, default: Any) -> Any:
    return (
        mapping.get(key, default) if isinstance(mapping, dict) else getattr(mapping, key, default)
    )


def _digest(tokenizer: Any, tensors: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """A digest that changes with vocabulary, names, shapes or sampled values; milliseconds."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        digest.update(f"{index}\t{token}\n".encode())
    for name, shape, sample in tensors:
        digest.update(f"{name} {shape} {sample.dtype}".encode())
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _folder(path: str) -> Path:
    """The folder the model lies in; of a hub id, that of its cached snapshot."""
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import cached_file

    return Path(str(cached_file(path, "config.json"))).parent


def _stored_tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape and the first row of every tensor in the folder's safetensors files."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as stored:
            for name in sorted(stored.keys()):
                part = stored.get_slice(name)
                shape = tuple(part.get_shape())
                yield name, shape, part[:1] if shape and shape[0] else torch.zeros(0)


def _model_tensors(model: Any) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    for name, tensor in sorted(model.state_dict().items()):
        yield name, tuple(tensor.shape), tensor.detach().reshape(-1)[:64]

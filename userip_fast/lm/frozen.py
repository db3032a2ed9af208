"""A Hugging Face causal LM, frozen: checked, fingerprinted (`load.py` loads it).

Frozen means: no parameter requires grad, the model is in eval mode, and nothing here ever changes
that. What the packed engine relies on is probed on load, so a model that differs is refused by
name.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from userip_fast.core.deprecated import RenamedMember
from userip_fast.core.errors import MismatchError, UnsupportedError
from userip_fast.lm import attention, stored
from userip_fast.lm.foldin import FoldIn
from userip_fast.lm.masks import Near, body, near_of_modules
from userip_fast.lm.stored import told
from userip_fast.prompts.text_tokens import text_tokenizer

if TYPE_CHECKING:
    from userip_fast.lm.bf16_gate import BF16Report
    from userip_fast.lm.fp8_gate import GateReport
    from userip_fast.lm.memory import Plan
    from userip_fast.lm.trace import Architecture


class FrozenLM:
    """A frozen causal LM and its tokenizer.

    Attributes:
        model, body: The Hugging Face model, and the part of it that returns final hidden states
            (after the last norm).
        tokenizer: Its fast tokenizer.
        device, dtype: Of the activations.
        hidden_size: D.
        source: Path or hub id it came from.
        embedded: Whether it is the embedded default, which is saved with a model.
        quantization: "none", "nf4" or "nf4-double".
        fingerprint: Digest of every byte that decides what it computes; of a stored LM as it is
            stored (`userip_fast.lm.stored`), else of the tensors handed over.
        head_weight, head_bias, softcap, logit_scale: The frozen head, as `ops.linear_cross_entropy`
            takes it.
        token_embedding, embedding_scale: Token t enters the model as `embedding_scale * row t`.
        embedding_rms: Root mean square of an entry of an embedded token; the unit of `em.lr`.
        folder: What `load` read, a folder or a GGUF file; None for a model handed over as it is.
        plan: How `load` decided to keep and run it; None for a model handed over as it is.
        fp8_report: What the FP8 gate found, where FP8 was asked for or tried.
        bf16_report: What a trial of bf16 products found, where there was one.
    """

    folder: Path | None = None
    plan: Plan | None = None
    architecture: Architecture | None = None
    fp8_report: GateReport | None = None
    bf16_report: BF16Report | None = None
    foldin: FoldIn | None = None
    load = RenamedMember("lm.FrozenLM.load")

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        source: str,
        quantization: str,
    ) -> None:
        self.model = model
        self.body = body(model)
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
        self._check_tokens()
        self.head_weight: Tensor = head.weight
        self.head_bias: Tensor | None = getattr(head, "bias", None)
        text_config = model.config.get_text_config()
        self.logit_scale = float(getattr(text_config, "logit_scale", None) or 1.0)
        # Granite divides by it, HyperCLOVA X multiplies: `_probe` asks the model.
        self.logit_scale /= float(getattr(text_config, "logits_scaling", None) or 1.0)
        self.softcap = float(getattr(text_config, "final_logit_softcapping", None) or 0.0)
        self.max_positions = _positions(model, text_config)
        scale = getattr(embedding, "embed_scale", 1.0)
        self.embedding_scale = float(scale)
        rows = self.embed(
            torch.arange(min(4096, self.token_embedding.shape[0]), device=self.device)
        )
        self.embedding_rms = float(rows.float().square().mean().sqrt())
        self._probe()

    @cached_property
    def fingerprint(self) -> str:
        """See the class."""
        return stored.model_fingerprint(self.model, self.tokenizer)

    @cached_property
    def near(self) -> dict[int, Near]:
        """What the masks of each attention module narrow by, by the module's id."""
        return near_of_modules(self.model)

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether a fingerprint, of either kind, is this LM's; files are read again before a no."""
        if fingerprint == self.fingerprint:
            return True
        return self.folder is not None and stored.is_of(self.folder, self.tokenizer, fingerprint)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] to input embeddings [..., D], as the model itself does it."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids)

    def word_embedding(self, word: str) -> Tensor:
        """Mean input embedding [D] fp32 of a word's tokens, the word standing after a space."""
        ids = text_tokenizer(self.tokenizer)(" " + word)
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

    def _check_tokens(self) -> None:
        ids = ((i, t) for t, i in self.tokenizer.get_vocab().items())
        last, token = max(ids, default=(-1, ""))
        if last >= (rows := self.token_embedding.shape[0]):
            raise UnsupportedError(
                f"{self.source}: the tokenizer gives {token!r} the id {last}, and the model has "
                f"{rows} token embeddings; take the tokenizer that it was trained with, or grow it "
                "by model.resize_token_embeddings(len(tokenizer)) and save it"
            )
        if any(type(m).__module__.partition(".")[0] == "peft" for m in self.model.modules()):
            raise UnsupportedError(
                f"{self.source}: the model carries adapters; hand over model.merge_and_unload()"
            )

    def _probe(self) -> None:
        """Refuses what would otherwise be a silent difference between the engines and the model."""
        name = type(self.model).__name__
        if not getattr(self.model, "_supports_attention_backend", False):
            raise UnsupportedError(
                f"{name} does not call attention through transformers' attention interface"
            )
        text_config = self.model.config.get_text_config()
        if getattr(text_config, "hidden_size_per_layer_input", None):
            raise UnsupportedError(
                f"{name} takes per-layer inputs of each token id, and a soft prompt has none"
            )
        kinds = set(getattr(text_config, "layer_types", None) or [])
        if strange := sorted(kinds - attention.KINDS):
            raise UnsupportedError(f"{name} has layers of type {strange[0]!r}")
        if getattr(self.model, "_is_stateful", False) and not kinds:
            raise UnsupportedError(f"{name} keeps a state beside attention, which packs would mix")
        ids = torch.arange(2, device=self.device)
        scaled = self.token_embedding[ids] * torch.tensor(self.embedding_scale, dtype=self.dtype)
        if not torch.equal(self.embed(ids), scaled):
            raise UnsupportedError(f"{name} changes token embeddings in a way other than a scale")
        with torch.no_grad(), self.attention("eager"), told(f"{name} cannot be run on two tokens"):
            inputs = {"input_ids": ids[None], "use_cache": False}
            hidden = self.body(**inputs).last_hidden_state
            by_value = self.body(inputs_embeds=self.embed(ids[None]), use_cache=False)
            if not torch.allclose(by_value.last_hidden_state, hidden, rtol=1e-2, atol=1e-4):
                raise UnsupportedError(
                    f"{name} reads token ids beside their embeddings (per-layer inputs), and a "
                    "soft prompt has none"
                )
            first = self.body(input_ids=ids[None, :1], use_cache=False)
            change = (first.last_hidden_state[0, 0] - hidden[0, 0]).abs().max()
            if change > 0.05 * hidden[0, 0].abs().max():
                raise UnsupportedError(f"{name} lets a token see later ones: not a causal LM")
            want = self.model(**inputs).logits[0, -1].float()
            raw = (hidden[0, -1:] @ self.head_weight.T).float()[0]
            if self.head_bias is not None:
                raw = raw + self.head_bias.float()
        for scale in (self.logit_scale, 1 / self.logit_scale):
            cap = self.softcap
            got = cap * torch.tanh(scale * raw / cap) if cap else scale * raw
            if torch.allclose(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max())):
                self.logit_scale = scale
                break
        else:
            raise UnsupportedError(
                f"{name} does more between hidden states and logits than a linear "
                "head with a scale and a soft cap"
            )

    def attention(self, implementation: str) -> AbstractContextManager[None]:
        """Context manager: the model runs with another attention implementation inside it."""
        return attention.running(self.model, implementation)


def _positions(model: Any, text_config: Any) -> int:
    """Positions that the model has, up to which what it makes of one depends on no other.

    Some ropes take other angles once any position of a batch is past the length that the model was
    first trained for; Llama 4 scales queries by their place in the batch, from `floor_scale` on.
    """
    limits = [int(getattr(text_config, "max_position_embeddings", None) or 2**31 - 1)]
    rope = getattr(text_config, "rope_parameters", None) or getattr(
        text_config, "rope_scaling", None
    )
    # One for all layers, or one for each type of layer.
    for part in [rope, *rope.values()] if isinstance(rope, dict) else [rope or {}]:
        if stored.entry(part, "rope_type", "default") in ("dynamic", "longrope"):
            first = stored.entry(part, "original_max_position_embeddings", None)
            first = first or getattr(text_config, "original_max_position_embeddings", None)
            limits.append(int(first or limits[0]))
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", False):
            module.attn_temperature_tuning = False  # which below `floor_scale` is a factor of 1
            limits.append(int(module.floor_scale) - 1)
    return min(limits)

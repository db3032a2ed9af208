"""The embedded default LM: a small Llama pre-trained on the training users' own behaviour text.

It exists so that the whole pipeline is real on a laptop. Text, field names, segments and positions
are exactly those that the E-step scores. What stands in a soft row during pre-training decides what
the LM can read there later: words of the user's profile where they are known (the demo's planted
world), else the mean embedding of tokens of some of the user's other events, so that the LM learns
what a soft row says of the user; now and then the shared start, which says nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.config import LMConfig
from userip_fast.errors import FormatError
from userip_fast.files import atomic_dir, one_writer, read_json, write_json
from userip_fast.packing import Behaviour, Int64, telling
from userip_fast.progress import progress
from userip_fast.prompts import Layout, PromptTemplate
from userip_fast.sums import (
    MANIFEST,
    cache_folder,
    check_seal,
    check_sums,
    folder_sums,
    sealed,
)
from userip_fast.text_tokens import text_tokenizer

logger = logging.getLogger("userip_fast.lm")

_FORMAT, _VERSION = "userip_fast.lm", 1
_RECIPE = 2  # raise with any change that makes cached models stale
_STEP_TOKENS = 2048
_PROMPT_TOKENS = 128  # of independent events told in one prompt: many users in each step
_UNTOLD = 0.15  # share of soft rows that tell nothing
_BOS = "<s>"

BehaviourOf = Callable[[Any, Layout], Behaviour]
"""Builds the users' behaviour once the tokenizer is there."""

SlotIds = Callable[[Any], Int64]
"""Token ids [U, S] that stand in the soft rows during pre-training, given the tokenizer."""


def embedded_lm(
    texts: Sequence[str],
    template: PromptTemplate,
    behaviour_of: BehaviourOf,
    config: LMConfig,
    *,
    content_key: str,
    slot_ids: SlotIds | None = None,
    seed: int = 0,
    show: bool = False,
) -> Path:
    """Folder of the embedded LM for these users, trained unless it is in the cache, undamaged.

    Of processes that want the same one, one trains it; the others wait for it.

    Args:
        texts: Event texts as they are tokenised (with separator), for the tokenizer.
        template: The profile fields.
        behaviour_of: Builds the training users' behaviour with the trained tokenizer.
        config: Sizes and number of training tokens.
        content_key: Digest of the training users' behaviour; with config and template it names the
            cache entry.
        slot_ids: Fills the soft rows, and is part of the entry's name; None tells there of each
            user's own behaviour.
        seed: Of weights and batches.
        show: Whether to show progress.
    """
    sizes = {k: v for k, v in vars(config).items() if k.startswith("embedded_")}
    prompts = [(f.prompt, f.num_virtual_tokens, f.candidates) for f in template.fields]
    of_entry: list[Any] = [_RECIPE, sizes, prompts, content_key, seed]
    tokenizer, slots = None, None
    if slot_ids is not None:  # which a tokenizer alone can tell
        tokenizer = _train_tokenizer(texts, template, config.embedded_vocab)
        slots = slot_ids(tokenizer)
        of_entry.append([slots.shape, hashlib.sha256(slots.astype("<i8").tobytes()).hexdigest()])
    key = json.dumps(of_entry, sort_keys=True)
    folder = cache_folder() / "lm" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if _usable(folder, logger.debug):
        return folder
    with one_writer(folder, "another process, which trains the same LM"):
        if _usable(folder, logger.warning):
            return folder  # the other one has trained it
        tokenizer = tokenizer or _train_tokenizer(texts, template, config.embedded_vocab)
        layout = template.layout(tokenizer)
        behaviour = behaviour_of(tokenizer, layout)
        model, curve = _train(tokenizer, template, layout, behaviour, slots, config, seed, show)
        with atomic_dir(folder) as tmp:
            model.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
            write_json(tmp / "training.json", curve)
            about = {"format": _FORMAT, "version": _VERSION, "files": folder_sums(tmp)}
            write_json(tmp / MANIFEST, sealed(about))
    return folder


def _usable(folder: Path, tell: Callable[..., None]) -> bool:
    """Whether the entry is there and undamaged; what is damaged is told."""
    if not folder.exists():
        return False
    try:
        check_embedded(folder)
    except FormatError as e:
        tell("cached LM: %s; it is trained again", e)
        return False
    return True


def check_embedded(folder: Path) -> None:
    """Checks that an embedded LM's folder is whole and as it was written.

    Raises:
        FormatError: It is not, and which file.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise FormatError(f"{folder / MANIFEST}: is not that of an embedded LM")
    check_seal(folder / MANIFEST, manifest)
    check_sums(folder, manifest.get("files"), ("config.json", "model.safetensors"))


def _train_tokenizer(texts: Sequence[str], template: PromptTemplate, vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[_BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Field names and candidate words are worth a token each, however rare they are in the log.
    words = [w for f in template.fields for w in (f.prompt, *(" " + c for c in f.candidates))]
    bpe.train_from_iterator([*texts, *(words * 1000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_BOS)


def _train(
    tokenizer: Any,
    template: PromptTemplate,
    layout: Layout,
    behaviour: Behaviour,
    slots: Int64 | None,
    config: LMConfig,
    seed: int,
    show: bool,
) -> tuple[Any, dict[str, list[float]]]:
    """The model, and since the point before: `tokens` seen, mean `loss` per token, and `scored`,
    the loss on the tokens that an E-step scores."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = config.embedded_hidden
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=math.ceil(8 * hidden / 3 / 64) * 64,
                num_hidden_layers=config.embedded_layers,
                num_attention_heads=config.embedded_heads,
                max_position_embeddings=layout.behaviour_start
                + max(1024, int(behaviour.lengths.max(initial=1))),
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=None,
                attn_implementation="sdpa",
                # Llama's own 0.02 suits widths of thousands: here it costs most of the training.
                initializer_range=hidden**-0.5,
            )
        )
    model.train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = _Batches(tokenizer, template, layout, behaviour, slots, generator)
    at_soft = torch.from_numpy(layout.soft_position).long()
    embed = model.get_input_embeddings()
    steps = max(1, config.embedded_tokens // _STEP_TOKENS)
    curve: dict[str, list[float]] = {"tokens": [], "loss": [], "scored": []}
    recent: list[tuple[float, float]] = []
    with progress("pre-training the LM", steps * _STEP_TOKENS, "tokens", show) as bar:
        for step in range(steps):
            warm = min(1.0, (step + 1) / min(50, steps))
            rate = 3e-3 * warm * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            b = batches.next()
            x = embed(b.ids).index_copy(1, at_soft, b.soft @ embed.weight)
            out = model(
                inputs_embeds=x, attention_mask=b.mask, position_ids=b.position, use_cache=False
            )
            told = F.cross_entropy(
                out.logits.flatten(0, 1), b.target.flatten(), ignore_index=-100, reduction="none"
            )
            every = told.sum() / (b.target >= 0).sum().clamp_min(1)
            scored = told @ b.weight.flatten() / b.weight.sum().clamp_min(1e-9)
            # Half for language, half for what the E-step asks: of a dozen tokens one may be scored.
            (0.5 * (every + scored)).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append((every.item(), scored.item()))
            bar.advance(_STEP_TOKENS, loss=recent[-1][0])
            if (step + 1) % max(1, steps // 100) == 0:
                curve["tokens"].append((step + 1) * _STEP_TOKENS)
                for name, values in zip(("loss", "scored"), zip(*recent)):
                    curve[name].append(sum(values) / len(values))
                recent = []
    return model.eval(), curve


@dataclass(frozen=True)
class _Batch:
    """B prompts of up to T rows.

    Attributes:
        ids, position: [B, T] int64.
        mask: [B, 1, T, T] bool, what a row sees.
        soft: [B, S, V] fp32, the shares of tokens in each soft row.
        target: [B, T] int64, the token after each row, -100 where there is no loss.
        weight: [B, T] fp32, the E-step's weight of the target.
    """

    ids: Tensor
    position: Tensor
    mask: Tensor
    soft: Tensor
    target: Tensor
    weight: Tensor


class _Batches:
    """Padded batches of prompts with the field mask, those of like length together.

    A prompt holds one sequence of a user; of independent events, which need no company, a few.
    Its soft rows tell of events that the prompt is not asked for: of the user's others, or where
    there are none of a part of its own, which then carries no loss. So the LM learns what a telling
    soft row predicts of other behaviour, not to copy.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate,
        layout: Layout,
        behaviour: Behaviour,
        slots: Int64 | None,
        generator: Any,
    ) -> None:
        self.layout, self.behaviour, self.generator = layout, behaviour, generator
        self.head = layout.behaviour_start
        self.queue: list[Int64] = []
        self.slots = slots
        self.neutral = _neutral(tokenizer, template, behaviour)
        # An event begins where the one before it has carried its loss.
        self.event = np.cumsum(_starts_event(behaviour)) - 1
        self.prompts = _prompts(behaviour, layout, self.event)
        self.user = np.searchsorted(behaviour.offsets, self.prompts[:-1], side="right") - 1

    def next(self) -> _Batch:
        """The next batch."""
        if not self.queue:
            self._shuffle()
        prompts = self.queue.pop()
        layout, behaviour, head = self.layout, self.behaviour, self.head
        lengths = np.diff(self.prompts)[prompts]
        shape = (len(prompts), head + int(lengths.max()))
        ids = np.zeros(shape, np.int64)
        segment = np.full(shape, -2, np.int32)
        position = np.zeros(shape, np.int64)
        target = np.full(shape, -100, np.int64)
        weight = np.zeros(shape, np.float32)
        soft = np.zeros((len(prompts), layout.num_soft, self.neutral.shape[1]), np.float32)
        ids[:, layout.prefix_position] = layout.prefix_ids
        segment[:, layout.prefix_position] = layout.prefix_segment
        segment[:, layout.soft_position] = layout.soft_segment
        position[:, :head] = np.arange(head)
        for row, (prompt, n) in enumerate(zip(prompts.tolist(), lengths.tolist())):
            source = slice(self.prompts[prompt], self.prompts[prompt] + n)
            here = slice(head, head + n)
            ids[row, here] = behaviour.ids[source]
            segment[row, here] = behaviour.segment[source]
            position[row, here] = behaviour.position[source]
            asked = self._tell(prompt, soft[row])
            asked = asked[1:] & (behaviour.segment[source][1:] == behaviour.segment[source][:-1])
            before = slice(head, head + n - 1)
            target[row, before][asked] = behaviour.ids[source][1:][asked]
            weight[row, before][asked] = behaviour.weight[source][1:][asked]
        column, line = segment[:, None, :], segment[:, :, None]
        fields = layout.num_fields
        sees = (line == column) | (column == -1)
        sees |= (line >= fields) & (column < fields) & (column >= 0)
        sees &= np.tri(shape[1], dtype=bool)
        sees |= np.eye(shape[1], dtype=bool)
        return _Batch(
            torch.from_numpy(ids),
            torch.from_numpy(position),
            torch.from_numpy(sees)[:, None],
            torch.from_numpy(soft),
            torch.from_numpy(target),
            torch.from_numpy(weight),
        )

    def _tell(self, prompt: int, soft: Any) -> Any:
        """Fills the soft rows [S, V] of a prompt; its tokens [n] that may carry loss."""
        start, stop = self.prompts[prompt], self.prompts[prompt + 1]
        asked = np.ones(stop - start, np.bool_)
        user = self.user[prompt]
        if self.slots is not None:
            soft[np.arange(len(soft)), self.slots[user]] = 1.0
            return asked
        behaviour, random = self.behaviour, self.generator.random
        first, last = behaviour.offsets[user], behaviour.offsets[user + 1]
        event = self.event[first:last] - self.event[first]
        own = slice(start - first, stop - first)
        events = int(event[-1]) + 1
        known = np.ones(events, np.bool_)
        known[event[own]] = False
        if not known.any():
            known = random(events) < 0.5
            asked = ~known[event[own]]
        for s, neutral in enumerate(self.neutral):
            told = (known & (random(events) < random()))[event]
            if random() < _UNTOLD or not told.any():
                soft[s] = neutral
            else:
                shares = telling(behaviour.weight[first:last][told])
                soft[s] = np.bincount(behaviour.ids[first:last][told], shares, len(neutral))
        return asked

    def _shuffle(self) -> None:
        """One pass over the prompts: shuffled, then by length within windows of ten batches."""
        size = np.diff(self.prompts) + self.head
        order = self.generator.permutation(np.flatnonzero(size > self.head + 1))
        if len(order) == 0:
            raise ValueError("the training users have no behaviour to pre-train the LM on")
        window = max(1, int(10 * _STEP_TOKENS / size[order].mean()))
        for i in range(0, len(order), window):
            part = order[i : i + window]
            part = part[np.argsort(size[part], kind="stable")]
            batch: list[int] = []
            for prompt in part.tolist():
                if batch and (len(batch) + 1) * size[prompt] > _STEP_TOKENS:
                    self.queue.append(np.asarray(batch))
                    batch = []
                batch.append(prompt)
            self.queue.append(np.asarray(batch))
        self.generator.shuffle(self.queue)


def _neutral(tokenizer: Any, template: PromptTemplate, behaviour: Behaviour) -> Any:
    """[S, V] shares of tokens in soft rows that tell nothing: where an E-step starts."""
    typical = np.bincount(behaviour.ids, minlength=len(tokenizer)) / max(1, len(behaviour.ids))
    rows = []
    for f in template.fields:
        shares = typical
        if f.candidates:
            words = [text_tokenizer(tokenizer)(" " + c) for c in f.candidates]
            shares = np.mean(
                [np.bincount(w, minlength=len(tokenizer)) / len(w) for w in words], axis=0
            )
        rows += [shares] * f.num_virtual_tokens
    return np.stack(rows)


def _starts_event(behaviour: Behaviour) -> Any:
    """[N] bool: an event's first token never carries loss, and its last always does."""
    carries = behaviour.weight > 0
    starts = ~carries & np.concatenate([[True], carries[:-1]])
    starts[behaviour.offsets[:-1][behaviour.lengths > 0]] = True
    return starts


def _prompts(behaviour: Behaviour, layout: Layout, event: Int64) -> Int64:
    """First token of each prompt, and where the last one ends."""
    if behaviour.segment.max(initial=0) <= layout.num_fields:
        return behaviour.sequences[0]
    starts = np.flatnonzero(np.diff(event, prepend=-1))
    user = np.searchsorted(behaviour.offsets, starts, side="right") - 1
    part = (starts - behaviour.offsets[user]) // _PROMPT_TOKENS
    new = (np.diff(part, prepend=-1) != 0) | (np.diff(user, prepend=-1) != 0)
    return np.append(starts[new], len(behaviour.ids))

"""The embedded default LM: a small Llama pre-trained on the training users' own behaviour text.

It exists so that the whole pipeline is real on a laptop. Text, field names, segments and positions
are exactly those that the E-step scores. What stands in a soft row during pre-training decides what
the LM can read there later: words of the user's profile where they are known (the demo's planted
world), else tokens drawn from the user's own behaviour, so that the LM learns that a soft row says
something of the user.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from userip_fast.config import LMConfig
from userip_fast.files import atomic_dir, write_json
from userip_fast.packing import Behaviour, Int64
from userip_fast.progress import progress
from userip_fast.prompts import Layout, PromptTemplate

_RECIPE = 1  # raise with any change that makes cached models stale
_STEP_TOKENS = 2048
_BOS = "<s>"

BehaviourOf = Callable[[Any, Layout], Behaviour]
"""Builds the users' behaviour once the tokenizer is there."""

SlotIds = Callable[[Any], Int64]
"""Token ids [U, S] that stand in the soft rows during pre-training, given the tokenizer."""


def cache_folder() -> Path:
    """`$USERIP_FAST_CACHE`, else `userip_fast` in the user's cache folder."""
    if root := os.environ.get("USERIP_FAST_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "userip_fast"


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
    """Folder of the embedded LM for these users, trained unless it is in the cache.

    Args:
        texts: Event texts as they are tokenised (with separator), for the tokenizer.
        template: The profile fields.
        behaviour_of: Builds the training users' behaviour with the trained tokenizer.
        config: Sizes and number of training tokens.
        content_key: Digest of the training users' behaviour; with config and template it names the
        cache
            entry.
        slot_ids: Fills the soft rows; None draws from each user's own behaviour.
        seed: Of weights and batches.
        show: Whether to show progress.
    """
    sizes = {k: v for k, v in vars(config).items() if k.startswith("embedded_")}
    prompts = [(f.prompt, f.num_virtual_tokens, f.candidates) for f in template.fields]
    key = json.dumps([_RECIPE, sizes, prompts, content_key, seed], sort_keys=True)
    folder = cache_folder() / "lm" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if (folder / "config.json").exists():
        return folder
    tokenizer = _train_tokenizer(texts, template, config.embedded_vocab)
    layout = template.layout(tokenizer)
    behaviour, user = behaviour_of(tokenizer, layout).by_sequence()
    slots = slot_ids(tokenizer)[user] if slot_ids else None
    model, curve = _train(tokenizer, layout, behaviour, slots, config, seed, show)
    with atomic_dir(folder) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        write_json(tmp / "training.json", curve)
    return folder


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
    layout: Layout,
    behaviour: Behaviour,
    slots: Int64 | None,
    config: LMConfig,
    seed: int,
    show: bool,
) -> tuple[Any, dict[str, list[float]]]:
    """The model, and its loss: `tokens` seen and mean `loss` since the point before."""
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
            )
        )
    model.train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = _Batches(layout, behaviour, slots, generator)
    steps = max(1, config.embedded_tokens // _STEP_TOKENS)
    curve: dict[str, list[float]] = {"tokens": [], "loss": []}
    recent: list[float] = []
    with progress("pre-training the LM", steps * _STEP_TOKENS, "tokens", show) as bar:
        for step in range(steps):
            warm = min(1.0, (step + 1) / min(50, steps))
            rate = 3e-3 * warm * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids, mask, position, target = batches.next()
            out = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False)
            loss = F.cross_entropy(out.logits.flatten(0, 1), target.flatten(), ignore_index=-100)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(loss.item())
            bar.advance(_STEP_TOKENS, loss=recent[-1])
            if (step + 1) % max(1, steps // 100) == 0:
                curve["tokens"].append((step + 1) * _STEP_TOKENS)
                curve["loss"].append(sum(recent) / len(recent))
                recent = []
    return model.eval(), curve


class _Batches:
    """Padded batches of whole prompts with the field mask, users of like length together."""

    def __init__(
        self, layout: Layout, behaviour: Behaviour, slots: Int64 | None, generator: Any
    ) -> None:
        self.layout, self.behaviour, self.slots, self.generator = (
            layout,
            behaviour,
            slots,
            generator,
        )
        self.head = layout.behaviour_start
        self.queue: list[Int64] = []

    def next(self) -> tuple[torch.Tensor, ...]:
        """(ids, additive mask, positions, targets); the target of a row is the token after it."""
        if not self.queue:
            self._shuffle()
        users = self.queue.pop()
        layout, behaviour, head = self.layout, self.behaviour, self.head
        lengths = behaviour.lengths[users]
        shape = (len(users), head + int(lengths.max()))
        ids = np.zeros(shape, np.int64)
        segment = np.full(shape, -2, np.int32)
        position = np.zeros(shape, np.int64)
        target = np.full(shape, -100, np.int64)
        ids[:, layout.prefix_position] = layout.prefix_ids
        ids[:, layout.soft_position] = self._slots(users)
        segment[:, layout.prefix_position] = layout.prefix_segment
        segment[:, layout.soft_position] = layout.soft_segment
        position[:, :head] = np.arange(head)
        for row, (user, n) in enumerate(zip(users, lengths)):
            source = slice(behaviour.offsets[user], behaviour.offsets[user] + n)
            here = slice(head, head + n)
            ids[row, here] = behaviour.ids[source]
            segment[row, here] = behaviour.segment[source]
            position[row, here] = behaviour.position[source]
            same = behaviour.segment[source][1:] == behaviour.segment[source][:-1]
            target[row, head : head + n - 1][same] = behaviour.ids[source][1:][same]
        column, line = segment[:, None, :], segment[:, :, None]
        fields = layout.num_fields
        sees = (line == column) | (column == -1)
        sees |= (line >= fields) & (column < fields) & (column >= 0)
        sees &= np.tri(shape[1], dtype=bool)
        sees |= np.eye(shape[1], dtype=bool)
        return (
            torch.from_numpy(ids),
            torch.from_numpy(sees)[:, None],
            torch.from_numpy(position),
            torch.from_numpy(target),
        )

    def _slots(self, users: Int64) -> Int64:
        if self.slots is not None:
            return self.slots[users]
        size = (len(users), self.layout.num_soft)
        lengths = self.behaviour.lengths[users][:, None]
        pick = (self.generator.random(size) * lengths).astype(np.int64)
        return self.behaviour.ids[self.behaviour.offsets[users][:, None] + pick].astype(np.int64)

    def _shuffle(self) -> None:
        """One pass over the users: shuffled, then by length within windows of ten batches."""
        order = self.generator.permutation(np.flatnonzero(self.behaviour.lengths > 1))
        if len(order) == 0:
            raise ValueError("the training users have no behaviour to pre-train the LM on")
        size = self.behaviour.lengths + self.head
        window = max(1, int(10 * _STEP_TOKENS / size[order].mean()))
        for i in range(0, len(order), window):
            part = order[i : i + window]
            part = part[np.argsort(size[part], kind="stable")]
            batch: list[int] = []
            for user in part.tolist():
                if batch and (len(batch) + 1) * size[user] > _STEP_TOKENS:
                    self.queue.append(np.asarray(batch))
                    batch = []
                batch.append(user)
            self.queue.append(np.asarray(batch))
        self.generator.shuffle(self.queue)

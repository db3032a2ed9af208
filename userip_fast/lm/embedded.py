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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.config import LMConfig
from userip_fast.errors import FormatError
from userip_fast.files import atomic_dir, one_writer, read_json, write_json
from userip_fast.lm.foldin import FoldIn, fold_in, kind_vectors
from userip_fast.packing import Behaviour, Int64
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

if TYPE_CHECKING:
    from userip_fast.behaviour import Told

logger = logging.getLogger("userip_fast.lm")

_FORMAT, _VERSION = "userip_fast.lm", 1
RECIPE = 5  # raise with any change that makes cached models stale
_STEP_TOKENS = 2048
_PROMPT_TOKENS = 48  # of independent events asked for in one prompt: many users in each step
_UNTOLD = 0.15  # share of soft rows that tell nothing
_DECAY = 0.1
_CONTRAST = 8.0  # nats a token that a nat of telling users apart is worth
_PASSES = 20  # over the log, at most
_LOOKS = 40  # at held-out users
_PATIENCE = 4  # looks in vain until steps become smaller
_DROPS, _DROP = 2, 0.3  # how often they do, and by how much
_LAST_PART = 0.4  # of the budget, in which they become smaller in any case
_JUDGE, _FEWEST_USERS = 10, 50  # every so manieth user judges, of so many at least
_JUDGE_BATCHES = 16
_TOLD = 10  # events that judges are told of
_PRIOR = 10.0  # events that an item's reactions start with
_BOS = "<s>"

BehaviourOf = Callable[[Any, Layout], "tuple[Behaviour, Told]"]
"""Builds the users' behaviour, and its events as kinds, once the tokenizer is there."""

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
    of_entry: list[Any] = [RECIPE, sizes, prompts, content_key, seed]
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
        behaviour, told = behaviour_of(tokenizer, layout)
        model, foldin, training = _train(
            tokenizer, layout, behaviour, told, slots, config, seed, show
        )
        _warn(training["nll"])
        with atomic_dir(folder) as tmp:
            model.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
            if foldin is not None:
                foldin.save(tmp)
            write_json(tmp / "training.json", training)
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


def _warn(nll: dict[str, float] | None) -> None:
    if nll is None:
        return
    others = {name: x for name, x in nll.items() if name != "told"}
    logger.info(
        "the LM predicts new users at %.4f nats; %s", nll["told"],
        ", ".join(f"{name} {x:.4f}" for name, x in others.items()),
    )  # fmt: skip
    if nll["told"] >= (least := min(others.values())):
        logger.warning(
            "what the LM is told of new users does not help it to predict them (%.4f nats; without "
            "knowing them %.4f): profiles will say little; there may be too few users",
            nll["told"], least,
        )  # fmt: skip


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
    layout: Layout,
    behaviour: Behaviour,
    told: Told,
    slots: Int64 | None,
    config: LMConfig,
    seed: int,
    show: bool,
) -> tuple[Any, FoldIn | None, dict[str, Any]]:
    """The model, the language of its soft rows, and how training went (see `Judges`)."""
    generator = np.random.default_rng(seed)
    data = _Data.of(behaviour, layout, told, slots, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer, layout, behaviour, config)
        soft = _SoftRows(model, layout, None if slots is not None else data.vectors.shape[1])
    model.train()
    batches = _Batches(data, layout, generator)
    parameters = [*model.parameters(), *soft.parameters()]
    optimizer = _optimizer(parameters)
    losses = _contrast if data.choices else _losses
    # Half for language, half for what the E-step asks: of reactions it is one token of a dozen.
    shares = (1.0, _CONTRAST) if data.choices else (0.5, 0.5)
    steps = max(1, _budget(config, data) // _STEP_TOKENS)
    judges = _Judges(data, layout, seed)
    every = max(1, steps // _LOOKS)
    curve: dict[str, Any] = {n: [] for n in ("tokens", "loss", "scored", "held_out")}
    recent: list[tuple[float, float]] = []
    best, kept, in_vain, drops = math.inf, None, 0, 0
    with progress("pre-training the LM", steps * _STEP_TOKENS, "tokens", show) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps, drops if judges.batches else None)
            whole, scored = losses(model, soft, layout, batches.next())
            loss = shares[0] * whole + shares[1] * scored
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append((whole.item(), scored.item()))
            if (step + 1) % every and step + 1 < steps:
                bar.advance(_STEP_TOKENS, loss=recent[-1][0])
                continue
            held_out = judges.loss(model, soft)
            bar.advance(_STEP_TOKENS, loss=recent[-1][0], held_out=held_out)
            curve["tokens"].append((step + 1) * _STEP_TOKENS)
            for name, values in zip(("loss", "scored"), zip(*recent)):
                curve[name].append(sum(values) / len(values))
            curve["held_out"].append(held_out if judges.batches else None)
            recent, in_vain = [], in_vain + 1
            if held_out < best or not judges.batches:
                best, in_vain = held_out, 0
                kept = [p.detach().clone() for p in parameters]
            if in_vain == _PATIENCE:
                # From the best so far by smaller steps, whose noise hides less.
                drops, in_vain = drops + 1, 0
                _restore(parameters, kept)
                if drops > _DROPS:
                    break
    _restore(parameters, kept)
    model.eval()
    return model, soft.language(data), {**curve, "nll": judges.report(model, soft)}


def _rate(step: int, steps: int, drops: int | None) -> float:
    """Learning rate: a short way up, then level, lowered where held-out users gained nothing, and
    in the last part of the budget down to a tenth; half a cosine where nobody is held out."""
    up = min(1.0, (step + 1) / min(50, steps))
    if drops is None:
        return 3e-3 * up * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
    down = min(1.0, (1 - step / steps) / _LAST_PART)
    return 3e-3 * up * max(0.1, down) * _DROP**drops


def _restore(parameters: list[Tensor], kept: list[Tensor] | None) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, kept or ()):
            p.copy_(value)


def _new_model(tokenizer: Any, layout: Layout, behaviour: Behaviour, config: LMConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = config.embedded_hidden
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=math.ceil(8 * hidden / 3 / 64) * 64,
            num_hidden_layers=config.embedded_layers,
            num_attention_heads=config.embedded_heads,
            max_position_embeddings=layout.behaviour_start
            + max(1024, int(behaviour.position.max(initial=0)) + 1 - layout.behaviour_start),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
            attn_implementation="sdpa",
            # Llama's own 0.02 suits widths of thousands: here it costs most of the training.
            initializer_range=hidden**-0.5,
        )
    )


def _optimizer(parameters: list[Tensor]) -> torch.optim.AdamW:
    decay = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": _DECAY}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )


def _budget(config: LMConfig, data: _Data) -> int:
    """Tokens to train on: some passes over the log, and what the config allows at most."""
    return min(config.embedded_tokens, _PASSES * max(len(data.behaviour.ids), _STEP_TOKENS))


def _losses(model: Any, soft: _SoftRows, layout: Layout, b: _Batch) -> tuple[Tensor, Tensor]:
    """Mean loss of all tokens asked for, and of what the E-step asks."""
    told = _token_losses(model, soft, layout, b)
    every = told.sum() / (b.target >= 0).sum().clamp_min(1)
    return every, (told * b.weight).sum() / b.weight.sum().clamp_min(1e-9)


def _contrast(model: Any, soft: _SoftRows, layout: Layout, b: _Batch) -> tuple[Tensor, Tensor]:
    """Mean loss of all tokens, and of telling who chose an item.

    Whose choice is it, the user's or another one's of the batch? The answer is the difference of
    the text's log likelihoods as it is told of the one and of the other: what the LM does not know
    of the language, and how often the item is chosen at all, cancel, and what is left of the
    gradient is taste. Its best answers are differences of pointwise mutual information (the
    pairwise case of "Representation Learning with Contrastive Predictive Coding", 2018).
    """
    told = _token_losses(model, soft, layout, b)
    every = told.sum() / (b.target >= 0).sum().clamp_min(1)
    if len(b.ids) < 2:
        return every, every.new_zeros(())
    other = _token_losses(model, soft, layout, replace(b, told=b.told.roll(1, 0)))
    events, inverse = np.unique(b.event, return_inverse=True)
    at = torch.from_numpy(inverse.ravel())
    gap = told.new_zeros(len(events)).index_add(0, at, ((other - told) * b.weight).flatten())
    asked = told.new_zeros(len(events)).index_add(0, at, b.weight.flatten()) > 0
    return every, F.softplus(-gap[asked]).mean()


def _token_losses(model: Any, soft: _SoftRows, layout: Layout, b: _Batch) -> Tensor:
    """[B, T]; 0 where there is no loss."""
    embed = model.get_input_embeddings()
    at = torch.from_numpy(layout.soft_position).long()
    x = embed(b.ids).index_copy(1, at, soft(b))
    out = model(inputs_embeds=x, attention_mask=b.mask, position_ids=b.position, use_cache=False)
    return F.cross_entropy(
        out.logits.flatten(0, 1), b.target.flatten(), ignore_index=-100, reduction="none"
    ).view_as(b.target)


class _SoftRows(torch.nn.Module):
    """What stands in the soft rows: a map of what is told, or words that are known."""

    def __init__(self, model: Any, layout: Layout, rank: int | None) -> None:
        super().__init__()
        self.embed = [model.get_input_embeddings()]  # the model's own, no parameter of ours
        self.field = np.repeat(
            np.arange(layout.num_fields), [s.stop - s.start for s in layout.field_slices]
        )
        hidden = model.config.hidden_size
        if rank is not None:
            # So that what is told is as large as a token's embedding.
            spread = model.config.initializer_range / math.sqrt(rank)
            self.weight = torch.nn.Parameter(spread * torch.randn(layout.num_soft, rank, hidden))
            self.bias = torch.nn.Parameter(torch.zeros(layout.num_soft, hidden))

    def forward(self, b: _Batch) -> Tensor:
        """[B, S, D]."""
        if b.words is not None:
            found: Tensor = self.embed[0](b.words)
            return found
        return torch.einsum("bsr,srd->bsd", b.told[:, self.field], self.weight) + self.bias

    def language(self, data: _Data) -> FoldIn | None:
        """For users to come; None where words are all that was told."""
        if data.words is not None:
            return None
        spoken = np.flatnonzero(data.vectors.any(1))
        return FoldIn(
            [data.kind_names[i] for i in spoken],
            torch.from_numpy(data.vectors[spoken]),
            self.weight.detach().clone(),
            self.bias.detach().clone(),
        )


@dataclass(frozen=True)
class _Batch:
    """B prompts of up to T rows.

    Attributes:
        ids, position: [B, T] int64.
        mask: [B, 1, T, T] bool, what a row sees.
        told: [B, J, r] fp32, what is told of the user, field by field.
        words: [B, S] int64, tokens in the soft rows in its place; None where there are none.
        target: [B, T] int64, the token after each row, -100 where there is no loss.
        weight: [B, T] fp32, the E-step's weight of the target.
        event: [B, T] int64, the event that a target belongs to.
    """

    ids: Tensor
    position: Tensor
    mask: Tensor
    told: Tensor
    words: Tensor | None
    target: Tensor
    weight: Tensor
    event: Any


@dataclass(frozen=True)
class _Data:
    """What there is to learn from.

    Attributes:
        event: [N] int64, the event of each token of `behaviour`.
        kind: [events] int64, its kind.
        kind_names: Text and word of each kind.
        vectors: [kinds, r] fp32.
        words: [U, S] int64, words that are known of each user, or None.
        prompts: [P + 1] int64, first token of each prompt, and where the last one ends.
        user: [P] int64, whose prompt it is.
        judges: [U] bool, users who are not learned from.
    """

    behaviour: Behaviour
    event: Int64
    kind: Int64
    kind_names: list[tuple[str, str]]
    vectors: Any
    words: Int64 | None
    prompts: Int64
    user: Int64
    judges: Any

    @property
    def choices(self) -> bool:
        """Whether text is all that is told of an event, so that who chooses it is the question."""
        return self.words is None and not any(word for _, word in self.kind_names)

    @classmethod
    def of(
        cls, behaviour: Behaviour, layout: Layout, told: Told, words: Int64 | None, seed: int
    ) -> _Data:
        # An event begins where the one before it has carried its loss.
        event = np.cumsum(_starts_event(behaviour)) - 1
        prompts = _prompts(behaviour, layout, event)
        user = np.searchsorted(behaviour.offsets, prompts[:-1], side="right") - 1
        users = behaviour.num_users
        judges = np.arange(users) % _JUDGE == _JUDGE - 1
        if users < _FEWEST_USERS or words is not None:
            judges[:] = False
        owner = np.repeat(np.arange(users), np.diff(told.offsets))
        learned = ~judges[owner]
        vectors = kind_vectors(owner[learned], told.kinds[learned], len(told.texts), seed)
        names = list(zip(told.texts, told.words or [""] * len(told.texts)))
        return cls(behaviour, event, told.kinds, names, vectors, words, prompts, user, judges)


class _Batches:
    """Padded batches of prompts with the field mask, those of like length together.

    A prompt holds one sequence of a user; of independent events, which need no company, a few.
    Its soft rows tell of events that the prompt is not asked for: of the user's others, or where
    there are none of a part of its own, which then carries no loss. So the LM learns what a telling
    soft row predicts of other behaviour, not to copy.
    """

    def __init__(
        self, data: _Data, layout: Layout, generator: Any, judging: bool = False, told: int = 0
    ) -> None:
        self.data, self.layout, self.generator = data, layout, generator
        self.head = layout.behaviour_start
        self.queue: list[Int64] = []
        self.judging, self.told = judging, told

    def next(self) -> _Batch:
        """The next batch."""
        if not self.queue:
            self._shuffle()
        return self.batch(self.queue.pop())

    def batch(self, prompts: Int64) -> _Batch:
        """A batch of these prompts."""
        data, layout, head = self.data, self.layout, self.head
        behaviour = data.behaviour
        lengths = np.diff(data.prompts)[prompts]
        shape = (len(prompts), head + int(lengths.max()))
        ids = np.zeros(shape, np.int64)
        segment = np.full(shape, -2, np.int32)
        position = np.zeros(shape, np.int64)
        target = np.full(shape, -100, np.int64)
        weight = np.zeros(shape, np.float32)
        event = np.zeros(shape, np.int64)
        told = np.zeros((len(prompts), layout.num_fields, data.vectors.shape[1]), np.float32)
        ids[:, layout.prefix_position] = layout.prefix_ids
        segment[:, layout.prefix_position] = layout.prefix_segment
        segment[:, layout.soft_position] = layout.soft_segment
        position[:, :head] = np.arange(head)
        for row, (prompt, n) in enumerate(zip(prompts.tolist(), lengths.tolist())):
            source = slice(data.prompts[prompt], data.prompts[prompt] + n)
            here = slice(head, head + n)
            ids[row, here] = behaviour.ids[source]
            segment[row, here] = behaviour.segment[source]
            position[row, here] = behaviour.position[source]
            asked = self._tell(prompt, told[row])
            asked = asked[1:] & (behaviour.segment[source][1:] == behaviour.segment[source][:-1])
            before = slice(head, head + n - 1)
            target[row, before][asked] = behaviour.ids[source][1:][asked]
            weight[row, before][asked] = behaviour.weight[source][1:][asked]
            event[row, before] = data.event[source][1:]
        column, line = segment[:, None, :], segment[:, :, None]
        fields = layout.num_fields
        sees = (line == column) | (column == -1)
        sees |= (line >= fields) & (column < fields) & (column >= 0)
        sees &= np.tri(shape[1], dtype=bool)
        sees |= np.eye(shape[1], dtype=bool)
        words = None if data.words is None else torch.from_numpy(data.words[data.user[prompts]])
        return _Batch(
            torch.from_numpy(ids),
            torch.from_numpy(position),
            torch.from_numpy(sees)[:, None],
            torch.from_numpy(told),
            words,
            torch.from_numpy(target),
            torch.from_numpy(weight),
            event,
        )

    def _tell(self, prompt: int, told: Any) -> Any:
        """Fills what is told [J, r] in a prompt; its tokens [n] that may carry loss."""
        data, random = self.data, self.generator
        start, stop = data.prompts[prompt], data.prompts[prompt + 1]
        asked = np.ones(stop - start, np.bool_)
        if data.words is not None:
            return asked
        user = data.user[prompt]
        first = int(data.event[data.behaviour.offsets[user]])
        last = int(data.event[data.behaviour.offsets[user + 1] - 1]) + 1
        own = data.event[start:stop]
        a, b = int(own[0]), int(own[-1]) + 1
        known = np.concatenate([np.arange(first, a), np.arange(b, last)])
        if not len(known):
            half = random.random(b - a) < 0.5
            known = np.arange(a, b)[half]
            asked = ~half[own - a]
        for j in range(len(told)):
            if not len(known) or (not self.told and random.random() < _UNTOLD):
                continue
            n = min(
                self.told or int(math.exp(random.random() * math.log(len(known) + 1))), len(known)
            )
            some = random.choice(known, n, replace=False) if n < len(known) else known
            told[j] = fold_in(data.vectors[data.kind[some]].sum(0)[None], np.asarray([n]))[0]
        return asked

    def _shuffle(self) -> None:
        """One pass over the prompts: shuffled, then by length within windows of ten batches."""
        data = self.data
        size = np.diff(data.prompts) + self.head
        there = (size > self.head + 1) & (data.judges[data.user] == self.judging)
        order = self.generator.permutation(np.flatnonzero(there))
        if len(order) == 0:
            if self.judging:
                return
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


class _Judges:
    """Users who are not learned from: the same prompts of theirs, whenever they are asked.

    Attributes:
        batches: Told of at most `_TOLD` other events.
    """

    def __init__(self, data: _Data, layout: Layout, seed: int) -> None:
        self.data, self.layout = data, layout
        self.batches: list[_Batch] = []
        if data.judges.any():
            queue = _Batches(data, layout, np.random.default_rng(seed), judging=True, told=_TOLD)
            queue._shuffle()
            self.batches = [queue.batch(b) for b in queue.queue[:_JUDGE_BATCHES]]

    def loss(self, model: Any, soft: _SoftRows, told: bool = True) -> float:
        """Of what the E-step asks, in nats; infinite without judges."""
        if not self.batches:
            return math.inf
        losses, found = _contrast if self.data.choices else _losses, []
        with torch.no_grad():
            for b in self.batches:
                asked = b if told else replace(b, told=torch.zeros_like(b.told))
                found.append(float(losses(model, soft, self.layout, asked)[1]))
        return sum(found) / len(found)

    def report(self, model: Any, soft: _SoftRows) -> dict[str, float] | None:
        """Of new users, who are `told` of ten events or `untold`, nats: of choices, per question
        whose an item is, another's or theirs; of reactions, per event, and what they would be by
        how often reactions go to the `item`, or at all (`constant`)."""
        if not self.batches:
            return None
        told, untold = self.loss(model, soft), self.loss(model, soft, told=False)
        if self.data.choices:
            return {"told": told, "untold": untold}
        events = np.concatenate([np.unique(b.event[(b.weight > 0).numpy()]) for b in self.batches])
        weight = sum(float(b.weight.sum()) for b in self.batches) / len(events)
        others = _baselines(self.data, events)
        return {"told": told * weight, "untold": untold * weight, **others}


def _baselines(data: _Data, events: Int64) -> dict[str, float]:
    """Nats per event of those [n] that never look at a user."""
    users = (
        np.searchsorted(
            data.event[data.behaviour.offsets[:-1]], np.arange(len(data.kind)), side="right"
        )
        - 1
    )
    counts = np.bincount(data.kind[~data.judges[users]], minlength=len(data.kind_names))
    _, text = np.unique([t for t, _ in data.kind_names], return_inverse=True)
    _, word = np.unique([w for _, w in data.kind_names], return_inverse=True)
    of_text, of_word = np.bincount(text, counts), np.bincount(word, counts)
    kinds = data.kind[events]
    share = (of_word + 1) / (of_word + 1).sum()
    item = (counts + _PRIOR * share[word]) / (of_text[text] + _PRIOR)
    return {
        "constant": float(-np.log(share[word[kinds]]).mean()),
        "item": float(-np.log(item[kinds]).mean()),
    }


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

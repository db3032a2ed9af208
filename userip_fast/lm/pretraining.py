"""Training of the embedded LM, or of the language that a frozen LM is told of users in, until users
held out gain nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.core.config import LMConfig
from userip_fast.core.progress import progress
from userip_fast.core.threads import look
from userip_fast.lm.foldin import FoldIn
from userip_fast.lm.lessons import STEP_TOKENS, Batch, Batches, Data
from userip_fast.prompts.layout import Layout
from userip_fast.prompts.packing import Behaviour, Int64

if TYPE_CHECKING:
    from userip_fast.lm.frozen import FrozenLM
    from userip_fast.prompts.behaviour import Told

PRETRAINING = "pre-training the LM"
"""What progress calls it."""

_DECAY = 0.1
_CONTRAST = 8.0  # nats a token that a nat of telling users apart is worth
_PASSES = 20  # over the log, at most
_LOOKS = 40  # at held-out users
_PATIENCE = 4  # looks in vain until steps become smaller
_DROPS, _DROP = 2, 0.3  # how often they do, and by how much
_LAST_PART = 0.4  # of the budget, in which they become smaller in any case
_JUDGE_BATCHES = 16
_TAUGHT_LOOKS, _TAUGHT_JUDGES = 8, 4  # a real LM's look costs as much as a step of training
_TOLD = 10  # events that judges are told of
_PRIOR = 10.0  # events that an item's reactions start with


def train(
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
    data = Data.of(behaviour, layout, told, slots, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer, layout, behaviour, config)
        rank = None if slots is not None else data.vectors.shape[1]
        soft = _SoftRows(model.get_input_embeddings(), layout, rank, model.config.hidden_size)
    model.train()
    parameters = [*model.parameters(), *soft.parameters()]
    # Half for language, half for what the E-step asks: of reactions it is one token of a dozen.
    shares = (1.0, _CONTRAST) if data.choices else (0.5, 0.5)
    judges = _Judges(data, layout, seed, _JUDGE_BATCHES)
    tokens = _budget(config.embedded_tokens, data)
    curve = _learn(model, soft, parameters, data, judges, shares, tokens, _LOOKS, PRETRAINING, show)
    model.eval()
    return model, soft.language(data), curve


def teach(
    lm: FrozenLM,
    layout: Layout,
    behaviour: Behaviour,
    told: Told,
    tokens: int,
    seed: int,
    show: bool,
) -> tuple[FoldIn, dict[str, Any]]:
    """The language in which a frozen LM is told of users, and how training went: prompt tuning of
    the map alone ("The Power of Scale for Parameter-Efficient Prompt Tuning", 2021), by gradients
    through the LM.

    Args:
        tokens: To train on, at most.
    """
    data = Data.of(behaviour, layout, told, None, seed)
    soft = _SoftRows(lm.embed, layout, data.vectors.shape[1], lm.hidden_size, lm.device)
    # A row like those of text, and the same for all users until something is learned: an LM that
    # cannot change makes noise of rows that it has never met.
    ids, counts = np.unique(behaviour.ids, return_counts=True)
    rows = lm.embed(torch.from_numpy(ids).long().to(lm.device)).double().cpu()
    mean = torch.from_numpy(counts).double() @ rows / counts.sum()
    mean *= lm.embedding_rms / mean.square().mean().sqrt()
    with torch.no_grad():
        soft.weight.zero_()
        soft.bias.copy_(mean.float().expand_as(soft.bias))
    # The language cannot change: what the E-step asks is all there is to learn.
    judges = _Judges(data, layout, seed, _TAUGHT_JUDGES)
    steps = _budget(tokens, data)
    what = "telling the LM of users"
    with lm.attention("sdpa"):
        curve = _learn(
            lm.model, soft, [*soft.parameters()], data, judges, (0.0, 1.0), steps, _TAUGHT_LOOKS,
            what, show,
        )  # fmt: skip
    found = soft.language(data)
    assert found is not None
    return found, curve


def _learn(
    model: Any,
    soft: _SoftRows,
    parameters: list[Tensor],
    data: Data,
    judges: _Judges,
    shares: tuple[float, float],
    tokens: int,
    looks: int,
    what: str,
    show: bool,
) -> dict[str, Any]:
    """Trains `parameters` in place, to the best that judges saw; the curve.

    Args:
        shares: Of the loss of all tokens, and of what the E-step asks.
    """
    layout, seed = judges.layout, judges.seed
    batches = Batches(data, layout, np.random.default_rng(seed))
    optimizer = _optimizer(parameters)
    losses = _contrast if data.choices else _losses
    steps = max(1, tokens // STEP_TOKENS)
    every = max(1, steps // looks)
    warm = 50 if shares[0] else max(1, steps // 8)  # a map alone is soon on its way
    curve: dict[str, Any] = {n: [] for n in ("tokens", "loss", "scored", "held_out")}
    recent: list[tuple[float, float]] = []
    best, kept, in_vain, drops = math.inf, None, 0, 0
    total = steps * STEP_TOKENS
    with progress(what, total, "tokens", show, at_most=True) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps, drops if judges.batches else None, warm)
            whole, scored = losses(model, soft, layout, batches.next())
            loss = shares[0] * whole + shares[1] * scored
            look()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append((whole.item(), scored.item()))
            if (step + 1) % every and step + 1 < steps:
                bar.advance(STEP_TOKENS, loss=recent[-1][0])
                continue
            held_out = judges.loss(model, soft)
            bar.advance(STEP_TOKENS, loss=recent[-1][0], held_out=held_out)
            curve["tokens"].append((step + 1) * STEP_TOKENS)
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
    return {**curve, "nll": judges.report(model, soft)}


def _rate(step: int, steps: int, drops: int | None, warm: int) -> float:
    """Learning rate: a short way up, then level, lowered where held-out users gained nothing, and
    in the last part of the budget down to a tenth; half a cosine where nobody is held out."""
    up = min(1.0, (step + 1) / min(warm, steps))
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


def _budget(tokens: int, data: Data) -> int:
    """Tokens to train on: some passes over the log, and `tokens` at most."""
    return min(tokens, _PASSES * max(len(data.behaviour.ids), STEP_TOKENS))


def _losses(model: Any, soft: _SoftRows, layout: Layout, b: Batch) -> tuple[Tensor, Tensor]:
    """Mean loss of all tokens asked for, and of what the E-step asks."""
    told = _token_losses(model, soft, layout, b)
    every = told.sum() / (b.target >= 0).sum().clamp_min(1)
    return every, (told * b.weight).sum() / b.weight.sum().clamp_min(1e-9)


def _contrast(model: Any, soft: _SoftRows, layout: Layout, b: Batch) -> tuple[Tensor, Tensor]:
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


def _token_losses(model: Any, soft: _SoftRows, layout: Layout, b: Batch) -> Tensor:
    """[B, T]; 0 where there is no loss."""
    at = torch.from_numpy(layout.soft_position).long().to(soft.device)
    x = soft.embed(b.ids.to(soft.device))
    x = x.index_copy(1, at, soft(b).to(x))
    mask, position = b.mask.to(x.device), b.position.to(x.device)
    logits = model(
        inputs_embeds=x, attention_mask=mask, position_ids=position, use_cache=False
    ).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), b.target.to(x.device).flatten(), ignore_index=-100,
        reduction="none",
    ).view(b.target.shape).cpu()  # fmt: skip


class _SoftRows(torch.nn.Module):
    """What stands in the soft rows: a map of what is told, or words that are known.

    Args:
        embed: The LM's embedding of token ids, no parameter of ours.
        rank: Length of what is told; None for words.
        device: Where the LM runs.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        layout: Layout,
        rank: int | None,
        hidden: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.device = device
        self._embed = [embed]
        self.field = np.repeat(
            np.arange(layout.num_fields), [s.stop - s.start for s in layout.field_slices]
        )
        if rank is not None:
            # So that what is told is as large as a token's embedding.
            spread = hidden**-0.5 / math.sqrt(rank)
            self.weight = torch.nn.Parameter(spread * torch.randn(layout.num_soft, rank, hidden))
            self.bias = torch.nn.Parameter(torch.zeros(layout.num_soft, hidden))

    @property
    def embed(self) -> Callable[[Tensor], Tensor]:
        return self._embed[0]

    def forward(self, b: Batch) -> Tensor:
        """[B, S, D]."""
        if b.words is not None:
            return self.embed(b.words)
        told = torch.einsum("bsr,srd->bsd", b.told[:, self.field], self.weight)
        return told + self.bias

    def language(self, data: Data) -> FoldIn | None:
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


class _Judges:
    """Users who are not learned from: the same prompts of theirs, whenever they are asked.

    Attributes:
        batches: Told of at most `_TOLD` other events.
    """

    def __init__(self, data: Data, layout: Layout, seed: int, batches: int) -> None:
        self.data, self.layout, self.seed = data, layout, seed
        self.batches: list[Batch] = []
        if data.judges.any():
            queue = Batches(data, layout, np.random.default_rng(seed), judging=True, told=_TOLD)
            queue._shuffle()
            self.batches = [queue.batch(b) for b in queue.queue[:batches]]

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


def _baselines(data: Data, events: Int64) -> dict[str, float]:
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

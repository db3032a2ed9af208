"""The users a model was fitted on, by its finished codebooks: codes, what they add up to, cards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from userip_fast.codebook.names import CodeCard, ItemCounts, Traits, code_cards
from userip_fast.em.cache import DiskCache
from userip_fast.model.fitted import Model, all_probabilities
from userip_fast.model.tally import Tally
from userip_fast.prompts.behaviour import Source

_BANK_BLOCK = 1 << 14  # users handed to the writer at once; a stream keeps the last few blocks


@dataclass(frozen=True)
class Everyone:
    """See the module.

    Attributes:
        source: What they did, in hash order.
        codes: [U, J].
        sure: [U, J] probabilities of the codes, where they were asked for.
        profiles: [U, sum of K_j] fp16 probabilities of all codes, likewise.
        tally: Over all of them.
        cards: What each code stands for.
    """

    source: Source
    codes: Tensor
    sure: Tensor | None
    profiles: Tensor | None
    tally: Tally
    cards: dict[str, list[CodeCard]]

    def write_bank(self, model: Model, path: Path) -> None:
        with model.bank_writer(path) as writer:
            for a in range(0, self.source.num_users, _BANK_BLOCK):
                b = min(a + _BANK_BLOCK, self.source.num_users)
                kept = (self.sure, self.profiles)
                p, profiles = (None if x is None else x[a:b].numpy() for x in kept)
                writer.append(self.source.keys_of(a, b), self.codes[a:b].numpy(), p, profiles)


def infer_everyone(
    model: Model,
    source: Source,
    traits: Traits,
    cache: DiskCache | None,
    kept: tuple[bool, bool],
    show: bool,
) -> Everyone:
    """Each process infers its own users; all know everybody's codes in the end.

    Args:
        traits: Of the items of `source`, by which codes are named.
        cache: Keeps finished blocks, and finds them again.
        kept: Whether to keep the probabilities of the codes found, and those of all codes.
    """
    fields = model.config.fields
    probabilities, profiles = kept
    counts = ItemCounts([f.codebook_size for f in fields], traits, model.format.words)
    trainer = model.ready_trainer(show)
    tally = Tally(trainer.own_users(source)[0])
    codes, sure = [], [torch.zeros(0, len(fields))]
    every = [torch.zeros(0, sum(f.codebook_size for f in fields)).half()]
    for found in model.infer_blocks(source, cache=cache, show=show):
        assert found.code_ids is not None
        users = tally.add(found, source, model.lm.tokenizer)
        counts.add(found.code_ids.numpy(), source.events_of(*users))
        codes.append(found.code_ids)
        if probabilities and (own := found.probabilities()) is not None:
            sure.append(own)
        if profiles:
            every.append(torch.from_numpy(all_probabilities(found)).half())
    all_codes = trainer.gather_codes(codes)
    all_sure = trainer.gather_users(torch.cat(sure)) if probabilities else None
    all_profiles = trainer.gather_users(torch.cat(every)) if profiles else None
    tally = tally.over_processes(trainer)
    counts.merge(trainer.processes)
    cards = code_cards(model.lm, fields, model.codebooks, counts)
    return Everyone(source, all_codes, all_sure, all_profiles, tally, cards)

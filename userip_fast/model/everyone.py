"""The users a model was fitted on, by its finished codebooks: codes, what they add up to, cards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from userip_fast.codebook.names import CodeCard, ItemCounts, Traits, code_cards
from userip_fast.em.cache import DiskCache
from userip_fast.model.fitted import Model
from userip_fast.model.tally import Tally
from userip_fast.prompts.behaviour import Source

_BANK_BLOCK = 1 << 18  # users handed to the bank's writer at once


@dataclass(frozen=True)
class Everyone:
    """See the module.

    Attributes:
        source: What they did, in hash order.
        codes: [U, J].
        sure: [U, J] probabilities of the codes, where they were asked for.
        tally: Over all of them.
        cards: What each code stands for.
    """

    source: Source
    codes: Tensor
    sure: Tensor | None
    tally: Tally
    cards: dict[str, list[CodeCard]]

    def write_bank(self, model: Model, path: Path) -> None:
        with model.bank_writer(path) as writer:
            for a in range(0, self.source.num_users, _BANK_BLOCK):
                b = min(a + _BANK_BLOCK, self.source.num_users)
                p = None if self.sure is None else self.sure[a:b].numpy()
                writer.append(self.source.keys_of(a, b), self.codes[a:b].numpy(), p)


def infer_everyone(
    model: Model,
    source: Source,
    traits: Traits,
    cache: DiskCache | None,
    probabilities: bool,
    show: bool,
) -> Everyone:
    """Each process infers its own users; all know everybody's codes in the end.

    Args:
        traits: Of the items of `source`, by which codes are named.
        cache: Keeps finished blocks, and finds them again.
        probabilities: Whether to keep them, of the codes.
    """
    fields = model.config.fields
    counts = ItemCounts([f.codebook_size for f in fields], traits, model.format.words)
    trainer = model.ready_trainer(show)
    tally = Tally(trainer.own_users(source)[0])
    codes, sure = [], [torch.zeros(0, len(fields))]
    for profiles in model.infer_blocks(source, cache=cache, show=show):
        assert profiles.code_ids is not None
        users = tally.add(profiles, source, model.lm.tokenizer)
        counts.add(profiles.code_ids.numpy(), source.events_of(*users))
        codes.append(profiles.code_ids)
        if probabilities and (own := profiles.probabilities()) is not None:
            sure.append(own)
    all_codes = trainer.gather_codes(codes)
    all_sure = trainer.gather_users(torch.cat(sure)) if probabilities else None
    tally = tally.over_processes(trainer)
    counts.merge(trainer.processes)
    cards = code_cards(model.lm, fields, model.codebooks, counts)
    return Everyone(source, all_codes, all_sure, tally, cards)

"""A model before EM: how its log is told, and the LM that is told it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from userip_fast.core import heap
from userip_fast.core.config import Config
from userip_fast.core.errors import DataError
from userip_fast.data import Catalogue, Data
from userip_fast.em.mstep import check_codebook_sizes
from userip_fast.em.table import has_table
from userip_fast.lm import FrozenLM, open_lm
from userip_fast.lm.embedded import SlotIds, embedded_lm, taught
from userip_fast.lm.graphs import check_device
from userip_fast.lm.load import resolve_device
from userip_fast.lm.trace import Workload
from userip_fast.model.fitted import Model
from userip_fast.model.learned import make_trainer
from userip_fast.prompts.behaviour import BehaviourSource, Source, Told
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.layout import Layout, PromptTemplate
from userip_fast.prompts.packing import Behaviour
from userip_fast.prompts.stream import StreamSource, behaviour_source

_LM_USERS = 100_000  # of a stream, those whose behaviour the embedded LM is trained on


def prepare(
    data: Data, config: Config, *, lm: FrozenLM | None = None, show: bool = False
) -> tuple[Model, Source]:
    """Everything before EM: behaviour format, LM (trained if it is the embedded one), engine.

    Returns:
        A model without codebooks, and the training users' behaviour.
    """
    if data.num_users == 0:
        raise DataError("there is no user with behaviour to fit on")
    check_codebook_sizes(config.fields, data.num_users)
    device = resolve_device(config.lm.device)  # before a minute of training
    check_device(config.em.engine, device if lm is None else lm.device)
    fmt = BehaviourFormat.fit(config.told, data, config.em.seed)
    catalogue = Catalogue.from_interactions(data)
    source: Source = behaviour_source(data, fmt, catalogue)
    if lm is None:
        most = _LM_USERS if isinstance(source, StreamSource) else source.num_users
        lm = load_lm(source.part(0, min(most, source.num_users)), config, show=show)
    source = source.without_untold(lm.tokenizer, config.data.on_bad)
    heap.trim()  # of what the LM was trained on
    trainer = make_trainer(config, lm, show)
    return Model(config, fmt, lm, [], torch.zeros(0, 0), catalogue, {}, trainer), source


def load_lm(
    source: BehaviourSource, config: Config, *, slot_ids: SlotIds | None = None, show: bool = False
) -> FrozenLM:
    """The LM that the config names; the embedded one is pre-trained on `source` if need be, another
    one told of its users where an event table will ask it.

    Args:
        slot_ids: What stands in the soft rows meanwhile; see `userip_fast.lm.embedded`.
    """

    def behaviour_of(tokenizer: Any, layout: Layout) -> tuple[Behaviour, Told]:
        source.refuse_untold(tokenizer, config.data.on_bad)  # before a minute of training
        everyone = 0, source.num_users
        told = source.told(tokenizer, *everyone, repeats=True)
        return source.block(tokenizer, layout, *everyone), told

    template, key, seed = PromptTemplate(config.fields), source.content_key(), config.em.seed
    if config.lm.path != "default":
        lm = open_lm(config.lm.path, config.lm, Workload.of(config))
        tokens, starts = config.lm.taught_tokens, config.em.start in ("auto", "told")
        if tokens and starts and has_table(config) and source.format.by_lifts:
            lm.foldin = taught(
                lm, template, behaviour_of, tokens, content_key=key, seed=seed, show=show
            )
        return lm
    folder = embedded_lm(
        source.rendered(),
        template,
        behaviour_of,
        config.lm,
        content_key=key,
        slot_ids=slot_ids,
        seed=seed,
        show=show,
    )
    how = config.lm
    if how.quantization == "auto":
        how = replace(how, quantization="none")
    lm = open_lm(str(folder), how, Workload.of(config))
    lm.embedded = True
    return lm

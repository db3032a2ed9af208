"""`fit`: from an interaction log to a model and a feature bank, in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from userip_fast._version import __version__
from userip_fast.bank import FeatureBank
from userip_fast.codebook.names import CodeCard, ItemCounts, Traits, code_cards, named_share
from userip_fast.core import heap, threads
from userip_fast.core.config import Config
from userip_fast.core.distributed import Processes, start_processes
from userip_fast.core.errors import ConfigError, DataError
from userip_fast.core.fields import ProfileField
from userip_fast.core.files import write_json
from userip_fast.core.scalars import Scalars
from userip_fast.data import Catalogue, Data, Interactions, InteractionStream
from userip_fast.em.mstep import check_codebook_sizes
from userip_fast.em.table import has_table
from userip_fast.em.trainer import FitResult
from userip_fast.jobs.explain import explain
from userip_fast.jobs.run_folder import JsonLines, Run, command_line, open_run
from userip_fast.lm import FrozenLM, open_lm
from userip_fast.lm.embedded import SlotIds, embedded_lm, taught
from userip_fast.lm.graphs import check_device
from userip_fast.lm.load import resolve_device
from userip_fast.lm.pretraining import PRETRAINING
from userip_fast.lm.trace import Workload
from userip_fast.model.files import orders_like, read_codebooks
from userip_fast.model.fitted import Model
from userip_fast.model.learned import check_probabilities, make_trainer
from userip_fast.model.tally import Tally
from userip_fast.prompts.behaviour import BehaviourFormat, BehaviourSource, Told
from userip_fast.prompts.layout import Layout, PromptTemplate
from userip_fast.prompts.packing import Behaviour
from userip_fast.prompts.stream import StreamSource, behaviour_source, truncated_users
from userip_fast.report.write import report_run

_LM_USERS = 100_000  # of a stream, those whose behaviour the embedded LM is trained on
_EXPLAINED_USERS = 4096  # among whom the report finds examples; `userip explain` takes all
_BANK_BLOCK = 1 << 18  # users handed to the bank's writer at once


def fit(
    data: Data,
    lm: str | FrozenLM | None = None,
    fields: Sequence[ProfileField] | None = None,
    config: Config | Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    max_users: int | None = None,
    resume: bool = False,
    probabilities: bool = False,
    like: str | os.PathLike[str] | None = None,
    show: bool = True,
) -> Model:
    """Learns codebooks on the users of `data`, and writes model, bank, metrics and report.

    Args:
        data: Training histories, from `read_interactions` or a split of it; or, where they do not
            fit into memory, from `stream_interactions`.
        lm: "default" for the embedded LM, a folder, GGUF file, hub id or "small", or a loaded LM;
            None takes the config's.
        fields: Profile fields; None takes the config's.
        config: Settings, or a nested mapping of them; None for the defaults.
        out: Run folder that gets `model/ bank/ checkpoints/ metrics.json metrics.jsonl
            report.html`. Model and bank appear whole, at the end; None writes nothing.
        max_users: Only the first so many users in hash order.
        resume: Goes on after the last checkpoint of `out`.
        probabilities: Whether the bank keeps each code's probability given the behaviour.
        like: Folder of an earlier model with the same LM and fields; each code gets the number of
            the one nearest to it there.
        show: Whether to show progress.

    Raises:
        DataError: The data breaks a rule (see `read_interactions`), or has fewer users than codes.
        ConfigError: A setting is wrong.
        UnsupportedError, UnavailableError: The LM cannot be used, and why.
        MismatchError: `like` has another LM or other fields.
        UnavailableError: Another process is writing `out`.
    """
    loaded = lm if isinstance(lm, FrozenLM) else None
    config = _asked(config, loaded.source if loaded else lm, fields, data)
    check_probabilities(config, probabilities)
    if like is not None and config.em.recipe == "paper":
        raise ConfigError("like: the published recipe trains codes and users at once; fit without")
    if resume and out is None:
        raise ConfigError("resume=True needs `out`, the run folder to go on in")
    if max_users is not None:
        data = data.head_users(max_users)
    old = None if like is None else read_codebooks(os.fspath(like))
    processes = start_processes()
    threads.settle()
    with open_run(out, writes=processes.rank == 0) as run:
        job = _Job(data, config, run, processes, resume, probabilities, show)
        with Scalars(run.scalars if run and job.writes else None) as scalars:
            with processes.first_alone():  # it fills the cache of embedded LMs
                model, source = prepare(data, config, lm=loaded, show=job.shows)
            learning = _learn(model, source, job, scalars)
        if old is not None:
            model.renumber(orders_like(old, model))
        everyone = _infer_everyone(model, source, job)
        model.cards = {n: [card.to_dict() for card in own] for n, own in everyone.cards.items()}
        if run and job.writes:
            model.save(run.model)
            _write_bank(model, source, everyone, run.bank)
            write_json(run.metrics, _metrics(model, source, job, learning, everyone))
            _write_report(model, job, run)
            model.ready_trainer().forget(run.checkpoints)
        processes.barrier()
    return model


def _asked(
    config: Config | Mapping[str, Any] | None,
    lm: str | FrozenLM | None,
    fields: Sequence[ProfileField] | None,
    data: Data,
) -> Config:
    """The settings of a fit, from all that tells of them."""
    if config is None:
        config = Config()
    elif not isinstance(config, Config):
        config = Config.from_dict(config)
    if lm is not None:
        config = replace(config, lm=replace(config.lm, path=str(lm)))
    if fields is not None:
        config = replace(config, fields=tuple(fields))
    if data.read_as is not None:  # what is saved tells how to read other users' logs alike
        config = replace(config, data=replace(config.data, **asdict(data.read_as)))
    return config


class _Job:
    """What a fit is asked for, and where it runs."""

    def __init__(
        self,
        data: Data,
        config: Config,
        run: Run | None,
        processes: Processes,
        resume: bool,
        probabilities: bool,
        show: bool,
    ) -> None:
        self.data, self.config, self.run, self.processes = data, config, run, processes
        self.resume, self.probabilities = resume, probabilities
        self.writes = processes.rank == 0
        self.shows = show and self.writes
        self.began = time.monotonic()


def prepare(
    data: Data, config: Config, *, lm: FrozenLM | None = None, show: bool = False
) -> tuple[Model, BehaviourSource | StreamSource]:
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
    if lm is None:
        some = data.head_users(_LM_USERS) if isinstance(data, InteractionStream) else data
        lm = load_lm(BehaviourSource(fmt.events(some, catalogue), fmt), config, show=show)
    heap.trim()  # of what the LM was trained on
    trainer = make_trainer(config, lm, show)
    source = behaviour_source(data, fmt, catalogue, lm.tokenizer, config.data.on_bad)
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
        truncated_users(source, tokenizer, config.data.on_bad)  # before a minute of training
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


@dataclass(frozen=True)
class _Learning:
    """What EM found, and a record of each of its rounds."""

    found: FitResult
    records: list[dict[str, Any]]


def _learn(
    model: Model, source: BehaviourSource | StreamSource, job: _Job, scalars: Scalars
) -> _Learning:
    """Codebooks by EM, with the event table where that serves; the model goes on with them."""
    if model.lm.embedded:
        scalars.training(PRETRAINING, Path(model.lm.source))
    trainer, run = model.ready_trainer(job.shows), job.run
    trainer.processes = job.processes
    records: list[dict[str, Any]] = []
    with JsonLines(run.log if run and job.writes else None) as lines:

        def log(record: dict[str, Any]) -> None:
            records.append(record)
            lines.write(record)
            scalars.round(record)

        checkpoints = run.checkpoints if run else None
        found = trainer.fit(source, log=log, checkpoints=checkpoints, resume=job.resume)
    model.take(found)
    return _Learning(found, records)


@dataclass(frozen=True)
class _Everyone:
    """The training users by the finished codebooks.

    Attributes:
        codes: [U, J] in hash order.
        sure: [U, J] probabilities of the codes, where the bank is to keep them.
        tally: Over all of them.
        cards: What each code stands for.
    """

    codes: Tensor
    sure: Tensor | None
    tally: Tally
    cards: dict[str, list[CodeCard]]


def _infer_everyone(model: Model, source: BehaviourSource | StreamSource, job: _Job) -> _Everyone:
    data, fields = job.data, job.config.fields
    traits = Traits.of(data.items, data.item_text, data.item_counts())
    sizes = [f.codebook_size for f in fields]
    counts = ItemCounts(sizes, data.num_items, traits, model.format.words)
    trainer = model.ready_trainer(job.shows)
    tally = Tally(trainer.own_users(source)[0])
    cache = trainer.infer_cache(job.run.checkpoints, model.start) if job.run else None
    codes, sure = [], [torch.zeros(0, len(fields))]
    for profiles in model.infer_blocks(source, cache=cache, show=job.shows):
        assert profiles.code_ids is not None
        users = tally.add(profiles, source, model.lm.tokenizer)
        counts.add(profiles.code_ids.numpy(), source.events_of(*users))
        codes.append(profiles.code_ids)
        if job.probabilities and (own := profiles.probabilities()) is not None:
            sure.append(own)
    all_codes = trainer.gather_codes(codes)
    all_sure = trainer.gather_users(torch.cat(sure)) if job.probabilities else None
    tally = tally.over_processes(trainer)
    counts.merge(job.processes)
    cards = code_cards(model.lm, fields, model.codebooks, counts, data.item_text)
    return _Everyone(all_codes, all_sure, tally, cards)


def _write_bank(
    model: Model, source: BehaviourSource | StreamSource, everyone: _Everyone, path: Path
) -> None:
    with model.bank_writer(path) as writer:
        for a in range(0, source.num_users, _BANK_BLOCK):
            b = min(a + _BANK_BLOCK, source.num_users)
            p = None if everyone.sure is None else everyone.sure[a:b].numpy()
            writer.append(source.keys_of(a, b), everyone.codes[a:b].numpy(), p)


def _metrics(
    model: Model,
    source: BehaviourSource | StreamSource,
    job: _Job,
    learning: _Learning,
    everyone: _Everyone,
) -> dict[str, Any]:
    """What metrics.json holds."""
    data, lm, trainer = job.data, model.lm, model.ready_trainer()
    seconds = time.monotonic() - job.began
    usage = {
        f.name: book.usage(z.long())
        for f, book, z in zip(job.config.fields, model.codebooks, everyone.codes.T)
    }
    head = learning.found.head_report
    return {
        "run": {
            "userip_fast": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command_line(),
        },
        "data": {
            "users": source.num_users,
            "items": data.num_items,
            "events": data.num_events,
            "rated": data.rated,
            "time_ordered": data.ordered,
            "dropped": data.report.to_dict(),
            "told": asdict(everyone.tally.told),
        },
        "lm": {
            "source": "embedded" if lm.embedded else lm.source,
            "fingerprint": lm.fingerprint,
            "quantization": lm.quantization,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": str(lm.device),
            "hidden_size": lm.hidden_size,
        },
        "fit": {
            "seconds": seconds,
            "users_per_second": source.num_users / seconds,
            "nll_per_weight": everyone.tally.nll_per_weight,
            "forward_equivalents": everyone.tally.forward_equivalents,
            "rounds": len(learning.records),
            "input_wait_share": trainer.waited_s / max(trainer.swept_s, 1e-9),
            "processes": job.processes.world,
        },
        "fields": {
            name: {
                "codes": len(u.counts),
                "perplexity": u.perplexity,
                "dead": u.dead,
                "named": named_share(everyone.cards[name]),
                "counts": u.counts.tolist(),
            }
            for name, u in usage.items()
        },
        **({"amortised": asdict(head)} if head else {}),
        "model_fingerprint": model.fingerprint,
        "seed": job.config.em.seed,
    }


def _write_report(model: Model, job: _Job, run: Run) -> None:
    """report.html, with users who stand for the codes where histories are in memory."""
    if isinstance(job.data, Interactions):
        bank, some = FeatureBank.open(run.bank), job.data.head_users(_EXPLAINED_USERS)
        explain(model, some, bank=bank, out=run.root, show=False)
    report_run(run.root)

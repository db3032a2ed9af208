"""`fit`: from an interaction log to a model and a feature bank, in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from userip_fast.codebook.names import Traits
from userip_fast.core import threads
from userip_fast.core.config import Config
from userip_fast.core.distributed import start_processes
from userip_fast.core.errors import ConfigError
from userip_fast.core.fields import ProfileField
from userip_fast.core.files import write_json
from userip_fast.core.scalars import Scalars
from userip_fast.data import Data
from userip_fast.data.interactions import ReadAs
from userip_fast.em.trainer import FitResult
from userip_fast.jobs.explain import examples_of
from userip_fast.jobs.metrics import log_record, run_record
from userip_fast.jobs.run_folder import JsonLines, Run, open_run
from userip_fast.lm import FrozenLM
from userip_fast.lm.pretraining import PRETRAINING
from userip_fast.model.everyone import Everyone, infer_everyone
from userip_fast.model.files import orders_like, read_codebooks
from userip_fast.model.fitted import Model
from userip_fast.model.learned import check_probabilities
from userip_fast.model.prepare import prepare
from userip_fast.prompts.behaviour import Source
from userip_fast.report.write import report_run

_EXPLAINED_USERS = 4096  # among whom the report finds examples; `userip explain` takes all


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
    profiles: bool = False,
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
        profiles: Whether it keeps the probabilities of all codes; see `Model.infer`.
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
    config = _asked(config, loaded.source if loaded else lm, fields, data.read_as)
    check_probabilities(config, probabilities or profiles)
    if like is not None and config.em.recipe == "paper":
        raise ConfigError("like: the published recipe trains codes and users at once; fit without")
    if resume and out is None:
        raise ConfigError("resume=True needs `out`, the run folder to go on in")
    if max_users is not None:
        data = data.head_users(max_users)
    old = None if like is None else read_codebooks(os.fspath(like))
    processes, began = start_processes(), time.monotonic()
    threads.settle()
    with open_run(out, writes=processes.rank == 0) as run:
        written = run if processes.rank == 0 else None
        show = show and processes.rank == 0
        about, traits = log_record(data), Traits.of(data.items, data.item_text, data.item_counts())
        with Scalars(written.scalars if written else None) as scalars:
            with processes.first_alone():  # it fills the cache of embedded LMs
                model, source = prepare(data, config, lm=loaded, show=show)
            trainer = model.ready_trainer(show)
            trainer.processes = processes
            learned, records = _learn(model, source, run, scalars, resume)
        if old is not None:
            model.renumber(orders_like(old, model))
        cache = trainer.infer_cache(run.checkpoints, model.start) if run else None
        kept = probabilities, profiles
        everyone = infer_everyone(model, source, traits, cache, kept, show)
        model.cards = {n: [card.to_dict() for card in own] for n, own in everyone.cards.items()}
        if written:
            model.save(written.model)
            everyone.write_bank(model, written.bank)
            seconds = time.monotonic() - began
            write_json(
                written.metrics, run_record(model, about, learned, records, everyone, seconds)
            )
            write_json(written.explain, _examples(model, everyone))
            report_run(written.root)
            trainer.forget(written.checkpoints)
        processes.barrier()
    return model


def _asked(
    config: Config | Mapping[str, Any] | None,
    lm: str | FrozenLM | None,
    fields: Sequence[ProfileField] | None,
    read_as: ReadAs | None,
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
    if read_as is not None:  # what is saved tells how to read other users' logs alike
        config = replace(config, data=replace(config.data, **asdict(read_as)))
    return config


def _learn(
    model: Model, source: Source, run: Run | None, scalars: Scalars, resume: bool
) -> tuple[FitResult, list[dict[str, Any]]]:
    """Codebooks by EM, with which the model goes on; and a record of each round."""
    if model.lm.embedded:
        scalars.training(PRETRAINING, Path(model.lm.source))
    trainer = model.ready_trainer()
    records: list[dict[str, Any]] = []
    with JsonLines(run.log if run and trainer.processes.rank == 0 else None) as lines:

        def log(record: dict[str, Any]) -> None:
            records.append(record)
            lines.write(record)
            scalars.round(record)

        checkpoints = run.checkpoints if run else None
        found = trainer.fit(source, log=log, checkpoints=checkpoints, resume=resume)
    model.take(found)
    return found, records


def _examples(model: Model, everyone: Everyone) -> dict[str, Any]:
    """What codes stand for, among some users: `userip explain` takes all."""
    some = everyone.source.part(0, min(_EXPLAINED_USERS, everyone.source.num_users))
    sure = None if everyone.sure is None else everyone.sure[: some.num_users].double().numpy()
    return examples_of(model, some, everyone.codes[: some.num_users].long().numpy(), sure)

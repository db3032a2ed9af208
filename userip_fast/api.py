"""`fit`: from an interaction log to a model and a feature bank, in one call."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from userip_fast import threads
from userip_fast._version import __version__
from userip_fast.bank import BankWriter, FeatureBank
from userip_fast.behaviour import BehaviourFormat, BehaviourSource, Told
from userip_fast.behaviour_stream import StreamSource
from userip_fast.config import Config
from userip_fast.data import Catalogue, Interactions, InteractionStream
from userip_fast.em.distributed import Processes, start_processes
from userip_fast.em.mstep import check_codebook_sizes
from userip_fast.em.steps import profiles_total
from userip_fast.em.table import has_table
from userip_fast.errors import ConfigError, DataError, StorageError
from userip_fast.explain import explain
from userip_fast.files import lock_file, storage_errors, sweep_leftovers, write_json
from userip_fast.lm import FrozenLM, open_lm
from userip_fast.lm.embedded import SlotIds, embedded_lm, taught
from userip_fast.lm.graphs import check_device
from userip_fast.lm.load import resolve_device
from userip_fast.lm.pretraining import PRETRAINING
from userip_fast.lm.trace import Workload
from userip_fast.model import (
    Data,
    Model,
    OldCodebooks,
    behaviour_source,
    check_probabilities,
    make_trainer,
    orders_like,
    read_codebooks,
    truncated_users,
)
from userip_fast.names import ItemCounts, Traits, code_cards, named_share
from userip_fast.packing import Behaviour
from userip_fast.prompts import Layout, ProfileField, PromptTemplate
from userip_fast.reach import Reach
from userip_fast.report import report_run
from userip_fast.scalars import Scalars

logger = logging.getLogger("userip_fast")

_LM_USERS = 100_000  # of a stream, those whose behaviour the embedded LM is trained on
_EXPLAINED_USERS = 4096  # among whom the report finds examples; `userip explain` takes all
_BANK_BLOCK = 1 << 18  # users handed to the bank's writer at once


@dataclass(frozen=True)
class Run:
    """A run folder's paths."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def bank(self) -> Path:
        return self.root / "bank"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def log(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def scalars(self) -> Path:
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


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
        report.html`.
            Model and bank appear whole, at the end; None writes nothing.
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
    config = _config(config, loaded.source if loaded else lm, fields)
    check_probabilities(config, probabilities)
    if like is not None and config.em.recipe == "paper":
        raise ConfigError("like: the published recipe trains codes and users at once; fit without")
    if resume and out is None:
        raise ConfigError("resume=True needs `out`, the run folder to go on in")
    if data.read_as is not None:  # what is saved tells how to read other users' logs alike
        config = replace(config, data=replace(config.data, **asdict(data.read_as)))
    if max_users is not None:
        data = data.head_users(max_users)
    old = None if like is None else read_codebooks(os.fspath(like))
    processes = start_processes()
    threads.settle()
    with open_run(out, writes=processes.rank == 0) as run:
        return _fit(data, loaded, config, run, processes, resume, probabilities, old, show)


def _fit(
    data: Data,
    loaded: FrozenLM | None,
    config: Config,
    run: Run | None,
    processes: Processes,
    resume: bool,
    probabilities: bool,
    old: OldCodebooks | None,
    show: bool,
) -> Model:
    """The work of `fit`, in a run folder that is ours alone."""
    writes = processes.rank == 0
    started = time.monotonic()
    records: list[dict[str, Any]] = []
    scalars_folder, lines = (run.scalars, run.log) if run and writes else (None, None)
    with Scalars(scalars_folder) as scalars:
        with processes.first_alone():  # it fills the cache of embedded LMs
            model, source = prepare(data, config, lm=loaded, show=show and writes)
        if model.lm.embedded:
            scalars.training(PRETRAINING, Path(model.lm.source))
        trainer = model.trainer
        assert trainer is not None
        trainer.processes = processes
        with _JsonLines(lines) as jsonl:

            def log(record: dict[str, Any]) -> None:
                records.append(record)
                jsonl.write(record)
                scalars.round(record)

            result = trainer.fit(
                source, log=log, checkpoints=run.checkpoints if run else None, resume=resume
            )
    model.codebooks = result.codebooks
    model.start, model.head = result.start, result.head
    model.calibration = result.calibration
    model.keep_table(result.table)
    if old is not None:
        orders = orders_like(old, model)
        model.codebooks = [b.reordered(order) for b, order in zip(model.codebooks, orders)]
        model.head = trainer.head = model.head and model.head.reordered(orders)
        model.calibration = trainer.calibration = model.calibration.reordered(orders)
    traits = Traits.of(data.items, data.item_text, data.item_counts())
    sizes = [f.codebook_size for f in config.fields]
    counts = ItemCounts(sizes, data.num_items, traits, model.format.words)
    found, sure = [], [torch.zeros(0, len(config.fields))]
    totals, told = np.zeros(4), Reach()
    done = trainer.own_users(source)[0]
    kept = trainer.infer_cache(run.checkpoints, model.start) if run else None
    table = model.event_table() if model.has_table else None
    for profiles in trainer.infer(source, model.codebooks, model.start, cache=kept, table=table):
        assert profiles.code_ids is not None
        users = len(profiles.nll)
        counts.add(profiles.code_ids.numpy(), source.events_of(done, done + users))
        found.append(profiles.code_ids)
        if probabilities and (own := profiles.probabilities()) is not None:
            sure.append(own)
        told += source.reach(model.lm.tokenizer, done, done + users)
        done += users
        totals += profiles_total(profiles)
    code_ids = trainer.gather_codes(found)
    sureness = trainer.gather_users(torch.cat(sure)) if probabilities else None
    _, nll, weight, cost = trainer.add_up(totals).tolist()
    told = Reach(*trainer.add_up(np.array(astuple(told))).tolist())
    counts.merge(processes)
    cards = code_cards(model.lm, config.fields, model.codebooks, counts, data.item_text)
    model.cards = {name: [card.to_dict() for card in own] for name, own in cards.items()}
    usage = {
        f.name: book.usage(z.long())
        for f, book, z in zip(config.fields, model.codebooks, code_ids.T)
    }
    if run and writes:
        model.save(run.model)
        with BankWriter(
            run.bank,
            fields=model.bank_fields(),
            model_fingerprint=model.fingerprint,
            metadata={"lm": model.lm.source, "config": config.to_dict()},
        ) as writer:
            for a in range(0, source.num_users, _BANK_BLOCK):
                b = min(a + _BANK_BLOCK, source.num_users)
                p = None if sureness is None else sureness[a:b].numpy()
                writer.append(source.keys_of(a, b), code_ids[a:b].numpy(), p)
        seconds = time.monotonic() - started
        metrics = {
            "run": {
                "userip_fast": __version__,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": _command(),
            },
            "data": {
                "users": source.num_users,
                "items": data.num_items,
                "events": data.num_events,
                "rated": data.rated,
                "time_ordered": data.ordered,
                "dropped": data.report.to_dict(),
                "told": asdict(told),
            },
            "lm": {
                "source": "embedded" if model.lm.embedded else model.lm.source,
                "fingerprint": model.lm.fingerprint,
                "quantization": model.lm.quantization,
                "dtype": str(model.lm.dtype).removeprefix("torch."),
                "device": str(model.lm.device),
                "hidden_size": model.lm.hidden_size,
            },
            "fit": {
                "seconds": seconds,
                "users_per_second": source.num_users / seconds,
                "nll_per_weight": nll / max(weight, 1e-12),
                "forward_equivalents": cost / source.num_users,
                "rounds": len(records),
                "input_wait_share": trainer.waited_s / max(trainer.swept_s, 1e-9),
                "processes": processes.world,
            },
            "fields": {
                name: {
                    "codes": len(u.counts),
                    "perplexity": u.perplexity,
                    "dead": u.dead,
                    "named": named_share(cards[name]),
                    "counts": u.counts.tolist(),
                }
                for name, u in usage.items()
            },
            **({"amortised": asdict(result.head_report)} if result.head_report else {}),
            "model_fingerprint": model.fingerprint,
            "seed": config.em.seed,
        }
        write_json(run.metrics, metrics)
        if isinstance(data, Interactions):
            bank = FeatureBank.open(run.bank)
            explain(model, data.head_users(_EXPLAINED_USERS), bank=bank, out=run.root, show=False)
        report_run(run.root)
        trainer.forget(run.checkpoints)
    processes.barrier()
    return model


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
    trainer = make_trainer(config, lm, show)
    source = behaviour_source(data, fmt, catalogue, lm.tokenizer, config.data.on_bad)
    return Model(config, fmt, lm, [], _tensor(np.zeros((0, 0))), catalogue, {}, trainer), source


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


def _command() -> str | None:
    """The command line, where `userip` is what runs."""
    program = Path(sys.argv[0])
    if program.name == "userip" or program.parts[-2:] == ("userip_fast", "__main__.py"):
        return shlex.join(["userip", *sys.argv[1:]])
    return None


def _tensor(x: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(x))


def _config(
    config: Config | Mapping[str, Any] | None,
    lm: str | FrozenLM | None,
    fields: Sequence[ProfileField] | None,
) -> Config:
    if config is None:
        config = Config()
    elif not isinstance(config, Config):
        config = Config.from_dict(config)
    if lm is not None:
        config = replace(config, lm=replace(config.lm, path=str(lm)))
    if fields is not None:
        config = replace(config, fields=tuple(fields))
    return config


@contextmanager
def open_run(out: str | os.PathLike[str] | None, writes: bool) -> Iterator[Run | None]:
    """The run folder, locked by the one process that writes it."""
    if out is None:
        yield None
        return
    root = Path(out)
    if root.exists() and not root.is_dir():
        raise ConfigError(f"out={str(root)!r} is a file; name a folder for the run")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"out={str(root)!r} cannot be made: {e}") from e
    if not os.access(root, os.W_OK):
        raise ConfigError(f"out={str(root)!r} cannot be written to")
    run = Run(root)
    if not writes:
        yield run
        return
    refusal = (
        f"out={str(root)!r}: another process is writing this run; wait for it to end, or name "
        "another folder"
    )
    with lock_file(root / "LOCK", 0.0, refusal):
        try:
            with storage_errors(root):
                for folder in (root, run.checkpoints, *run.checkpoints.glob("blocks/*")):
                    sweep_leftovers(folder)
            yield run
        finally:
            (root / "LOCK").unlink(missing_ok=True)


class _JsonLines:
    """metrics.jsonl: one record a line, flushed as it comes; begun anew by every run."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.file: TextIO | None = None

    def __enter__(self) -> _JsonLines:
        if self.path:
            with storage_errors(self.path):
                self.file = self.path.open("w", encoding="utf-8")
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        if self.file and self.path:
            with storage_errors(self.path):
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()

    def __exit__(self, kind: object, *_: object) -> None:
        if self.file and self.path:
            try:
                with storage_errors(self.path):
                    self.file.close()
            except StorageError:
                if kind is None:  # else the disk's failing has been told
                    raise

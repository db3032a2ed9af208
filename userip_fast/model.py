"""A fitted model: template, behaviour format, codebooks and the frozen LM they belong to.

On disk a model is a folder that is whole or absent:

    manifest.json           format, version, fingerprint, LM, behaviour format, SHA-256 of files
    config.json             everything that decided the result
    codebooks.safetensors   codewords [K_j, m_j D] of each field
    start.safetensors       shared start [S, D]
    head.safetensors        of an amortised E-step
    catalogue.parquet       training items with counts, to sample negatives from
    codes.json              code cards: words and typical items
    tokenizer/              of a model with an event table: the LM's, to do without the LM
    lm/                     the embedded LM, where that is the one
    events/                 the event table, which may grow and is not in the manifest

Nothing is unpickled on loading; checksums, shapes and the LM's fingerprint are verified.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from userip_fast._version import __version__
from userip_fast.bank import BankWriter, FeatureBank
from userip_fast.behaviour import BehaviourFormat, BehaviourSource
from userip_fast.behaviour_stream import StreamSource
from userip_fast.codebook import Codebook
from userip_fast.config import Config, LMConfig
from userip_fast.data import Catalogue, Interactions, InteractionStream
from userip_fast.em.amortised import Head
from userip_fast.em.cache import DiskCache
from userip_fast.em.checkpoints import load_codebooks
from userip_fast.em.counted import Counted
from userip_fast.em.lifts import PLAIN, Calibration, Usual
from userip_fast.em.matching import numbered_like
from userip_fast.em.steps import profiles_total
from userip_fast.em.table import EventTable, has_table
from userip_fast.em.trainer import Log, Trainer
from userip_fast.errors import (
    ConfigError,
    DataError,
    FormatError,
    MismatchError,
    UnsupportedError,
)
from userip_fast.files import (
    atomic_dir,
    read_json,
    read_tensors,
    sweep_leftovers,
    write_json,
    write_tensors,
)
from userip_fast.late import Late
from userip_fast.lm import FrozenLM, make_engine, open_lm, stored
from userip_fast.lm.engine import Engine, check_positions
from userip_fast.lm.trace import Workload
from userip_fast.packing import Int64
from userip_fast.profiles import SAMPLING_POWER, Profile, Ranking, lifts, likings, odds
from userip_fast.prompts import Layout, PromptTemplate
from userip_fast.reach import Reach
from userip_fast.segments import Part, Segments
from userip_fast.sums import MANIFEST, check_seal, check_sums, folder_sums, sealed

logger = logging.getLogger("userip_fast")

_FORMAT, _VERSION = "userip_fast.model", 1
_EVENTS, _LM, _TOKENIZER = "events", "lm", "tokenizer"  # sub-folders
_FILES = (
    "config.json",
    "codebooks.safetensors",
    "start.safetensors",
    "catalogue.parquet",
    "codes.json",
)
_USUAL = "reactions.parquet"
_COUNTED = "counted.parquet"
_TOLD_USERS = 1 << 12  # of a stream, those who are looked at before the rest is read
_LM_FILES = ("lm/config.json", "lm/model.safetensors")

Data = Interactions | InteractionStream
"""Histories in memory, or on disk where they do not fit."""


@dataclass
class Model:
    """See the module. `fit` makes one, `Model.load` reads one.

    Attributes:
        cards: Field -> code cards, as `CodeCard.to_dict` gives them.
    """

    config: Config
    format: BehaviourFormat
    lm: FrozenLM
    codebooks: list[Codebook]
    start: Tensor
    catalogue: Catalogue
    cards: dict[str, list[dict[str, Any]]]
    trainer: Trainer | None = None
    head: Head | None = None
    calibration: Calibration = PLAIN
    _table: EventTable | None = field(default=None, init=False, repr=False, compare=False)
    _home: Path | None = field(default=None, init=False, repr=False, compare=False)
    _ranking: tuple[EventTable, Ranking] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(self.config.fields)

    @property
    def layout(self) -> Layout:
        return self.template.layout(self.lm.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Digest of what decides a code id: LM, prompts, behaviour format, start and codebooks."""
        digest = hashlib.sha256(self.lm.fingerprint.encode())
        fields = [(f.name, f.prompt, f.num_virtual_tokens) for f in self.config.fields]
        digest.update(json.dumps([fields, self.format.to_dict()], sort_keys=True).encode())
        learned = [x for b in self.codebooks for x in (b.codewords, b.log_prior) if x is not None]
        learned += self.head.state().values() if self.head else ()
        if not self.calibration.plain:
            learned += self.calibration.state().values()
            for told in (self.calibration.usual, self.calibration.counted):
                digest.update(b"" if told is None else told.digest)
        for tensor in (self.start, *learned):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def infer(
        self,
        data: Data,
        out: str | Path | None = None,
        *,
        max_users: int | None = None,
        on_bad: str | None = None,
        update: bool = False,
        probabilities: bool = False,
        show: bool = True,
        log: Log = lambda record: None,
    ) -> FeatureBank | Int64:
        """Code ids of the users of `data`, with the model as it is.

        Args:
            data: Histories; only what is in them is used.
            out: Bank folder; an existing bank gets a new generation with exactly these users. None
                returns the ids instead of writing them. Finished blocks wait in `OUT.part`, where a
                run that goes on after an interrupt or a kill finds them. Items that a loaded model
                reads into its event table are kept in its folder, or in `OUT.events` where that is
                read-only.
            max_users: Only the first so many users in hash order.
            on_bad: "error" or "skip" for users whose history truncates to nothing; None takes the
                model's setting.
            update: Users of an existing bank who are not in `data` stay as they are.
            probabilities: Whether the bank keeps each code's probability given the behaviour.
            show: Whether to show progress.
            log: Called once the bank is written, with `users`, `nll_per_weight`,
                `forward_equivalents` per user, and what was `told` of them (see `Reach`).

        Returns:
            The bank; or, without `out`, [U, J] int64 in the order of `data.user_keys`.

        Raises:
            DataError: No user has behaviour, or the data lacks the ratings the model was fitted on.
            MismatchError: `update` and the bank is of another model, or the data tells items in
                another text than the model was fitted on.
            StorageError: The bank's disk is full or read-only; the bank stays what it was.
            ConfigError: Probabilities of an E-step that has none.
        """
        check_probabilities(self.config, probabilities)
        if max_users is not None:
            data = data.head_users(max_users)
        source = self.source(data, on_bad)
        trainer = self.ready_trainer(show)
        table = None
        if self.has_table:
            table = self.event_table(None if out is None else Path(f"{out}.events"))
            self._tell_changed(data)
        if out is None:
            found = trainer.infer(source, self.codebooks, self.start, table=table)
            return np.concatenate([_codes(p.code_ids) for p in found])
        # Beside the bank and on the same disk; found again by the next run, gone once it is done.
        cache = None
        if table is None or table.store is None:
            cache = DiskCache(Path(f"{out}.part"), self.block_key(trainer))
        with self.bank_writer(out, update) as writer:
            if cache is not None:
                sweep_leftovers(cache.folder / "profiles")  # under the bank's lock
            done, totals, told = 0, np.zeros(4), Reach()
            for profiles in trainer.infer(
                source, self.codebooks, self.start, cache=cache, table=table
            ):
                users = len(profiles.nll)
                keys, p = source.keys_of(done, done + users), None
                if probabilities and (sure := profiles.probabilities()) is not None:
                    p = sure.numpy()
                writer.append(keys, _codes(profiles.code_ids), p)
                told += source.reach(self.lm.tokenizer, done, done + users)
                done += users
                totals += profiles_total(profiles)
        if cache is not None:
            cache.clear()
        _, nll, weight, cost = totals.tolist()
        log(
            {
                "users": done,
                "nll_per_weight": nll / max(weight, 1e-12),
                "forward_equivalents": cost / max(done, 1),
                "told": asdict(told),
            }
        )
        return FeatureBank.open(out)

    def profile(
        self,
        items: Sequence[Any],
        reactions: Sequence[Any] | None = None,
        texts: Mapping[Any, str] | None = None,
    ) -> npt.NDArray[np.float32]:
        """p(codes | events) of a user, or of many, by the event table.

        The LM reads what it has not read of these items; else it is not asked.

        Args:
            items: Keys of the items of a user's events, maybe none; or a sequence of such sequences
                for many users.
            reactions: How each event went, in the shape of `items`: a feedback word, or a rating
                where the model was fitted on ratings. None where nothing is told of it.
            texts: Item text by key, of items that the training data lacks.

        Returns:
            [Z], or [U, Z] for many users, of all Z combinations of codes, the last field's running
            fastest. A user without events has the prior.

        Raises:
            ConfigError: The model has no event table (see `userip_fast.em.table.has_table`).
            DataError: An item has no known text, or reactions are not the model's.
        """
        many = len(items) > 0 and isinstance(items[0], list | tuple | np.ndarray)
        users = items if many else [items]
        if reactions is None:
            told: Sequence[Any] = [[None] * len(own) for own in users]
        else:
            told = reactions if many else [reactions]
        table = self.event_table()
        words = {r: self._word(r) for r in set(chain.from_iterable(told))}
        offsets = np.zeros(len(users) + 1, np.int64)
        kinds: list[tuple[str, str]] = []
        for u, (own, went) in enumerate(zip(users, told, strict=True)):
            if len(own) != len(went):
                raise DataError(f"user {u} has {len(own)} items and {len(went)} reactions")
            new = [(t, words[r]) for t, r in zip(self._texts_of(own, texts), went)]
            kinds += new if self.format.repeats else dict.fromkeys(new)
            offsets[u + 1] = len(kinds)
        log_resp, _ = table.posterior(table.rows(kinds), offsets)
        found = log_resp.exp().numpy()
        return found if many else found[0]

    def affinity(
        self,
        probabilities: npt.NDArray[np.floating[Any]],
        items: Sequence[Any],
        texts: Mapping[Any, str] | None = None,
    ) -> npt.NDArray[np.float32]:
        """p(the best reaction | item, a user's codes), averaged over the codes; of choices that are
        told by text alone, how many times likelier the user chooses the item than anybody.

        The best reaction is the highest rating's word, or "chosen"; the LM's probabilities of the
        words add up to one. Of choices, popularity times affinity ranks a catalogue.

        Args:
            probabilities: [Z] or [U, Z], as `profile` gives them.
            items, texts: As `profile`'s, for one list of n items.

        Returns:
            [n] or [U, n].

        Raises:
            ConfigError: The model has no event table, or tells no reactions.
            DataError: An item has no known text.
        """
        self._check_reactions("affinity")
        scores = self._scores(self._texts_of(items, texts))
        return np.asarray(np.asarray(probabilities, np.float32) @ scores.T, np.float32)

    def open_profile(
        self,
        items: Sequence[Any] = (),
        reactions: Sequence[Any] | None = None,
        texts: Mapping[Any, str] | None = None,
    ) -> Profile:
        """A user's profile that takes more events, each in time that only depends on the codes.

        Args:
            items, reactions: What it begins with, as in `profile`.
            texts: Of items that the training data lacks, now or later.

        Raises:
            ConfigError: The model has no event table.
            DataError: As in `profile`; of a later event when it is added.
        """
        table = self.event_table()

        def tell(item: Any, reaction: Any) -> tuple[int, npt.NDArray[np.float32]]:
            kind = self._texts_of([item], texts)[0], self._word(reaction)
            row = int(table.rows([kind])[0])
            return row, table.values[row].numpy()

        how = self.calibration.half_events, self.format.repeats
        profile = Profile(table.grid.log_prior.numpy(), table.grid.sizes, tell, *how)
        told = [None] * len(items) if reactions is None else reactions
        if len(items) != len(told):
            raise DataError(f"a user has {len(items)} items and {len(told)} reactions")
        for item, reaction in zip(items, told):
            profile.add(item, reaction)
        return profile

    def top_items(
        self, probabilities: npt.NDArray[np.floating[Any]], n: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """The best items of the catalogue for users, best first.

        Where the model was fitted on ratings, by `affinity`. On a log of choices by the probability
        that an item is the one of the catalogue that is chosen next: affinity times popularity. (A
        model that tells "chosen" does so as against items sampled by popularity: its odds are put
        back on how often an item is sampled.) The scores of all items are kept in memory, 4 Z bytes
        an item.

        Args:
            probabilities: [Z] or [U, Z], as `profile` gives them.
            n: How many, at most those of the catalogue.

        Returns:
            Keys [n] or [U, n], int64 or strings, and their scores, float32; ties in the catalogue's
            order.

        Raises:
            ConfigError: The model has no event table, or tells no reactions.
            DataError: Probabilities of another shape, or `n` below 1.
        """
        self._check_reactions("top_items")
        table = self.event_table()
        if self._ranking is None or self._ranking[0] is not table:
            texts = self.catalogue.item_text.to_pylist()
            table.rows([(text, table.words[0]) for text in texts])  # read together
            counts, chosen = self.catalogue.counts, self.format.negatives > 0
            power = SAMPLING_POWER if chosen else 1.0
            mass = None if self.format.scale is not None else counts.astype(np.float64) ** power

            def scores(a: int, b: int) -> npt.NDArray[np.float32]:
                return odds(self._scores(texts[a:b])) if chosen else self._scores(texts[a:b])

            keys = self.catalogue.item_keys.to_numpy(zero_copy_only=False)
            self._ranking = table, Ranking(keys, scores, len(table.grid.codes), mass)
        return self._ranking[1].top(probabilities, n)

    def _scores(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n, Z] p(the best reaction | item, codes), or lifts of choices."""
        table = self.event_table()
        rows = table.rows([(text, word) for text in texts for word in table.words])
        values = table.values[torch.from_numpy(rows)].numpy()
        values = values.reshape(len(texts), len(table.words), -1)
        if not self.format.words:
            return lifts(values, table.grid.log_prior.numpy())
        return likings(values, self.format.best_word, self.format.feedback_weight)

    def _check_reactions(self, what: str) -> None:
        if self.format.words and self.format.feedback_weight <= 0:
            raise ConfigError(
                f"{what}: the model puts no loss on reactions; fit with data.loss=feedback or all"
            )

    @property
    def has_table(self) -> bool:
        """Whether the model works from an event table; see `userip_fast.em.table.has_table`."""
        return has_table(self.config)

    def keep_table(self, table: EventTable | None) -> None:
        """Goes on with a table of the model's own codebooks and calibration."""
        self._table = table

    def event_table(self, beside: Path | None = None) -> EventTable:
        """What the LM says of events, as far as it was asked; it grows as more is asked.

        Args:
            beside: Where a loaded model keeps what it reads if its own folder cannot be written.

        Raises:
            ConfigError: The model has none.
        """
        if not self.has_table:
            raise ConfigError(
                "an event table needs em.estep=posterior, data.behaviour_context=independent and "
                "few combinations of codes; fit a model with these"
            )
        if self._table is None or self._table.codebooks is not self.codebooks:
            engine = (self.trainer or self.ready_trainer()).engine
            self._table = EventTable(
                engine, self.format, self.codebooks, self.config.em, self.calibration
            )
            self._table.store = self._segments(self._table, None)
        table = self._table
        if beside is not None and table.store is not None and table.store.writes is None:
            table.store = self._segments(table, beside)
        table.cache, table.show = None, False
        return table

    def _segments(self, table: EventTable, beside: Path | None) -> Segments | None:
        """Where a loaded model finds what was read, and keeps what it reads."""
        if self._home is None:
            return None
        own = self._home / _EVENTS
        writable = os.access(own if own.exists() else self._home, os.W_OK)
        return Segments(
            [own] if beside is None else [own, beside],
            self.fingerprint,
            len(table.words),
            len(table.grid.codes),
            writes=own if writable else beside,
        )

    def _tell_changed(self, data: Data) -> None:
        """Says in the log which items are told in another text than at fit: they are new ones."""
        known = self.catalogue.text_of
        told = zip(data.item_keys.to_pylist(), data.item_text.to_pylist())
        changed = [key for key, text in told if known.get(key, text) != text]
        if changed:
            logger.warning(
                "told in another text than when the model was fitted, and so new to it: %d of the "
                "items, the first being %s",
                len(changed),
                ", ".join(map(repr, changed[:10])),
            )

    def _texts_of(self, items: Sequence[Any], texts: Mapping[Any, str] | None) -> list[str]:
        known = self.catalogue.text_of
        try:
            return [known[i] if i in known else (texts or {})[i] for i in items]
        except KeyError as e:
            raise DataError(
                f"item {e} is not in the training data; give its text as texts={{key: text}}"
            ) from e

    def _word(self, reaction: Any) -> str:
        words, scale = self.format.words, self.format.scale
        rates = scale is not None and isinstance(reaction, int | float | np.number)
        if scale is not None and rates and np.isfinite(reaction):
            return scale.words[int(scale.level(np.asarray([reaction]))[0])]
        if (reaction is None and not words) or reaction in words:
            return reaction or ""
        raise DataError(
            f"reaction {reaction!r} is not one of the model's: {list(words) or None}"
            + ("" if scale is None else " or a rating")
        )

    def source(self, data: Data, on_bad: str | None = None) -> BehaviourSource | StreamSource:
        """Behaviour of the users of `data` as this model reads it; see `behaviour_source`.

        Raises:
            MismatchError: `data` tells items in another text than the model was fitted on.
        """
        self.format.check_text(data)
        rule = on_bad or self.config.data.on_bad
        return behaviour_source(data, self.format, self.catalogue, self.lm.tokenizer, rule)

    def block_key(self, trainer: Trainer) -> bytes:
        """What the profiles of a block depend on beside its users."""
        return trainer.settings_key(self.start) + self.fingerprint.encode()

    def ready_trainer(self, show: bool = False) -> Trainer:
        """The trainer that `fit` left, or one for inferring."""
        trainer = self.trainer or make_trainer(self.config, self.lm, show)
        trainer.show, trainer.head, trainer.calibration = show, self.head, self.calibration
        return trainer

    def bank_writer(self, out: str | Path, update: bool = False) -> BankWriter:
        """A writer of this model's codes into the bank at `out`; see `infer`."""
        return BankWriter(
            out,
            keep_others=update,
            fields=self.bank_fields(),
            model_fingerprint=self.fingerprint,
            metadata={
                "userip_fast": __version__,
                "lm": self.lm.source,
                "config": self.config.to_dict(),
            },
        )

    def bank_fields(self) -> list[dict[str, Any]]:
        """The fields as a bank describes them, codes named by their words."""
        return [
            {
                "name": f.name,
                "codebook_size": f.codebook_size,
                "code_names": [", ".join(card["words"]) for card in self.cards[f.name]]
                if f.name in self.cards
                else None,
            }
            for f in self.config.fields
        ]

    def save(self, path: str | Path) -> None:
        """Writes the model folder; an old one is replaced only by a whole new one.

        Raises:
            FormatError: The embedded LM is no longer what was loaded.
            StorageError: The disk is full or read-only.
        """
        with atomic_dir(path) as tmp:
            write_json(tmp / "config.json", self.config.to_dict())
            write_tensors(
                tmp / "codebooks.safetensors",
                {f"{j}.{k}": v for j, b in enumerate(self.codebooks) for k, v in b.state().items()},
            )
            start = {"start": self.start, **self.calibration.state()}
            write_tensors(tmp / "start.safetensors", start)
            if self.calibration.usual is not None:
                pq.write_table(self.calibration.usual.to_arrow(), tmp / _USUAL)
            if self.calibration.counted is not None:
                pq.write_table(self.calibration.counted.to_arrow(), tmp / _COUNTED)
            if self.head is not None:
                write_tensors(tmp / "head.safetensors", self.head.state())
            pq.write_table(self.catalogue.to_table(), tmp / "catalogue.parquet")
            write_json(tmp / "codes.json", self.cards)
            if self.has_table:
                table = self.event_table()
                table.find()
                if table.parts:
                    words, codes = len(table.words), len(table.grid.codes)
                    into = tmp / _EVENTS
                    kept = Segments([into], self.fingerprint, words, codes, writes=into)
                    kept.add(Part.concat(table.parts))
                if self.config.em.estep == "posterior":  # which alone does without the LM
                    stored.keep_tokenizer(self.lm.tokenizer, tmp / _TOKENIZER)
            if self.lm.embedded:
                self._copy_lm(tmp / _LM)
            about = {
                "format": _FORMAT,
                "version": _VERSION,
                "userip_fast": __version__,
                "fingerprint": self.fingerprint,
                "lm": {
                    "source": "lm" if self.lm.embedded else self.lm.source,
                    "embedded": self.lm.embedded,
                    "fingerprint": self.lm.fingerprint,
                    "quantization": self.lm.quantization,
                    "hidden_size": self.lm.hidden_size,
                },
                "behaviour": self.format.to_dict(),
                "half_events": self.calibration.finite_half,
                "files": folder_sums(tmp, but=[_EVENTS]),
            }
            write_json(tmp / MANIFEST, sealed(about))

    def _copy_lm(self, to: Path) -> None:
        """The files of the embedded LM, if they are still what was loaded from them."""
        try:
            shutil.copytree(self.lm.source, to)
            if not stored.is_of(to, self.lm.tokenizer, self.lm.fingerprint):
                raise FormatError("its files were altered")
        except (FileNotFoundError, FormatError, UnsupportedError) as e:
            raise FormatError(
                f"the embedded LM in {self.lm.source} is not what was loaded from there ({e}); run "
                "the same command with --resume: the LM is made again, what was learned is kept"
            ) from e

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        metrics: Mapping[str, Any] | None = None,
        licence: str | None = None,
    ) -> None:
        """Writes a repository for the Hugging Face hub: the model, and a card that tells of it.

        Args:
            folder: Gets `README.md`, `config.json`, `metrics.json` and `model/`.
            metrics: For the card; None takes those of the run the model was loaded from.
            licence: As the hub names licences.
        """
        from userip_fast.hub import OnHub

        OnHub(self, metrics, licence).save_pretrained(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        licence: str | None = None,
        **options: Any,
    ) -> str:
        """The same into a repository of the hub, as one commit; returns its address.

        Args:
            repo_id: OWNER/NAME.
            metrics, licence: As for `save_pretrained`.
            options: Of `huggingface_hub.ModelHubMixin.push_to_hub`: private, token, branch,
                create_pr, commit_message.
        """
        from userip_fast.hub import OnHub

        return str(OnHub(self, metrics, licence).push_to_hub(repo_id, **options))

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | Path,
        *,
        lm: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> Model:
        """Reads a model from the hub, or from a folder that `save_pretrained` or `save` wrote.

        Args:
            repo_id: OWNER/NAME, or a folder.
            lm, device: As for `load`.
            options: Of `huggingface_hub.ModelHubMixin.from_pretrained`: revision, token, cache_dir,
                local_files_only, force_download.

        Raises:
            FormatError: It holds no model, or a damaged one.
            UnsupportedError: The hub does not give it; the text says why.
            MismatchError: The LM is not the one the codebooks were learned with.
        """
        from userip_fast.hub import OnHub

        with stored.told(f"model {str(repo_id)!r} cannot be fetched"):
            return OnHub.from_pretrained(repo_id, lm=lm, device=device, **options).model

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        lm: str | None = None,
        device: str | None = None,
        verify: bool = False,
    ) -> Model:
        """Reads a model folder.

        The LM of a model with an event table is opened, and checked, when something is asked that
        the table does not know; it need not be there until then.

        Args:
            lm: Where an external LM lies now, if not where it was at fit.
            device: Overrides the device of the config.
            verify: Whether to open the LM at once and read every byte of an external one again,
                instead of trusting sums that are kept by file identity, size and times. The model
                folder is read in any case.

        Raises:
            FormatError: A file is missing, torn or altered, not in the manifest, or of another
                version.
            MismatchError: The LM is not the one the codebooks were learned with.
        """
        root = Path(path)
        manifest = read_json(root / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise FormatError(f"{root}: not a userip_fast model")
        if manifest.get("version") != _VERSION:
            raise FormatError(
                f"{root}: model version {manifest.get('version')!r}, this program reads {_VERSION}"
            )
        check_seal(root / MANIFEST, manifest)
        try:
            about = manifest["lm"]
            files = manifest["files"]
            needed = [*_FILES, *_LM_FILES * bool(about["embedded"])]
            # A model with a table may never need its LM, which is then checked when it is opened.
            late = f"{_TOKENIZER}/tokenizer_config.json" in files and not verify
            check_sums(root, files, needed, but=[_EVENTS, *[_LM] * late])
            with _of_file(root / "config.json"):
                config = Config.from_dict(read_json(root / "config.json"))
            if config.em.engine == "graph":  # was asked for where it was fitted
                config = config.override({"em.engine": "auto"})
            codebooks = load_codebooks(root / "codebooks.safetensors", len(config.fields))
            started = read_tensors(root / "start.safetensors")
            start = started["start"]
            if start.dtype != torch.float32 or not start.isfinite().all():
                raise FormatError(f"{root / 'start.safetensors'}: must be fp32 and finite")
            with _of_file(root / "start.safetensors"):
                combinations = math.prod(f.codebook_size for f in config.fields)
                calibration = Calibration.from_state(started, start, combinations)
            if _USUAL in manifest["files"]:
                with _of_file(root / _USUAL):
                    usual = Usual.from_arrow(_read_table(root / _USUAL))
                calibration = replace(calibration, usual=usual, neutral=start)
            if _COUNTED in manifest["files"]:
                with _of_file(root / _COUNTED):
                    told = _read_table(root / _COUNTED)
                    words = len(calibration.usual.counts[0]) if calibration.usual else 1
                    counted = Counted.from_arrow(told, words, combinations)
                calibration = replace(calibration, counted=counted)
            head = None
            if config.em.estep == "amortised" and config.em.recipe != "paper":
                head = Head.from_state(read_tensors(root / "head.safetensors"))
            with _of_file(root / "catalogue.parquet"):
                catalogue = Catalogue.from_table(_read_table(root / "catalogue.parquet"))
            with _of_file(root / MANIFEST):
                fmt = BehaviourFormat.from_dict(manifest["behaviour"])
            for f, book in zip(config.fields, codebooks):
                want = (f.codebook_size, f.num_virtual_tokens * int(about["hidden_size"]))
                if tuple(book.codewords.shape) != want:
                    raise MismatchError(
                        f"{root}: codebook of field {f.name!r} is {tuple(book.codewords.shape)}, "
                        f"its template says {want}"
                    )
            source = root / _LM if about["embedded"] else Path(lm or about["source"])
            lm_config = replace(
                config.lm,
                quantization=about["quantization"]
                if about["quantization"] in ("none", "nf4", "nf4-double")
                else config.lm.quantization,
                device=device or config.lm.device,
                verify=verify or config.lm.verify,
            )

            def opened() -> FrozenLM:
                if late:
                    check_sums(root, files, needed, but=[_EVENTS])
                return _open_lm(root, about, source, lm_config, Workload.of(config))

            model_lm: Any
            if late:
                model_lm = Late(
                    opened,
                    tokenizer=stored.kept_tokenizer(root / _TOKENIZER),
                    fingerprint=str(about["fingerprint"]),
                    embedded=bool(about["embedded"]),
                    source=str(source),
                    quantization=str(about["quantization"]),
                    hidden_size=int(about["hidden_size"]),
                )
            else:
                model_lm = opened()
        except (KeyError, TypeError) as e:
            raise FormatError(f"{root}: the manifest lacks or garbles {e}") from e
        model = cls(
            config,
            fmt,
            model_lm,
            codebooks,
            start,
            catalogue,
            _cards(read_json(root / "codes.json"), root / "codes.json"),
            head=head,
            calibration=calibration,
        )
        model._home = root
        return model


def _open_lm(
    root: Path, about: Mapping[str, Any], source: Path, config: LMConfig, work: Workload
) -> FrozenLM:
    """The LM at `source`, if it is the one that the manifest of the model in `root` is `about`."""
    lm = open_lm(str(source), config, work)
    lm.embedded = bool(about["embedded"])
    expected = str(about["fingerprint"])
    if not lm.is_known_as(expected):
        raise MismatchError(
            f"{root}: the LM at {source} is not the one the codebooks were learned with "
            f"(fingerprint {lm.fingerprint[:12]}, expected {expected[:12]})"
        )
    if not expected.startswith(stored.FULL):
        logger.warning(
            "%s: saved when one row of each tensor was all that the LM was known by; that "
            "much of it is the same. A new fit has it known by every byte",
            root,
        )
        # The model's own fingerprint follows from it, and banks and checkpoints from that.
        lm.fingerprint = expected
    if lm.hidden_size != about["hidden_size"]:
        raise MismatchError(
            f"{root}: the LM has hidden size {lm.hidden_size}, the codebooks {about['hidden_size']}"
        )
    return lm


@contextmanager
def _of_file(path: Path) -> Iterator[None]:
    """What is wrong with the content of a file is a FormatError that names it."""
    try:
        yield
    except (ConfigError, DataError, FormatError) as e:
        raise FormatError(str(e) if str(path) in str(e) else f"{path}: {e}") from e


def _read_table(path: Path) -> pa.Table:
    """A table of a model folder; FormatError where it cannot be read or names a column twice."""
    try:
        with pq.ParquetFile(path) as file:  # a path alone could be a folder, or be given columns
            table = file.read()
    except (OSError, ValueError, pa.ArrowException) as e:
        raise FormatError(f"{path}: cannot be read as Parquet ({e})") from e
    if len(set(table.column_names)) < table.num_columns:
        raise FormatError(f"{path}: names a column twice, {table.column_names}")
    return table


def _cards(cards: Any, path: Path) -> dict[str, list[dict[str, Any]]]:
    """Code cards as they were written; FormatError where they are something else."""
    kinds = {"code": int, "users": int}
    lists = {"words": str, "items": str, "lift": float}
    traits = {"what": str, "ratio": float, "low": float, "high": float}

    def sound(card: Any) -> bool:
        return (
            isinstance(card, dict)
            and all(isinstance(card.get(n), kind) for n, kind in kinds.items())
            and all(
                isinstance(card.get(n), list) and all(isinstance(x, kind) for x in card[n])
                for n, kind in lists.items()
            )
            and isinstance(told := card.get("told", []), list)
            and all(
                isinstance(t, dict) and all(isinstance(t.get(n), k) for n, k in traits.items())
                for t in told
            )
            and isinstance(went := card.get("reactions", {}), dict)
            and all(isinstance(x, float) for x in went.values())
        )

    if not isinstance(cards, dict) or not all(
        isinstance(own, list) and all(map(sound, own)) for own in cards.values()
    ):
        raise FormatError(f"{path}: does not hold the code cards that were written")
    return cards


def behaviour_source(
    data: Data, fmt: BehaviourFormat, catalogue: Catalogue, tokenizer: Any, on_bad: str
) -> BehaviourSource | StreamSource:
    """Behaviour of the users of `data`, those whose history truncates to nothing refused or
    dropped. What of the others does not reach the LM is told in the log.

    Raises:
        DataError: Such users exist and `on_bad` is "error", or nobody is left.
    """
    if isinstance(data, InteractionStream):
        stream = StreamSource(data, fmt, catalogue, tokenizer)
        names = [data.users(u, u + 1).user_keys[0].as_py() for u in stream.empty[:10].tolist()]
        _check_truncated(len(stream.empty), names, data.num_users, fmt, on_bad)
        some = min(_TOLD_USERS, stream.num_users)
        who = "users" if some == stream.num_users else f"of the first {some:,} users"
        stream.reach(tokenizer, 0, some).warn(*fmt.limits[:2], who)
        return stream
    source = BehaviourSource(fmt.events(data, catalogue), fmt)
    empty = truncated_users(source, tokenizer, on_bad)
    if len(empty):
        keep = np.setdiff1d(np.arange(data.num_users), empty)
        source = BehaviourSource(fmt.events(data.select_users(keep), catalogue), fmt)
    source.reach(tokenizer, 0, source.num_users).warn(*fmt.limits[:2])
    return source


def truncated_users(source: BehaviourSource, tokenizer: Any, on_bad: str) -> Int64:
    """Users whose history truncates to nothing; DataError as `behaviour_source` says."""
    empty = source.empty_users(tokenizer)
    names = [source.events.user_keys[int(u)].as_py() for u in empty[:10]]
    _check_truncated(len(empty), names, source.num_users, source.format, on_bad)
    return empty


def _check_truncated(
    count: int, names: list[Any], users: int, fmt: BehaviourFormat, on_bad: str
) -> None:
    if count:
        name = "chunk_tokens" if fmt.chunk_tokens < fmt.max_tokens else "max_tokens"
        limit = f"data.{name}={fmt.chunk_tokens}"
        why = (
            f"{count} users have a history that truncates to nothing: their latest event "
            f"alone has more than {limit} tokens; first users: {names}"
        )
        if on_bad == "error":
            raise DataError(
                f"{why}; raise data.{name}, shorten the text, or skip them (on_bad=skip)"
            )
        if count == users:
            raise DataError(f"{why}; nobody is left")
        logger.warning("%s; skipped", why)


def make_trainer(config: Config, lm: FrozenLM, show: bool) -> Trainer:
    """The EM loop for a loaded LM: prompts checked against its context, packs cut to its memory.
    For one that is opened later, all of that is done then."""
    layout = PromptTemplate(config.fields).layout(lm.tokenizer)
    if isinstance(lm, Late) and not lm.is_made:

        def engine() -> Engine:
            lm.made()
            return make_trainer(config, lm, show).engine

        later: Any = Late(engine, lm=lm, layout=layout)
        return Trainer(later, config, show)
    check_positions(lm, layout, config.told.token_limits[1])
    if lm.plan is not None:
        tokens = min(config.em.pack_tokens, lm.plan.pack_tokens)
        config = replace(config, em=replace(config.em, pack_tokens=tokens))
    made = make_engine(config.em.engine, lm, layout, config.em.pack_tokens)
    return Trainer(made, config, show)


def check_probabilities(config: Config, wanted: bool) -> None:
    """Raises ConfigError when codes have no probabilities to keep."""
    if wanted and (config.em.estep == "gradient" or config.em.recipe == "paper"):
        raise ConfigError("probabilities: a nearest codeword has none; choose em.estep=posterior")


@dataclass(frozen=True)
class OldCodebooks:
    """What `orders_like` compares with: of the model in folder `root`."""

    root: Path
    codebooks: list[Codebook]
    lm: str


def read_codebooks(path: str | Path) -> OldCodebooks:
    """Codebooks of the model folder at `path`, and the fingerprint of its LM.

    Raises:
        FormatError: There is no model.
    """
    root = Path(path)
    manifest = read_json(root / MANIFEST)
    try:
        fields = len(read_json(root / "config.json")["fields"])
        books = load_codebooks(root / "codebooks.safetensors", fields)
        return OldCodebooks(root, books, str(manifest["lm"]["fingerprint"]))
    except (KeyError, TypeError) as e:
        raise FormatError(f"{root}: the manifest lacks or garbles {e}") from e


def orders_like(old: OldCodebooks, model: Model) -> list[Tensor]:
    """Per field the order of the codes of `model` that matches those of an earlier model.

    Raises:
        MismatchError: It has another LM or other codebooks, so that codewords do not compare.
    """
    shapes = [
        [book.codewords.shape for book in books] for books in (old.codebooks, model.codebooks)
    ]
    if not model.lm.is_known_as(old.lm) or shapes[0] != shapes[1]:
        raise MismatchError(
            f"like: {old.root} has another LM or other fields; codes do not compare"
        )
    return numbered_like(model.codebooks, old.codebooks)


def _codes(code_ids: Tensor | None) -> Int64:
    assert code_ids is not None
    return code_ids.numpy()

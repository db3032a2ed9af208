"""A fitted model: template, behaviour format, codebooks and the frozen LM they belong to.

`learned.py` says what it holds, `table.py` what its event table answers, and `files.py` how it lies
on disk. Nothing is unpickled on loading; checksums, shapes and the LM's fingerprint are verified.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from userip_fast._version import __version__
from userip_fast.bank import BankWriter, FeatureBank
from userip_fast.core.errors import ConfigError
from userip_fast.core.files import sweep_leftovers
from userip_fast.data import Data
from userip_fast.em.cache import DiskCache
from userip_fast.em.checkpoints import Log
from userip_fast.em.steps import Profiles
from userip_fast.lm import stored
from userip_fast.model.files import load_model, save_model
from userip_fast.model.learned import check_probabilities
from userip_fast.model.table import ByTable
from userip_fast.model.tally import Tally
from userip_fast.prompts.behaviour import Source
from userip_fast.prompts.packing import Int64
from userip_fast.prompts.stream import behaviour_source

logger = logging.getLogger("userip_fast")


@dataclass
class Model(ByTable):
    """See the module. `fit` makes one, `Model.load` reads one; the attributes are `Learned`'s."""

    def infer(
        self,
        data: Data,
        out: str | Path | None = None,
        *,
        max_users: int | None = None,
        on_bad: str | None = None,
        update: bool = False,
        probabilities: bool = False,
        profiles: bool = False,
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
            profiles: Whether it keeps the probabilities of all codes, from which exports and
                `userip_fast.serve` make affinities: 2 bytes a code of each user.
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
        check_probabilities(self.config, probabilities or profiles)
        if max_users is not None:
            data = data.head_users(max_users)
        source = self.source(data, on_bad)
        if self.has_table:
            self.event_table(None if out is None else Path(f"{out}.events"))
            self._tell_changed(data)
        if out is None:
            return np.concatenate([_codes(p) for p in self.infer_blocks(source, show=show)])
        # Beside the bank and on the same disk; found again by the next run, gone once it is done.
        cache, tally = self.block_cache(Path(f"{out}.part")), Tally()
        with self.bank_writer(out, update) as writer:
            if cache is not None:
                sweep_leftovers(cache.folder / "profiles")  # under the bank's lock
            for found in self.infer_blocks(source, cache=cache, show=show):
                users = tally.add(found, source, self.lm.tokenizer)
                sure = found.probabilities() if probabilities else None
                p = None if sure is None else sure.numpy()
                every = all_probabilities(found) if profiles else None
                writer.append(source.keys_of(*users), _codes(found), p, every)
        if cache is not None:
            cache.clear()
        log(
            {
                "users": tally.users,
                "nll_per_weight": tally.nll_per_weight,
                "forward_equivalents": tally.forward_equivalents,
                "told": asdict(tally.told),
            }
        )
        return FeatureBank.open(out)

    def infer_blocks(
        self,
        source: Source,
        *,
        users: tuple[int, int] | None = None,
        cache: DiskCache | None = None,
        show: bool = False,
    ) -> Iterator[Profiles]:
        """Profiles of the users of a source, block by block; see `Trainer.infer`."""
        table = self.event_table() if self.has_table else None
        trainer = self.ready_trainer(show)
        return trainer.infer(
            source, self.codebooks, self.start, users=users, cache=cache, table=table
        )

    def block_cache(self, folder: Path) -> DiskCache | None:
        """Where finished blocks wait for a run that goes on; None where the table is kept, which
        knows what the LM was asked."""
        if self.has_table and self.event_table().store is not None:
            return None
        return DiskCache(folder, self.block_key(self.ready_trainer()))

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

    def source(self, data: Data, on_bad: str | None = None) -> Source:
        """Behaviour of the users of `data` as this model reads it.

        Raises:
            DataError: See `Source.without_untold`.
            MismatchError: `data` tells items in another text than the model was fitted on.
        """
        self.format.check_text(data)
        source = behaviour_source(data, self.format, self.catalogue)
        return source.without_untold(self.lm.tokenizer, on_bad or self.config.data.on_bad)

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
        save_model(self, path)

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
        from userip_fast.model.hub import OnHub

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
        from userip_fast.model.hub import OnHub

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
        from userip_fast.model.hub import OnHub

        with stored.told(f"model {str(repo_id)!r} cannot be fetched"):
            found = OnHub.from_pretrained(repo_id, load=cls.load, lm=lm, device=device, **options)
        return found.model

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
        return load_model(cls, path, lm=lm, device=device, verify=verify)


def all_probabilities(found: Profiles) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[U, sum of K_j] p(code | behaviour), field after field, as a bank keeps profiles.

    Raises:
        ConfigError: The E-step tells none.
    """
    if found.log_resp is None:
        raise ConfigError(
            "profiles: this E-step tells no probabilities of all codes; fit with em.estep=posterior"
        )
    p = torch.cat(found.log_resp, dim=1).exp().clamp(max=1.0)
    return np.asarray(p.float().numpy())


def _codes(profiles: Profiles) -> Int64:
    assert profiles.code_ids is not None
    return profiles.code_ids.numpy()

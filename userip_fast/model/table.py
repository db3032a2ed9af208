"""What a model says of users and items by its event table: profiles, affinities, best items.

The table lies in the model's folder, grows there as more is asked, and spares the LM what it has
read before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from userip_fast.core.errors import ConfigError, DataError
from userip_fast.core.profiles import SAMPLING_POWER, Profile, Ranking, lifts, likings, odds
from userip_fast.core.segments import Segments
from userip_fast.em.table import EventTable, answers
from userip_fast.em.trainer import FitResult
from userip_fast.model.learned import Learned

EVENTS = "events"
"""The table's folder in that of the model."""


@dataclass
class ByTable(Learned):
    """See the module; `userip_fast.em.table.answers` says which models have one."""

    _table: EventTable | None = field(default=None, init=False, repr=False, compare=False)
    _home: Path | None = field(default=None, init=False, repr=False, compare=False)
    _ranking: tuple[EventTable, Ranking] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @property
    def has_table(self) -> bool:
        """Whether the model works from an event table; see `userip_fast.em.table.answers`."""
        return answers(self.config, self.calibration)

    def take(self, found: FitResult) -> None:
        """See `Learned.take`; with the table that the fit read, too."""
        super().take(found)
        self.keep_table(found.table)

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
                "few codes; fit a model with these"
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
            [Z], or [U, Z] for many users, of the Z combinations of codes in
            `event_table().grid.codes` [Z, J]: all, the last field's running fastest, or of many
            those that carry weight. A user without events has the prior.

        Raises:
            ConfigError: The model has no event table (see `userip_fast.em.table.answers`).
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
        grid = table.grid
        share = self.calibration.code_prior
        profile = Profile(
            grid.prior.numpy(), grid.sizes, tell, *how, grid.codes.numpy(), code_prior=share
        )
        return profile.extend(items, reactions)

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
            return lifts(values, table.grid.prior.numpy())
        return likings(values, self.format.best_word, self.format.feedback_weight)

    def _check_reactions(self, what: str) -> None:
        if self.format.words and self.format.feedback_weight <= 0:
            raise ConfigError(
                f"{what}: the model puts no loss on reactions; fit with data.loss=feedback or all"
            )

    def _segments(self, table: EventTable, beside: Path | None) -> Segments | None:
        """Where a loaded model finds what was read, and keeps what it reads."""
        if self._home is None:
            return None
        own = self._home / EVENTS
        writable = os.access(own if own.exists() else self._home, os.W_OK)
        return Segments(
            [own] if beside is None else [own, beside],
            self.fingerprint,
            len(table.words),
            len(table.grid.codes),
            writes=own if writable else beside,
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

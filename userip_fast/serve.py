"""Online serving, without torch and without an LM: a bank and an event table, mapped.

    from userip_fast.serve import Server

    server = Server.open("RUN/model", bank="RUN/bank")
    codes = server.lookup(user_ids, on_unknown="code")      # [n, J] of users that are in the bank
    p = server.lookup_profiles(user_ids)                    # [n, Z], of a bank that keeps profiles
    p = server.profile([3, 17], ["liked", "disliked"])      # p(codes | events) of anybody else
    items, scores = server.top_items(p, 20)

    profile = server.open_profile()                         # one that grows as events come in
    profile.add(3, "liked")
    profile.codes, profile.probabilities

Needs numpy and pyarrow, and the compiled extension where it is there. Answers are those of
`userip_fast.Model` with the same table. Items that the table lacks are skipped and counted: only a
model with its LM can read them (`Model.profile`, `Model.infer`), and a server opened afterwards
knows them.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from userip_fast.bank import FeatureBank
from userip_fast.bank.parquet import Best
from userip_fast.core.errors import ConfigError, DataError, FormatError, MismatchError
from userip_fast.core.files import open_regular, read_json, sha256_file
from userip_fast.core.profiles import (
    NEGATIVE_WORDS,
    SAMPLING_POWER,
    Profile,
    Ranking,
    all_codes,
    codes_of,
    counting,
    joint,
    lifts,
    likings,
    odds,
    softmax,
)
from userip_fast.core.segments import Part, Segments
from userip_fast.core.sums import MANIFEST, MODEL_FORMATS, check_seal

_NUMBERS = (int, float, np.number)  # made once: a union would be made for each event
_FILES = "config.json", "codebooks.safetensors", "catalogue.parquet"


class Server:
    """See the module; open it with `open`.

    Attributes:
        bank: The bank, or None.
        fingerprint: The model's.
        fields: Per field `{"name", "codebook_size"}`.
        columns: [Z, J] codes: all combinations, the last field's running fastest, or of many those
            that carry weight.
        words: [W] for how an event went; ("",) where none is told.
        log_prior: [Z] fp64, of the columns.
        skipped: Events of unknown items so far.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        fields: Sequence[tuple[str, int]],
        columns: NDArray[np.int64],
        log_prior: NDArray[np.float64],
        table: Part,
        catalogue: pa.Table,
        bank: FeatureBank | None,
        texts: Mapping[Any, str] | None,
    ) -> None:
        behaviour = about["behaviour"]
        self.bank, self.fingerprint = bank, str(about["fingerprint"])
        self.fields = [{"name": name, "codebook_size": size} for name, size in fields]
        self.columns, self.log_prior, self.skipped = columns, log_prior, 0
        self._sizes = tuple(size for _, size in fields)
        scale = behaviour["scale"] or {}
        self._thresholds = [float(x) for x in scale.get("thresholds", ())]
        self.words = words_of(behaviour)
        self._word: dict[Any, int] = {word: i for i, word in enumerate(self.words)}
        if self.words == ("",):
            self._word[None] = 0
        self._best = 0 if behaviour["negatives"] else len(self.words) - 1
        self._weight = float(behaviour["feedback_weight"])
        self._chosen = bool(behaviour["negatives"])
        self._half = float(about.get("half_events") or np.inf)
        self._code_prior = float(about.get("code_prior", 1.0))
        self._repeats = bool(behaviour.get("repeats", True))
        texts_there = table.texts.to_pylist()
        row = {texts_there[i]: i for i in reversed(range(len(texts_there)))}  # the first counts
        told = zip(catalogue["item"].to_pylist(), catalogue["text"].to_pylist())
        self._row = {key: row[text] for key, text in told if text in row}
        self._row |= {key: row[text] for key, text in (texts or {}).items() if text in row}
        self._counts = dict(zip(catalogue["item"].to_pylist(), catalogue["count"].to_pylist()))
        # A row of each pair of a text and a word: one gather for a user.
        self._table = table
        self._offset = table.offset.reshape(-1, len(log_prior))
        self._step, self._mean = table.step.ravel(), table.mean.ravel()

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        bank: str | os.PathLike[str] | None = None,
        *,
        events: Sequence[str | os.PathLike[str]] = (),
        texts: Mapping[Any, str] | None = None,
    ) -> Server:
        """Maps a model's event table, and a bank.

        Args:
            model: Model folder that `fit` or `Model.save` wrote; its `lm` is not looked at.
            bank: Bank of the same model.
            events: Further tables, such as the `BANK.events` of a model that is read-only.
            texts: Text by key of items that the training data lacks, or whose text has changed.

        Raises:
            FormatError: A file is missing, torn or altered, or there is no table; a damaged segment
                of one is passed over with a warning.
            MismatchError: The bank is of another model.
        """
        root = Path(model)
        about = read_json(root / MANIFEST)
        if not isinstance(about, dict) or about.get("format") not in MODEL_FORMATS:
            raise FormatError(f"{root}: not a userip_fast model")
        check_seal(root / MANIFEST, about)
        try:
            for name in _FILES:
                if sha256_file(root / name) != about["files"][name]:
                    raise FormatError(f"{root / name}: altered since it was saved")
            config = read_json(root / "config.json")
            fields = [(str(f["name"]), int(f["codebook_size"])) for f in config["fields"]]
            sizes, columns = [size for _, size in fields], None
            if (name := "columns.parquet") in about["files"]:
                columns = _read_columns(root / name, about["files"][name], sizes)
            prior = _log_prior(root / "codebooks.safetensors", sizes, columns)
            if (joint := about.get("log_prior")) is not None:
                if len(joint) != len(prior):
                    raise FormatError(f"{root / MANIFEST}: log_prior must be of {len(prior)} codes")
                prior = np.asarray(joint, np.float64)
            if columns is None:
                columns = all_codes(sizes)
            words = words_of(about["behaviour"])
            folders = [root / "events", *events]
            parts = list(Segments(folders, about["fingerprint"], len(words), len(prior)).new())
            if not sum(map(len, parts)):
                raise FormatError(
                    f"{root}: has no event table; fit with em.estep=posterior and "
                    "data.behaviour_context=independent, or name its folder as events=[...]"
                )
            opened = None if bank is None else FeatureBank.open(bank)
            if opened is not None and opened.model_fingerprint != about["fingerprint"]:
                raise MismatchError(
                    f"bank={str(bank)!r}: is of model {opened.model_fingerprint[:12]}, the table "
                    f"of {about['fingerprint'][:12]}"
                )
            catalogue = _read_catalogue(root / "catalogue.parquet")
            part = Part.concat(parts)
            return cls(about, fields, columns, prior, part, catalogue, opened, texts)
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as e:
            if isinstance(e, FormatError | MismatchError):
                raise
            raise FormatError(f"{root}: not a model that can be served ({e!r})") from e

    def lookup(self, user_ids: Any, on_unknown: str = "error") -> NDArray[np.int64]:
        """See `FeatureBank.lookup`.

        Raises:
            ConfigError: The server was opened without a bank.
        """
        if self.bank is None:
            raise ConfigError("lookup: the server was opened without a bank; open it with bank=")
        return self.bank.lookup(user_ids, on_unknown)

    def lookup_profiles(self, user_ids: Any, on_unknown: str = "error") -> NDArray[np.float32]:
        """p(codes | behaviour) of users who are in a bank with profiles, as `profile` gives it of
        events, for `affinity` and `top_items`.

        Args:
            user_ids, on_unknown: As for `lookup`; "code" gives a user who is not there the prior.

        Returns:
            [n, Z] float32. Of several fields the product of each one's probabilities.

        Raises:
            ConfigError: The server was opened without a bank, or the bank holds no profiles.
            DataError, KeyTypeError, FormatError: As for `lookup`.
        """
        if self.bank is None:
            raise ConfigError("lookup: the server was opened without a bank; open it with bank=")
        return self._joint_of(self.bank.lookup_profiles(user_ids, on_unknown))

    def best_items(self, n: int) -> Best:
        """What exports of a bank take to add users' best items: `top_items(p, n)` of the profiles
        that a bank keeps.

        Raises:
            ConfigError: The model tells no reactions.
            DataError: `n` is below 1.
        """
        self.top_items(np.exp(self.log_prior), n)
        return lambda profiles: self.top_items(self._joint_of(profiles), n)

    def _joint_of(self, profiles: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, Z] of a bank's profiles [n, sum of K_j]; the prior for one that is all zeros."""
        out = np.empty((len(profiles), len(self.log_prior)), np.float32)
        known = profiles.any(1)
        each = np.split(profiles[known], np.cumsum(self._sizes)[:-1], axis=1)
        out[~known] = softmax(self.log_prior)
        out[known] = joint(each, self.columns)
        return out

    def knows(self, item: Any) -> bool:
        """Whether the table has an item."""
        return item in self._row

    def profile(
        self, items: Sequence[Any], reactions: Sequence[Any] | None = None
    ) -> NDArray[np.float32]:
        """p(codes | events) of a user, or of many; see `Model.profile`.

        Events of items that the table lacks are skipped, and counted in `skipped`.

        Args:
            items: Item keys of a user's events, maybe none; or a sequence of such sequences.
            reactions: How each went, in the shape of `items`: a feedback word, or a rating.

        Returns:
            [Z], or [U, Z] for many users. A user without known events has the prior.

        Raises:
            DataError: Reactions are not the model's, or not as many as items.
        """
        if len(items) > 0 and isinstance(items[0], list | tuple | np.ndarray):
            told: Iterable[Any] = [None] * len(items) if reactions is None else reactions
            return softmax(np.stack([self._joint(*own) for own in zip(items, told, strict=True)]))
        return softmax(self._joint(items, reactions))

    def _joint(self, items: Sequence[Any], reactions: Sequence[Any] | None) -> NDArray[np.float64]:
        """[Z] fp64, log p(codes, events), as far as events count."""
        told, known = self._told(items, reactions)
        return np.asarray(self.log_prior + counting(known, self._half) * told)

    def open_profile(
        self, items: Sequence[Any] = (), reactions: Sequence[Any] | None = None
    ) -> Profile:
        """A profile that takes more events; begun with some, as `profile` takes them."""
        how = self._half, self._repeats, self.columns
        profile = Profile(
            self.log_prior, self._sizes, self._tell, *how, code_prior=self._code_prior
        )
        return profile.extend(items, reactions)

    def affinity(
        self, probabilities: NDArray[np.floating[Any]], items: Sequence[Any]
    ) -> NDArray[np.float32]:
        """p(the best reaction | item, a user's codes), or how many times likelier a choice is than
        by anybody, averaged over the codes; see `Model.affinity`.

        Args:
            probabilities: [Z] or [U, Z], as `profile` gives them.
            items: n item keys.

        Returns:
            [n] or [U, n]; NaN for an item that the table lacks.

        Raises:
            ConfigError: The model tells no reactions.
        """
        self._check_reactions("affinity")
        rows = np.asarray([self._row.get(item, -1) for item in items], np.int64)
        found = self._scores(rows[rows >= 0])
        likes = np.full((len(rows), len(self.log_prior)), np.nan, np.float32)
        likes[rows >= 0] = found
        return np.asarray(np.asarray(probabilities, np.float32) @ likes.T, np.float32)

    def top_items(
        self, probabilities: NDArray[np.floating[Any]], n: int
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """The best of all known items; see `Model.top_items`."""
        self._check_reactions("top_items")
        return self._ranking.top(probabilities, n)

    @cached_property
    def _ranking(self) -> Ranking:
        keys = list(self._row)
        rows = np.fromiter(self._row.values(), np.int64, len(keys))
        counts = np.asarray([self._counts.get(key, 1) for key in keys], np.float64)
        return Ranking(
            pa.array(keys).to_numpy(zero_copy_only=False),
            lambda a, b: odds(self._scores(rows[a:b])) if self._chosen else self._scores(rows[a:b]),
            len(self.log_prior),
            counts**SAMPLING_POWER if self._chosen else counts if self._lifts else None,
        )

    @property
    def _lifts(self) -> bool:
        """Whether choices are told by text alone."""
        return self.words == ("",)

    def _scores(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        values = self._values(rows)
        if self._lifts:
            return lifts(values, self.log_prior)
        return likings(values, self._best, self._weight)

    def _values(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._table.take(rows.tolist()).values()

    def _check_reactions(self, what: str) -> None:
        if not self._lifts and self._weight <= 0:
            raise ConfigError(f"{what}: the model puts no loss on reactions")

    def _tell(self, item: Any, reaction: Any) -> tuple[int, NDArray[np.float64]] | None:
        word = self._word_of(reaction)
        if (row := self._row.get(item)) is None:
            self.skipped += 1
            return None
        at = row * len(self.words) + word
        apart = self._step[at].astype(np.float64) * self._offset[at]
        return at, np.asarray(apart + np.float64(self._mean[at]))

    def _word_of(self, reaction: Any) -> int:
        try:
            found = self._word.get(reaction)
        except TypeError:  # it cannot even be looked up
            found = None
        if found is None:
            rates = bool(self._thresholds) and isinstance(reaction, _NUMBERS)
            if not rates or not isfinite(reaction):
                raise DataError(
                    f"reaction {reaction!r} is not one of the model's: {list(self.words)}"
                    + (" or a rating" if self._thresholds else "")
                )
            found = bisect_right(self._thresholds, reaction)
        return found

    def _told(
        self, items: Sequence[Any], reactions: Sequence[Any] | None
    ) -> tuple[NDArray[np.float64], int]:
        """[Z] fp64, log p(events | codes), and the number of events that count."""
        if reactions is None:
            reactions = [None] * len(items)
        if len(items) != len(reactions):
            raise DataError(f"a user has {len(items)} items and {len(reactions)} reactions")
        words, row, word_of = len(self.words), self._row, self._word_of
        # Below 0 where the item is unknown; what is told of it is looked at all the same.
        at = [
            row[i] * words + word_of(r) if i in row else -1 - word_of(r)
            for i, r in zip(items, reactions)
        ]
        if at and min(at) < 0:
            known = [row for row in at if row >= 0]
            self.skipped += len(at) - len(known)
            at = known
        rows = np.array(at if self._repeats else list(dict.fromkeys(at)), np.int64)
        apart = self._step[rows].astype(np.float64) @ self._offset[rows].astype(np.float64)
        return np.asarray(apart + self._mean[rows].sum(dtype=np.float64)), len(rows)


def words_of(behaviour: Mapping[str, Any]) -> tuple[str, ...]:
    """[W] words for how an event went, of a behaviour format as a model's manifest has it."""
    if behaviour["scale"]:
        return tuple(map(str, behaviour["scale"]["words"]))
    return NEGATIVE_WORDS if behaviour["negatives"] else ("",)


def _log_prior(
    path: Path, sizes: Sequence[int], columns: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """[Z] of all combinations of codes, or of columns [Z, J], adding up to one; from codebooks in
    safetensors: a length, JSON, values."""
    with open_regular(path) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
        fields = []
        for j, size in enumerate(sizes):
            prior = np.full(size, -np.log(size))
            if (entry := header.get(f"{j}.log_prior")) is not None:
                first, last = entry["data_offsets"]
                file.seek(begin + first)
                prior = np.frombuffer(file.read(last - first), "<f4").astype(np.float64)
            if entry is not None and (entry["dtype"] != "F32" or prior.shape != (size,)):
                raise FormatError(f"{path}: field {j} has no prior of {size} codes")
            fields.append(prior)
    if columns is None:
        grid = np.ix_(*fields)
        return np.asarray(sum(grid[1:], grid[0]), np.float64).ravel()
    joint = np.asarray(sum(prior[k] for prior, k in zip(fields, columns.T)), np.float64)
    return np.asarray(joint - np.logaddexp.reduce(joint), np.float64)


def _read_columns(path: Path, sha256: str, sizes: Sequence[int]) -> NDArray[np.int64]:
    import pyarrow.parquet as pq

    if sha256_file(path) != sha256:
        raise FormatError(f"{path}: altered since it was saved")
    with pq.ParquetFile(path) as file:
        return codes_of(file.read(), sizes)


def _read_catalogue(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read(columns=["item", "text", "count"])

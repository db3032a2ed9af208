"""Codes of users, feature by feature: learned on `learn`, then read from any view.

All have the fields' own sizes. Cluster features are J levels of residual k-means with K_j centres,
the best of `em.kmeans_restarts` starts by distance, on standardised vectors; generosity's quantiles
and the mixture's codes are as many as the fields have combinations, told as J digits. Nothing is
tuned on the evaluated rows for any feature, the IDs included.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from userip_fast.codebook.books import ResidualCodebook
from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError
from userip_fast.core.keys import hash_keys, seeded
from userip_fast.core.profiles import all_codes, joint
from userip_fast.core.progress import progress
from userip_fast.ctr.cells import Cells, data_digest
from userip_fast.ctr.vectors import (
    Float64,
    Ridge,
    attribute_matrix,
    feedback_values,
    pooled,
    tfidf_matrix,
)
from userip_fast.data import Catalogue, Events, Interactions
from userip_fast.data.attributes import item_attributes
from userip_fast.em.calibrate import TABLE_RECIPE
from userip_fast.em.free import FreeMixture
from userip_fast.em.readings import Readings, log_likelihoods, pair_log_likelihoods
from userip_fast.em.starts import shared_start
from userip_fast.em.states import mean_states
from userip_fast.lm import PackedEngine
from userip_fast.lm.embedded import RECIPE
from userip_fast.model.fitted import Model
from userip_fast.model.prepare import prepare
from userip_fast.prompts.behaviour import BehaviourSource
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.packing import Int64

Vectors = Callable[[Interactions], Float64]


class ImpossibleError(Exception):
    """A feature that this data cannot have; the text says why."""


class Profiles:
    """Learns and reads the codes of every feature.

    Args:
        learn: Histories to learn from.
        config: Fields, LM, behaviour and EM; `em.seed` seeds the LM, codes take seeds of their own.
        attributes: Item columns of `kmeans_attributes`; None chooses.
        folder: Keeps the fitted models; None for a temporary one.
    """

    def __init__(
        self,
        learn: Interactions,
        config: Config,
        attributes: tuple[str, ...] | None = None,
        folder: Path | None = None,
        show: bool = False,
    ) -> None:
        self.learn, self.config, self.attributes, self.show = learn, config, attributes, show
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self.models = Cells(Path(self._temporary.name) if self._temporary else folder)
        self.format = BehaviourFormat.fit(config.told, learn, config.em.seed)
        self.catalogue = Catalogue.from_interactions(learn)
        self.sizes = [f.codebook_size for f in config.fields]
        self._books: dict[tuple[str, int], tuple[Vectors, ResidualCodebook]] = {}
        self._mixtures: dict[tuple[int, bool], FreeMixture] = {}
        self._known_states: dict[str, Float64] = {}
        self._fitted: dict[tuple[str, int], Model] = {}

    def read(self, feature: str, view: Interactions, seed: int) -> dict[str, NDArray[Any]]:
        """Profiles of a view's users.

        Returns:
            `codes` [view.num_users, J] int64, K_j where the feature knows nothing of a user; and
            `probabilities` [view.num_users, sum of K_j] float32 where it tells them.

        Raises:
            ImpossibleError: The data cannot have this feature.
        """
        if feature == "random":
            bits = seeded(hash_keys(view.user_keys), seed)
            columns = [seeded(bits, j) % np.uint64(k) for j, k in enumerate(self.sizes)]
            return {"codes": np.stack(columns, axis=1).astype(np.int64)}
        if feature in ("ids", "paper"):
            return self._inferred(feature, view, seed)
        if feature in ("mixture", "mixture_words"):
            mixture = self.mixture(seed, feature == "mixture_words")
            p = mixture.posterior(*self.choices(view))
            return {"codes": self._digits(p.argmax(1)), "probabilities": p.astype(np.float32)}
        if feature == "generosity":
            return {"codes": self._digits(np.searchsorted(self.quantiles, self._generosity(view)))}
        vectors, book = self._learned(feature, seed)
        x = torch.from_numpy(vectors(view)).float()
        return {"codes": book.assign(x)[0].numpy()}

    def mixture(self, seed: int, by_words: bool = False) -> FreeMixture:
        """The mixture without an LM, of items alone or also `by_words` of their texts."""
        if (seed, by_words) not in self._mixtures:
            scale = self.format.scale
            words = len(scale.words) if scale else 1
            size = self.learn.num_items, math.prod(self.sizes), seed, words
            texts = self.learn.item_text.to_pylist() if by_words else None
            self._mixtures[seed, by_words] = FreeMixture(*self.choices(self.learn), *size, texts)
        return self._mixtures[seed, by_words]

    def choices(self, view: Interactions) -> tuple[Int64, Int64, Int64 | None]:
        """Offsets, items and words of feedback of a view's own events; of choices no words."""
        scale = self.format.scale
        level = None if scale is None else scale.level(view.rating).astype(np.int64)  # type: ignore[arg-type]
        return view.offsets, view.item_index.astype(np.int64), level

    def _generosity(self, view: Interactions) -> Float64:
        """[view.num_users] mean excess of ratings over the items' own; of choices, popularity."""
        n = view.history_lengths + 2.0
        values = self._item_means[view.item_index]
        if view.rating is not None and self.format.scale is not None:
            values = view.rating - values
        return np.asarray(np.bincount(view.users_of_events(), values, view.num_users) / n)

    @cached_property
    def _item_means(self) -> Float64:
        learn = self.learn
        counts = learn.item_counts()
        if learn.rating is None or self.format.scale is None:
            return np.log1p(counts)
        mean = float(learn.rating.mean())
        total = np.bincount(learn.item_index, learn.rating - mean, learn.num_items)
        return np.asarray(mean + total / (counts + 10.0))

    @cached_property
    def quantiles(self) -> Float64:
        """[prod K - 1] cuts of the teachers' generosity into equal parts."""
        size = math.prod(self.sizes)
        return np.quantile(self._generosity(self.learn), np.arange(1, size) / size)

    def _digits(self, code: Int64) -> Int64:
        """[U, J] digits of one code among all combinations."""
        return np.stack(np.unravel_index(code, self.sizes), axis=1).astype(np.int64)

    def key(self, feature: str) -> dict[str, Any]:
        """What decides a feature's codes, beside seed and view; ready for JSON."""
        config = self.config.to_dict()
        em = config.pop("em")
        key: dict[str, Any] = {"feature": feature, "sizes": self.sizes, "version": 3}
        if feature == "random":
            return key
        key |= {"learn": data_digest(self.learn), "data": config["data"]}
        if feature in ("generosity", "mixture"):
            return key
        if feature == "mixture_words":
            return key | {"table": TABLE_RECIPE}
        if feature in ("kmeans_attributes", "kmeans_tfidf", "mf_clusters"):
            return key | {"restarts": em["kmeans_restarts"], "attributes": self.attributes}
        key |= {"lm": config["lm"], "fields": config["fields"], "lm_seed": em.pop("seed")}
        key["recipe"] = RECIPE  # of the embedded LM
        if feature == "kmeans_states":
            return key | {"restarts": em["kmeans_restarts"]}
        if feature == "paper":
            em = {k: v for k, v in em.items() if k.startswith("paper_")}
        elif feature == "ids":
            key["table"] = TABLE_RECIPE
        return key | {"em": em}

    def model(self, feature: str, seed: int) -> Model:
        """The fitted model behind `ids` or `paper`, kept on disk."""
        if (feature, seed) not in self._fitted:
            em = replace(
                self.config.em, seed=seed, recipe="paper" if feature == "paper" else "userip"
            )
            config = replace(self.config, em=em)
            run = self.models.path({"kind": "model", "seed": seed, **self.key(feature)})
            if (run / "model" / "manifest.json").is_file():
                model = Model.load(run / "model")
            else:
                model, source = prepare(self.learn, config, lm=self.lm_model.lm, show=self.show)
                trainer = model.ready_trainer(self.show)
                found = trainer.fit(source, checkpoints=run / "checkpoints", resume=True)
                model.take(found)
                model.save(run / "model")
                trainer.forget(run / "checkpoints")
            self._fitted[feature, seed] = model
        return self._fitted[feature, seed]

    @cached_property
    def lm_model(self) -> Model:
        """LM, format and engine; the LM is trained here if it is the embedded one."""
        return prepare(self.learn, self.config, show=self.show)[0]

    def events(self, view: Interactions) -> Events:
        """Events as the LM reads them."""
        return self.format.events(view, self.catalogue)

    def _inferred(self, feature: str, view: Interactions, seed: int) -> dict[str, NDArray[Any]]:
        model = self.model(feature, seed)
        source = model.source(view, "skip")
        parts = list(model.infer_blocks(source, show=self.show))  # by one table for all views
        at = view.user_index(source.keys_of(0, source.num_users))
        codes = np.tile(np.array(self.sizes), (view.num_users, 1))
        codes[at] = torch.cat([p.code_ids for p in parts]).numpy()  # type: ignore[misc]
        out: dict[str, NDArray[Any]] = {"codes": codes}
        told = [p.log_resp for p in parts]
        if all(r is not None for r in told):
            p = np.concatenate([torch.cat(list(r), dim=1).exp().numpy() for r in told])  # type: ignore[arg-type]
            out["probabilities"] = np.tile(p.mean(0), (view.num_users, 1)).astype(np.float32)
            out["probabilities"][at] = p
        return out

    def affinity(self, data: Interactions, seed: int) -> dict[str, NDArray[Any]]:
        """`p` [I, Z], p(the best reaction | item, codes) of the items of `data`; of choices, how
        many times likelier they are than by anybody. `codes` [Z, J], where not all combinations.

        Raises:
            ImpossibleError: The LM tells no reactions, or has no event table.
        """
        model = self.model("ids", seed)
        try:
            columns = len(model.event_table().grid.codes)
            texts = dict(zip(data.item_keys.to_pylist(), data.item_text.to_pylist()))
            p = model.affinity(np.eye(columns, dtype=np.float32), list(texts), texts)
        except ConfigError as why:
            raise ImpossibleError(str(why)) from why
        most = 1 - 1e-6 if self.format.words else None
        out: dict[str, NDArray[Any]] = {"p": np.ascontiguousarray(np.clip(p.T, 1e-6, most))}
        if (some := model.calibration.columns) is not None:
            out["codes"] = some.numpy()
        return out

    def told(self, view: Interactions, user: Int64, item: Int64) -> NDArray[np.float32]:
        """[N] the same, in logarithms (odds, of reactions), of pairs of a view's users and its
        items, with what the LM is told of the user in place of codes: what codes may reach.

        Args:
            user: [N] rows of the view, -1 for somebody of whom nothing is known.
            item: [N] rows of the view's items.

        Raises:
            ImpossibleError: The LM has no language to be told of users.
        """
        model = self.model("ids", 0)
        lm, engine, fmt = model.lm, model.ready_trainer().engine, model.format
        if lm.foldin is None or not fmt.by_lifts:
            raise ImpossibleError("this LM has not learned to read what a user did")
        source = model.source(view, "skip")
        told = source.told(lm.tokenizer, 0, source.num_users)
        kinds = list(zip(told.texts, told.words or [""] * len(told.texts)))
        rows = torch.cat([lm.foldin.theta(kinds, told.kinds, told.offsets), model.start[None]])
        nobody = source.num_users
        at = np.full(view.num_users + 1, nobody)
        at[view.user_index(source.keys_of(0, nobody))] = np.arange(nobody)
        of_pair = torch.from_numpy(at[user])
        words = fmt.words or ("",)
        texts = view.item_text.to_pylist()
        known = {text: i for i, text in enumerate(dict.fromkeys(texts[i] for i in np.unique(item)))}
        readings = Readings.of(
            fmt.kinds(lm.tokenizer, engine.layout, [(t, w) for t in known for w in words])
        )
        text = np.asarray([known[texts[i]] for i in item.tolist()], np.int64)
        said = np.zeros((len(item), len(words)))
        columns = readings.reading.reshape(len(known), len(words))
        tokens = self.config.em.pack_tokens
        neutral = log_likelihoods(engine, readings, model.start[None].to(lm.device), tokens)
        apart = [w for w in range(len(words)) if w == 0 or (columns[:, w] != columns[:, 0]).any()]
        with progress("reading pairs", len(item) * len(apart), "readings", self.show) as bar:
            for w in apart:
                pair, kind, value = pair_log_likelihoods(
                    engine,
                    readings,
                    lambda own: rows[of_pair[own]].to(lm.device),
                    columns[text, w],
                    tokens,
                )
                own = text[pair] == kind // len(words)  # a reading may tell of other texts too
                said[pair[own], kind[own] % len(words)] = value[own]
                bar.advance(len(item))
        said -= neutral.numpy().reshape(len(known), len(words))[text]
        if not fmt.words:
            return said[:, 0].astype(np.float32)
        usual = model.calibration.usual
        assert usual is not None
        said = said / fmt.feedback_weight + usual.log_shares(list(known)).numpy()[text]
        p = np.exp(said - said.max(1, keepdims=True))
        p = np.clip(p[:, fmt.best_word] / p.sum(1), 1e-6, 1 - 1e-6)
        return np.asarray(np.log(p / (1 - p)), np.float32)

    def joint(
        self, probabilities: NDArray[np.float32], codes: Int64 | None = None
    ) -> NDArray[np.float32]:
        """[U, Z] of all combinations, or of `codes` [Z, J], from [U, sum of K_j]: the product over
        fields."""
        each = np.split(probabilities, np.cumsum(self.sizes)[:-1], axis=1)
        return joint(each, all_codes(self.sizes) if codes is None else codes)

    def _learned(self, feature: str, seed: int) -> tuple[Vectors, ResidualCodebook]:
        if (feature, seed) not in self._books:
            raw = self._vectors(feature, seed)
            x = raw(self.learn)
            center, scale = x.mean(0), x.std(0)
            # Attributes keep their scale (all are shares); others may have any.
            scale = np.full_like(scale, scale.mean() or 1.0) if "attr" in feature else scale + 1e-9

            def vectors(view: Interactions) -> Float64:
                return np.asarray((raw(view) - center) / scale)

            z = torch.from_numpy(vectors(self.learn)).float()
            starts = [
                ResidualCodebook.kmeans(z, self.sizes, seed=1000 * seed + i, iterations=50)
                for i in range(self.config.em.kmeans_restarts)
            ]
            best = min(starts, key=lambda book: float(book.assign(z)[1].double().sum()))
            self._books[feature, seed] = vectors, best
        return self._books[feature, seed]

    def _vectors(self, feature: str, seed: int) -> Vectors:
        if feature == "kmeans_attributes":
            attributes = item_attributes(self.learn.items, self.attributes)
            if not attributes:
                raise ImpossibleError(
                    "no item column of text has values that recur among the items; name some "
                    "with --attributes"
                )
            matrix = attribute_matrix(attributes)
            return lambda view: pooled(self.events(view), matrix)
        if feature == "kmeans_tfidf":
            texts = tfidf_matrix(self.learn.item_text.to_pylist(), seed)
            return lambda view: pooled(self.events(view), texts)
        if feature == "mf_clusters":
            events = self.events(self.learn)
            value = self._values(self.learn, events)
            items = self.learn.num_items
            factors = Ridge(events.offsets, events.item_index, value, items, seed)

            def users(view: Interactions) -> Float64:
                events = self.events(view)
                return factors.users(events.offsets, events.item_index, self._values(view, events))

            return users
        assert feature == "kmeans_states", feature
        return self._states

    def _values(self, view: Interactions, events: Events) -> Float64:
        """Ratings where there are some (finer than words), else feedback as a number."""
        if view.rating is not None and not self.format.negatives:
            return view.rating.astype(np.float64)
        return feedback_values(events)

    def _states(self, view: Interactions) -> Float64:
        key = data_digest(view)
        if key not in self._known_states:  # no seed changes them
            self._known_states[key] = self._read_states(view)
        return self._known_states[key]

    def _read_states(self, view: Interactions) -> Float64:
        lm_model = self.lm_model
        engine = PackedEngine(lm_model.lm, lm_model.layout)
        learn = BehaviourSource(self.events(self.learn), self.format)
        start = shared_start(engine, self.config, learn)
        source = BehaviourSource(self.events(view), self.format)
        return mean_states(engine, source, start).double().numpy()

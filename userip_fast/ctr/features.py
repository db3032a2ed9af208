"""Codes of users, feature by feature: learned on `learn`, then read from any view.

All cluster features have the fields' own sizes: J levels of residual k-means with K_j centres, the
best of `em.kmeans_restarts` starts by distance, on standardised vectors. Nothing is tuned on the
evaluated rows for any feature, the IDs included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from userip_fast.api import fit, prepare
from userip_fast.behaviour import BehaviourFormat, BehaviourSource
from userip_fast.codebook import ResidualCodebook
from userip_fast.config import Config
from userip_fast.ctr.cells import Cells, data_digest
from userip_fast.ctr.vectors import (
    Factors,
    Float64,
    attribute_matrix,
    feedback_values,
    item_attributes,
    pooled,
    tfidf_matrix,
)
from userip_fast.data import Catalogue, Events, Interactions
from userip_fast.em.states import mean_states
from userip_fast.em.trainer import shared_start
from userip_fast.keys import hash_keys, seeded
from userip_fast.lm import PackedEngine
from userip_fast.model import Model
from userip_fast.packing import Int64

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
        self.format = BehaviourFormat.fit(config.data, learn, config.em.seed)
        self.catalogue = Catalogue.from_interactions(learn)
        self.sizes = [f.codebook_size for f in config.fields]
        self._books: dict[tuple[str, int], tuple[Vectors, ResidualCodebook]] = {}
        self._fitted: dict[tuple[str, int], Model] = {}

    def codes(self, feature: str, view: Interactions, seed: int) -> Int64:
        """[view.num_users, J]; K_j where the feature knows nothing of a user.

        Raises:
            ImpossibleError: The data cannot have this feature.
        """
        if feature == "random":
            bits = seeded(hash_keys(view.user_keys), seed)
            columns = [seeded(bits, j) % np.uint64(k) for j, k in enumerate(self.sizes)]
            return np.stack(columns, axis=1).astype(np.int64)
        if feature in ("ids", "paper"):
            return self._inferred(feature, view, seed)
        vectors, book = self._learned(feature, seed)
        x = torch.from_numpy(vectors(view)).float()
        return book.assign(x)[0].numpy()

    def key(self, feature: str) -> dict[str, Any]:
        """What decides a feature's codes, beside seed and view; ready for JSON."""
        config = self.config.to_dict()
        em = config.pop("em")
        key: dict[str, Any] = {"feature": feature, "sizes": self.sizes, "version": 1}
        if feature == "random":
            return key
        key |= {"learn": data_digest(self.learn), "data": config["data"]}
        if feature in ("kmeans_attributes", "kmeans_tfidf", "mf_clusters"):
            return key | {"restarts": em["kmeans_restarts"], "attributes": self.attributes}
        key |= {"lm": config["lm"], "fields": config["fields"], "lm_seed": em.pop("seed")}
        if feature == "kmeans_states":
            return key | {"restarts": em["kmeans_restarts"]}
        if feature == "paper":
            em = {k: v for k, v in em.items() if k.startswith("paper_")}
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
                model = fit(
                    self.learn, self.lm_model.lm, config=config, out=run, resume=True,
                    show=self.show,
                )  # fmt: skip
            self._fitted[feature, seed] = model
        return self._fitted[feature, seed]

    @cached_property
    def lm_model(self) -> Model:
        """LM, format and engine; the LM is trained here if it is the embedded one."""
        return prepare(self.learn, self.config, show=self.show)[0]

    def events(self, view: Interactions) -> Events:
        """Events as the LM reads them."""
        return self.format.events(view, self.catalogue)

    def _inferred(self, feature: str, view: Interactions, seed: int) -> Int64:
        with tempfile.TemporaryDirectory() as folder:
            model = self.model(feature, seed)
            bank = model.infer(view, Path(folder) / "bank", on_bad="skip", show=self.show)
            assert not isinstance(bank, np.ndarray)
            return np.array(bank.lookup(view.user_keys, on_unknown="code"), np.int64)

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
            attributes = item_attributes(self.learn, self.attributes)
            if not attributes:
                raise ImpossibleError(
                    "no item column has few values or values separated by |; name some with "
                    "--attributes"
                )
            matrix = attribute_matrix(attributes)
            return lambda view: pooled(self.events(view), matrix)
        if feature == "kmeans_tfidf":
            texts = tfidf_matrix(self.learn.item_text.to_pylist(), seed)
            return lambda view: pooled(self.events(view), texts)
        if feature == "mf_clusters":
            events = self.events(self.learn)
            factors = Factors(events, self._values(self.learn, events), seed)

            def users(view: Interactions) -> Float64:
                events = self.events(view)
                return factors.users(events, self._values(view, events))

            return users
        assert feature == "kmeans_states", feature
        return self._states

    def _values(self, view: Interactions, events: Events) -> Float64:
        """Ratings where there are some (finer than words), else feedback as a number."""
        if view.rating is not None and not self.format.negatives:
            return view.rating.astype(np.float64)
        return feedback_values(events)

    def _states(self, view: Interactions) -> Float64:
        lm_model = self.lm_model
        engine = PackedEngine(lm_model.lm, lm_model.layout)
        learn = BehaviourSource(self.events(self.learn), self.format)
        start = shared_start(engine, self.config, learn)
        source = BehaviourSource(self.events(view), self.format)
        return mean_states(engine, source, start).double().numpy()

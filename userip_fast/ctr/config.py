"""Settings of a CTR evaluation."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from userip_fast.config import Config
from userip_fast.errors import ConfigError

FEATURES = (
    "none", "random", "generosity", "kmeans_attributes", "kmeans_tfidf", "kmeans_states",
    "mf_clusters", "mixture_ids", "mixture", "foldin", "history", "text", "paper", "ids",
    "ids_prob",
    "affinity", "theta", "all", "all+ids",
)  # fmt: skip
"""What a recommender knows of the user, beside the statistics that `none` has as well."""
DEFAULT_FEATURES = tuple(f for f in FEATURES if f not in ("random", "paper", "theta"))
"""The published recipe costs a gradient descent per user, and `theta` (what codes may reach: the
LM's own score of an item, told of the user) a reading of the LM per row: they are asked for."""
CLUSTERS = (
    "generosity", "kmeans_attributes", "kmeans_tfidf", "kmeans_states", "mf_clusters",
    "mixture_ids",
)  # fmt: skip
"""Codes without an LM, of equal capacity. (`mixture` comes with probabilities and score as well, as
`affinity` does of an LM.)"""
HISTORY = "history"
"""The one feature that has a backbone of its own, `DIN`: the profile's events themselves."""
DIN = "din"
BACKBONES = ("dcn", "dcnv2", "deepfm", "autoint", "lr", "lightgbm")
DEFAULT_BACKBONES = ("dcn", "deepfm", "lightgbm")
CHOSEN = "chosen"
PROFILES = Config()
"""How profiles are inferred unless told otherwise: EM on all teachers by the event table, one field
of 16 codes."""
_DAMAGE = re.compile(r"(drop|noise):(0?\.\d+|1(?:\.0*)?)|shuffle")


@dataclass(frozen=True)
class CTRConfig:
    """Protocol, rows and training of the recommenders. Everything here decides the result."""

    protocol: Literal["new-users", "cold", "warm"] = "new-users"
    first: int = 10
    """new-users: events that give the profile; later ones are rows."""
    label: str | None = None
    """"rating>=Q", or "chosen": events against sampled items, ratings left unread. None is above
    the median of the training ratings, or "chosen" without ratings."""
    attributes: tuple[str, ...] | None = None
    """Item columns; None takes those of text whose values recur among the items."""
    features: tuple[str, ...] = DEFAULT_FEATURES
    backbones: tuple[str, ...] = DEFAULT_BACKBONES
    seeds: int = 2
    """Codes and recommenders are trained so often; the split and the LM stay the same."""
    max_users: int | None = None
    """Teachers, and users with rows, at most, in hash order."""
    rows_per_user: int = 40
    """Events of a user that become rows, at most: the first ones after the profile."""
    negatives: int = 4
    """Sampled rows per choice, by popularity^0.75."""
    new_fraction: float = 0.3
    """Users that are new (new-users), or cut to their first events (cold)."""
    rows_fraction: float = 0.3
    """Further users with training rows; the rest are those from whom profiles are learned."""
    hold_items: float = 0.0
    """new-users: share of the items, by key, of which nothing but test rows knows."""
    user_statistics: bool = True
    """Whether every feature comes with statistics of the user; those of the item it has anyway."""
    folds: int = 5
    """Of the users with training rows, for what is fitted on them too."""
    cold_rows: int = 5
    warm_rows: int = 20
    last_fraction: float = 0.2
    """cold, warm: latest events of a user that are test rows."""
    damage: str = ""
    """To the histories that test profiles are read from: drop:P, noise:P or shuffle."""
    period: Literal["same", "earlier"] = "same"
    """"earlier": profiles are learned on the earlier half of the log, rows are of the later."""
    split_seed: int = 0
    embed_dim: int = 8
    batch: int = 1024
    epochs: int = 30
    patience: int = 2
    lr: float = 3e-3
    weight_decay: float = 1e-5
    bootstrap: int = 200
    """Resamplings of the test users, for intervals and tests."""

    def __post_init__(self) -> None:
        for name, known in (("features", FEATURES), ("backbones", BACKBONES)):
            chosen = getattr(self, name)
            if not chosen or not set(chosen) <= set(known) or len(set(chosen)) != len(chosen):
                raise ConfigError(f"ctr {name} must be some of {list(known)}, is {list(chosen)}")
        if self.protocol not in ("new-users", "cold", "warm"):
            raise ConfigError(f"ctr protocol must be new-users, cold or warm, is {self.protocol!r}")
        if self.period not in ("same", "earlier"):
            raise ConfigError(f"ctr period must be same or earlier, is {self.period!r}")
        for name in (
            "first", "seeds", "max_users", "rows_per_user", "negatives", "cold_rows", "embed_dim",
            "batch", "epochs", "patience", "bootstrap",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"ctr {name} must be at least 1, is {value}")
        if self.folds < 2:
            raise ConfigError(f"ctr folds must be at least 2, is {self.folds}")
        for name in ("new_fraction", "rows_fraction", "last_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"ctr {name} must be in (0, 1), is {getattr(self, name)}")
        if self.new_fraction + self.rows_fraction >= 1:
            raise ConfigError(
                "ctr new_fraction + rows_fraction must be below 1, so that users are left to learn "
                f"profiles from; they are {self.new_fraction} + {self.rows_fraction}"
            )
        if not 0 <= self.hold_items < 1:
            raise ConfigError(f"ctr hold_items must be in [0, 1), is {self.hold_items}")
        if self.hold_items and self.protocol != "new-users":
            raise ConfigError(f"ctr hold_items goes with new-users, not with {self.protocol}")
        if self.damage and not _DAMAGE.fullmatch(self.damage):
            raise ConfigError(f"ctr damage must be drop:P, noise:P or shuffle, is {self.damage!r}")
        if self.label not in (None, CHOSEN):
            threshold(self.label)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def threshold(label: str) -> float:
    """Q of "rating>=Q"."""
    found = re.fullmatch(r"\s*rating\s*>=\s*(-?\d+(?:\.\d+)?)\s*", label)
    if not found:
        raise ConfigError(
            f"ctr label must be 'rating>=Q', for example 'rating>=4', or {CHOSEN!r}, is {label!r}"
        )
    return float(found[1])

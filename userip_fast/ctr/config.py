"""Settings of a CTR evaluation."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from userip_fast.core.config import Config
from userip_fast.core.errors import ConfigError
from userip_fast.core.settings import Rule, at_least, check, setting

FEATURES = (
    "none", "random", "generosity", "kmeans_attributes", "kmeans_tfidf", "kmeans_states",
    "mf_clusters", "mixture_ids", "mixture", "mixture_words", "foldin", "history", "text", "paper",
    "ids", "ids_prob", "affinity", "ids_affinity", "theta", "all", "all+ids",
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
`ids_affinity` of an LM; `mixture_words` is what codewords begin at, and no rival of ours.)"""
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
_SHARE = Rule("in (0, 1)", lambda x: 0 < x < 1)


def _one_of(*values: str) -> Rule:
    return Rule(f"{', '.join(values[:-1])} or {values[-1]}", lambda x: x in values)


@dataclass(frozen=True)
class CTRConfig:
    """Protocol, rows and training of the recommenders. Everything here decides the result."""

    protocol: Literal["new-users", "cold", "warm"] = setting(
        "new-users",
        "new-users, cold or warm.",
        _one_of("new-users", "cold", "warm"),
    )
    first: int = setting(10, "new-users: events that give a profile.", at_least(1))
    """Later ones are rows."""
    label: str | None = setting(
        None, "'rating>=Q' (above the training median), or 'chosen' against sampled items."
    )
    """Ratings are left unread for "chosen", which is what None stands for without ratings."""
    attributes: tuple[str, ...] | None = setting(
        None, "Item columns A,B (those of text whose values recur)."
    )
    features: tuple[str, ...] = setting(
        DEFAULT_FEATURES, "User features A,B,... (all but random, paper and theta)."
    )
    backbones: tuple[str, ...] = setting(
        DEFAULT_BACKBONES, f"Of {','.join(BACKBONES)} ({','.join(DEFAULT_BACKBONES)})."
    )
    seeds: int = setting(2, "Trainings of codes and recommenders.", at_least(1))
    """The split and the LM stay the same."""
    max_users: int | None = setting(None, rule=at_least(1))
    """Teachers, and users with rows, at most, in hash order."""
    rows_per_user: int = setting(40, "Rows of a user, at most.", at_least(1))
    """Events that become rows: the first ones after the profile."""
    negatives: int = setting(4, rule=at_least(1))
    """Sampled rows per choice, by popularity^0.75."""
    new_fraction: float = setting(0.3, rule=_SHARE)
    """Users that are new (new-users), or cut to their first events (cold)."""
    rows_fraction: float = setting(0.3, rule=_SHARE)
    """Further users with training rows; the rest are those from whom profiles are learned."""
    hold_items: float = setting(
        0.0,
        "Share of the items that nothing but test rows knows (0).",
        Rule("in [0, 1)", lambda x: 0 <= x < 1),
    )
    """new-users: drawn by key."""
    user_statistics: bool = setting(True, "Statistics of the user beside every feature.")
    """Those of the item every feature has anyway."""
    folds: int = setting(5, rule=at_least(2))
    """Of the users with training rows, for what is fitted on them too."""
    cold_rows: int = setting(5, rule=at_least(1))
    warm_rows: int = 20
    last_fraction: float = setting(0.2, rule=_SHARE)
    """cold, warm: latest events of a user that are test rows."""
    damage: str = setting(
        "",
        "To test histories: drop:P, noise:P or shuffle.",
        Rule("drop:P, noise:P or shuffle", lambda x: not x or _DAMAGE.fullmatch(x) is not None),
    )
    """To the histories that test profiles are read from."""
    period: Literal["same", "earlier"] = setting(
        "same", "earlier: learn profiles on the log's earlier half.", _one_of("same", "earlier")
    )
    """Rows are then of the later half."""
    split_seed: int = 0
    embed_dim: int = setting(8, rule=at_least(1))
    batch: int = setting(1024, rule=at_least(1))
    epochs: int = setting(30, rule=at_least(1))
    patience: int = setting(2, rule=at_least(1))
    lr: float = 3e-3
    weight_decay: float = 1e-5
    bootstrap: int = setting(200, rule=at_least(1))
    """Resamplings of the test users, for intervals and tests."""

    def __post_init__(self) -> None:
        check(self, "ctr ")
        for name, known in (("features", FEATURES), ("backbones", BACKBONES)):
            chosen = getattr(self, name)
            if not chosen or not set(chosen) <= set(known) or len(set(chosen)) != len(chosen):
                raise ConfigError(f"ctr {name} must be some of {list(known)}, is {list(chosen)}")
        if self.new_fraction + self.rows_fraction >= 1:
            raise ConfigError(
                "ctr new_fraction + rows_fraction must be below 1, so that users are left to learn "
                f"profiles from; they are {self.new_fraction} + {self.rows_fraction}"
            )
        if self.hold_items and self.protocol != "new-users":
            raise ConfigError(f"ctr hold_items goes with new-users, not with {self.protocol}")
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

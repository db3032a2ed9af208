"""Do the IDs help a recommender? Protocols without leaks, the rivals a user would pick, statistics.

Read in this order: `config` (settings), `protocols` (who teaches, trains and is tested, and what a
profile may know), `numbers` (statistics and scores without an LM), `vectors`, `mixture` and
`features` (codes), `inputs` (what a recommender is given), `backbones` (torch-rechub's models and
LightGBM), `statistics`, `codes`, `ranking` and `compare` (what is measured), `warm` (when codes are
left out), `evaluate` (all of it together), `work` (how long it takes), `cells` (finished work on
disk), `results` (many evaluations, a page).
"""

from typing import TYPE_CHECKING, Any

from userip_fast.ctr.config import (
    BACKBONES,
    CLUSTERS,
    DEFAULT_BACKBONES,
    DEFAULT_FEATURES,
    FEATURES,
    PROFILES,
    CTRConfig,
)

if TYPE_CHECKING:
    from userip_fast.ctr.evaluate import evaluate_ctr

__all__ = [
    "BACKBONES", "CLUSTERS", "DEFAULT_BACKBONES", "DEFAULT_FEATURES", "FEATURES", "PROFILES",
    "CTRConfig", "evaluate_ctr",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "evaluate_ctr":  # which needs torch; the settings, which the command line tells, not
        from userip_fast.ctr.evaluate import evaluate_ctr

        return evaluate_ctr
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

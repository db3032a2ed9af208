"""Do the IDs help a recommender? Protocols without leaks, features of equal capacity, statistics.

Read in this order: `config` (settings), `protocols` (who is tested, and what a profile may know),
`vectors` and `features` (what stands for a user), `backbones` (torch-rechub's models),
`statistics`, `evaluate` (all of it together), `cells` (finished work on disk).
"""

from userip_fast.ctr.config import BACKBONES, CLUSTERS, FEATURES, PROFILES, CTRConfig
from userip_fast.ctr.evaluate import evaluate_ctr

__all__ = ["BACKBONES", "CLUSTERS", "FEATURES", "PROFILES", "CTRConfig", "evaluate_ctr"]

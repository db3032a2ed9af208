"""The frozen LM: loading, checks, packed attention, and the engines that score packs."""

from userip_fast.lm.engine import Engine, PackedEngine, ReferenceEngine, make_engine
from userip_fast.lm.frozen import FrozenLM

__all__ = ["Engine", "FrozenLM", "PackedEngine", "ReferenceEngine", "make_engine"]

"""The frozen LM: loading, checks, packed attention, and the engines that score packs."""

from userip_fast.lm.engine import Engine, PackedEngine, ReferenceEngine
from userip_fast.lm.engines import make_engine
from userip_fast.lm.frozen import FrozenLM
from userip_fast.lm.load import open_lm

__all__ = ["Engine", "FrozenLM", "PackedEngine", "ReferenceEngine", "make_engine", "open_lm"]

"""Which engine scores packs."""

from __future__ import annotations

from userip_fast.lm import graphs
from userip_fast.lm.engine import PackedEngine, ReferenceEngine
from userip_fast.lm.frozen import FrozenLM
from userip_fast.prompts.layout import Layout


def make_engine(
    name: str, lm: FrozenLM, layout: Layout, tokens: int = 8192
) -> PackedEngine | ReferenceEngine:
    """The engine called `name`, for packs of at most `tokens` rows.

    "packed", "graph", "reference"; "auto" is "graph" where that pays, and "packed".

    Raises:
        UnavailableError: "graph", and the LM is not on a GPU.
    """
    graphs.check_device(name, lm.device)
    if name == "graph" or (name == "auto" and graphs.pays(lm, tokens)):
        return graphs.GraphEngine(lm, layout, tokens=tokens, asked=name == "graph")
    return ReferenceEngine(lm, layout) if name == "reference" else PackedEngine(lm, layout)

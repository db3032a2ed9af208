"""Interaction logs and item tables: read, checked, split, and turned into per-user events."""

from userip_fast.data.feedback import (
    Catalogue,
    Events,
    FeedbackScale,
    Negatives,
    make_events,
)
from userip_fast.data.interactions import Interactions
from userip_fast.data.nete import read_nete
from userip_fast.data.read import read_interactions
from userip_fast.data.report import BadRow, BadRows
from userip_fast.data.splits import split_by_time, split_last, split_users
from userip_fast.data.stream import InteractionStream, stream_interactions
from userip_fast.data.text import TextTemplate

Data = Interactions | InteractionStream
"""Histories in memory, or on disk where they do not fit."""

__all__ = [
    "BadRow",
    "BadRows",
    "Catalogue",
    "Data",
    "Events",
    "FeedbackScale",
    "InteractionStream",
    "Interactions",
    "Negatives",
    "TextTemplate",
    "make_events",
    "read_interactions",
    "read_nete",
    "split_by_time",
    "split_last",
    "split_users",
    "stream_interactions",
]

"""EM on the likelihood of users' real behaviour: E-steps, M-steps, and the loop."""

from userip_fast.em.crowd import Apart, Crowd
from userip_fast.em.gradient import GradientEStep
from userip_fast.em.mixture import Mixture, MixtureMStep
from userip_fast.em.mstep import Stats, ThetaMStep
from userip_fast.em.posterior import PosteriorEStep
from userip_fast.em.steps import Block, EMState, EStep, MStep, Profiles
from userip_fast.em.table import EventTable
from userip_fast.em.trainer import FitResult, Trainer

__all__ = [
    "Apart",
    "Block",
    "Crowd",
    "EMState",
    "EStep",
    "EventTable",
    "FitResult",
    "GradientEStep",
    "MStep",
    "Mixture",
    "MixtureMStep",
    "PosteriorEStep",
    "Profiles",
    "Stats",
    "ThetaMStep",
    "Trainer",
]

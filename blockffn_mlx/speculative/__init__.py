"""Speculative decoding: draft trees, one target pass per round, lossless verification.

A drafter proposes a draft, which is a tree of tokens; a chain is a tree. A head is EAGLE's network,
and a draft model a second language model: each has a drafter around it.
"""

from .drafter import Drafter
from .drafters import load_draft, make_drafter, make_policy, model_drafter
from .eagle_drafter import EagleDrafter
from .engine import stream
from .lookup_drafter import LookupDrafter
from .model_drafter import ModelDrafter
from .policy import AdaptiveWidth, FixedWidth, Policy
from .stats import SpeculationStats
from .target import Target
from .tree import Tree

__all__ = [
    "AdaptiveWidth",
    "Drafter",
    "EagleDrafter",
    "FixedWidth",
    "LookupDrafter",
    "ModelDrafter",
    "Policy",
    "SpeculationStats",
    "Target",
    "Tree",
    "load_draft",
    "make_drafter",
    "make_policy",
    "model_drafter",
    "stream",
]

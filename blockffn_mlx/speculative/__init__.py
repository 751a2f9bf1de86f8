"""Speculative decoding: draft trees, one target pass per round, lossless verification."""

from .drafters import make_draft, make_policy
from .eagle_files import load_draft
from .engine import Drafter, SpeculationStats, stream
from .lookup import LookupDraft
from .model import ModelDraft
from .policy import AdaptiveWidth, FixedWidth, Policy
from .tree import Tree

__all__ = [
    "AdaptiveWidth",
    "Drafter",
    "FixedWidth",
    "LookupDraft",
    "ModelDraft",
    "Policy",
    "SpeculationStats",
    "Tree",
    "load_draft",
    "make_draft",
    "make_policy",
    "stream",
]

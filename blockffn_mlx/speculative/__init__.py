"""Speculative decoding: draft trees, one target pass per round, lossless verification."""

from .engine import Drafter, SpeculationStats, stream
from .lookup import LookupDraft
from .policy import AdaptiveWidth, FixedWidth
from .tree import Tree

__all__ = [
    "AdaptiveWidth",
    "Drafter",
    "FixedWidth",
    "LookupDraft",
    "SpeculationStats",
    "Tree",
    "stream",
]

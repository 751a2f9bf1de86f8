"""The feed-forward layer: a router over many small experts, and the ways to compute it.

`plan.py` decides which way, once per layer and length: every expert (`dense.py`), the union of the
chunk's experts in kernels or in plain operations (`union.py`), or tokens grouped by expert
(`grouped.py`).
"""

from .dense import dense_ffn
from .experts import ACTIVATIONS, ExpertLinear, QuantizedExpertLinear, weigh
from .grouped import grouped_ffn
from .layer import BlockFFN, Observer, chunk_union_ffn
from .plan import MAX_CHUNK, Plan, make_plan
from .router import Router
from .union import union_ffn

__all__ = [
    "ACTIVATIONS",
    "MAX_CHUNK",
    "BlockFFN",
    "ExpertLinear",
    "Observer",
    "Plan",
    "QuantizedExpertLinear",
    "Router",
    "chunk_union_ffn",
    "dense_ffn",
    "grouped_ffn",
    "make_plan",
    "union_ffn",
    "weigh",
]

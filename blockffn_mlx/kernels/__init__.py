"""The kernels of metal/: one module each, with its launch, its twin and its sample inputs.

Three launches make a layer: route, up and down. The up kernel finds the union of the chunk's
experts itself and leaves the list for the down kernel. For long chunks these are route, place,
grouped_up and grouped_down. docs/kernels.md tells how they work and what was measured. `KERNELS`
lists them all.
"""

from .. import device
from . import (
    attention,
    best_tree,
    down,
    draft_input,
    grouped_down,
    grouped_norm_up,
    grouped_tiles,
    grouped_up,
    grow_beams,
    linear,
    norm_up,
    normed,
    normed_gate,
    place,
    probe,
    residual_down,
    rotate,
    route,
    routed_up,
    top_tokens,
    up,
)
from .kernel import Call, Kernel, Sample, build_kernel
from .registry import KERNELS
from .samples import RandomLayer, random_layer
from .text import kernel_text
from .tiles import DTYPES, MAX_EXPERTS, MAX_THREADS, MAX_TOKENS, TILES, Sizes, Tile, covers

__all__ = [
    "DTYPES",
    "KERNELS",
    "MAX_EXPERTS",
    "MAX_THREADS",
    "MAX_TOKENS",
    "TILES",
    "Call",
    "Kernel",
    "RandomLayer",
    "Sample",
    "Sizes",
    "Tile",
    "attention",
    "available_backend",
    "best_tree",
    "build_kernel",
    "covers",
    "down",
    "draft_input",
    "grouped_down",
    "grouped_norm_up",
    "grouped_tiles",
    "grouped_up",
    "grow_beams",
    "kernel_text",
    "linear",
    "norm_up",
    "normed",
    "normed_gate",
    "place",
    "probe",
    "random_layer",
    "residual_down",
    "rotate",
    "route",
    "routed_up",
    "top_tokens",
    "up",
]


def available_backend() -> str | None:
    """The backend whose kernels layers use here, or None; classes of them may be off."""
    return device.kernel_backend()

"""Runs the Metal source that MLX generates on a CPU, and watches it. See docs/metal-host.md."""

from .build import NO_COMPILER, build, compiler
from .capture import MLX_HEADERS, PRELUDE, Launch, MetalKernel, Run, harness, launches
from .language import STANDARDS, refusals
from .lint import limits, lint
from .run import Buffer, Counters, Traffic, dispatch
from .source import MetalError, translate

__all__ = [
    "MLX_HEADERS",
    "NO_COMPILER",
    "PRELUDE",
    "STANDARDS",
    "Buffer",
    "Counters",
    "Launch",
    "MetalError",
    "MetalKernel",
    "Run",
    "Traffic",
    "build",
    "compiler",
    "dispatch",
    "harness",
    "launches",
    "limits",
    "lint",
    "refusals",
    "translate",
]

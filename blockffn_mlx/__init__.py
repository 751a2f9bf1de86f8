"""BlockFFN language models on Apple Silicon with MLX.

Everything is imported at its first use, so that a command has taken over Ctrl-C before the long
imports begin.
"""

import os
import resource
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import moved
from .version import __version__

if TYPE_CHECKING:
    from . import checkpoints as checkpoint
    from . import ffn, kernels, speculative, training
    from .analysis.compare import compare
    from .analysis.quality import text_loss
    from .analysis.reading import Document
    from .analysis.rounding import bits_by_use, rounded
    from .analysis.sparsity import router_scores, sparsity
    from .batch import batch_generate
    from .checkpoints.convert import convert
    from .checkpoints.load import load
    from .generate import generate, stream_generate
    from .models.activation import intervene
    from .models.blockffn import Model, ModelArgs

# The module of each public name that is not a module itself.
_HOMES = {
    "Document": ".analysis.reading",
    "Model": ".models.blockffn",
    "ModelArgs": ".models.blockffn",
    "batch_generate": ".batch",
    "bits_by_use": ".analysis.rounding",
    "compare": ".analysis.compare",
    "convert": ".checkpoints.convert",
    "generate": ".generate",
    "intervene": ".models.activation",
    "load": ".checkpoints.load",
    "rounded": ".analysis.rounding",
    "router_scores": ".analysis.sparsity",
    "sparsity": ".analysis.sparsity",
    "stream_generate": ".generate",
    "text_loss": ".analysis.quality",
}

# The most open files that mlx-lm wants to be allowed.
MLX_LM_FILES = 4096

__all__ = [
    "Document",
    "Model",
    "ModelArgs",
    "__version__",
    "batch_generate",
    "bits_by_use",
    "checkpoint",
    "compare",
    "convert",
    "ffn",
    "generate",
    "intervene",
    "kernels",
    "load",
    "rounded",
    "router_scores",
    "sparsity",
    "speculative",
    "stream_generate",
    "text_loss",
    "training",
]


def require_backend():
    """Makes sure that MLX can compute here.

    Raises:
        ImportError: If it cannot; the sentence says what to install.
    """
    try:
        import mlx.core  # noqa: F401
    except ImportError:
        # On Linux the bare mlx package holds no backend.
        raise ImportError(
            "blockffn-mlx: MLX has no backend here; on Linux install it with one: "
            "pip install '.[cpu]' for a CPU, or '.[cuda13]' for an NVIDIA GPU"
        ) from None


def keep_file_limit():
    """Lets mlx-lm be imported where fewer open files are allowed than it asks for."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= MLX_LM_FILES:
        return
    raise_limit = resource.setrlimit
    resource.setrlimit = lambda *limit: None
    try:
        import_module("mlx_lm.utils")
    finally:
        resource.setrlimit = raise_limit


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing a module sets it here; where a function shares its name, the function counts."""

    def __setattr__(self, name: str, value: Any):
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
moved.install()

# The commands do both once they have taken over Ctrl-C, and print the sentence themselves.
_COMMANDS = ("blockffn-", "convert.py", "-m")  # `python -m` says so until it has found its module
if not os.path.basename(sys.argv[0] if sys.argv else "").startswith(_COMMANDS):
    require_backend()
    keep_file_limit()

"""BlockFFN language models on Apple Silicon with MLX."""

from .version import __version__

try:
    import mlx.core  # noqa: F401
except ImportError:
    # On Linux the bare mlx package holds no backend: say which extra to add, not a traceback.
    raise SystemExit(
        "blockffn-mlx: MLX has no backend here; on Linux install it with one: "
        "pip install '.[cpu]' for a CPU, or '.[cuda13]' for an NVIDIA GPU"
    ) from None

from . import checkpoint, ffn, kernels, speculative, training
from .analysis.sparsity import router_scores, sparsity
from .convert import convert
from .generate import generate, stream_generate
from .load import load
from .model import Model, ModelArgs

__all__ = [
    "Model",
    "ModelArgs",
    "__version__",
    "checkpoint",
    "convert",
    "ffn",
    "generate",
    "kernels",
    "load",
    "router_scores",
    "sparsity",
    "speculative",
    "stream_generate",
    "training",
]

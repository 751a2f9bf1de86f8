"""Former names of modules, for scripts that import them: each gives what took its place."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
# Below the package. `checkpoint` is a name of the public contract and stays without a warning.
MOVED = {
    "atomic_folder": "checkpoints.atomic_folder",
    "chat_format": "prompt",
    "checkpoint": "checkpoints.reader",
    "conversation": "chat.conversation",
    "convert": "checkpoints.convert",
    "convert_draft": "checkpoints.convert_head",
    "doctor": "analysis.doctor",
    "experts": "ffn.experts",
    "hub": "checkpoints.hub",
    "kernel_text": "kernels.text",
    "layouts": "checkpoints.canonical",
    "load": "checkpoints.load",
    "memory": "analysis.footprint",
    "model_cache": "checkpoints.cache",
    "predict": "kernels.predict",
    "prefill": "ffn.grouped",
    "shards": "checkpoints.shards",
    "sparsity": "analysis.sparsity",
    "tensor_info": "checkpoints.tensor_info",
    "token_history": "chat.history",
    "tokenizer": "checkpoints.tokenizer",
    "torch_file": "checkpoints.torch_file",
    "transcript": "chat.transcript",
}


class FormerNames(MetaPathFinder, Loader):
    """Finds a former name once nothing else does, and puts the new module in its place."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, self) if package == PACKAGE and module in MOVED else None

    def exec_module(self, module: ModuleType):
        former = module.__name__.rpartition(".")[2]
        new = f"{PACKAGE}.{MOVED[former]}"
        if former != "checkpoint":
            text = f"{module.__name__} has moved to {new}"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)  # which is what importlib then hands out


def install():
    """Makes the former names importable, behind every other way to find a module."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())

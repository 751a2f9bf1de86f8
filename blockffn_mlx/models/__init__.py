"""The networks, one file an architecture, and what can be watched while they run."""

from importlib import import_module
from typing import Any

# By the `ffn_type` of a converted folder's config.json; anything else is a BlockFFN.
ARCHITECTURES = {"deco": "blockffn_mlx.models.deco"}


def find_architecture(config: dict[str, Any]) -> tuple[Any, Any]:
    """(Model, ModelArgs) of a converted folder's config.json."""
    module = import_module(ARCHITECTURES.get(config.get("ffn_type", ""), f"{__name__}.blockffn"))
    return module.Model, module.ModelArgs


def home(config: dict[str, Any]) -> str:
    """The module that a folder's model_file imports; BlockFFN's keeps the name it always had."""
    return ARCHITECTURES.get(config.get("ffn_type", ""), "blockffn_mlx.model")

"""The model that comes with the package, and a folder with a copy of it."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arrays import load_arrays
from ..paths import expand
from ..quantisation import packed_settings
from .atomic_folder import CARD_SIGN, MARK
from .folder import ShardWriter, write_folder
from .reader import read_json

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"  # converted
REST = ("NOTICE", "tokenizer.json", "tokenizer_config.json")
CARD = f"""---
library_name: mlx
pipeline_tag: text-generation
tags: [mlx, blockffn]
license: apache-2.0
---
# The demo of blockffn-mlx

{CARD_SIGN}: 19 million parameters that tell short stories. `draft` holds its
draft head; NOTICE says what it was trained on. It runs under stock mlx-lm while blockffn-mlx is
installed:

    mlx_lm.chat --trust-remote-code --model THIS_FOLDER
"""


def model_folder(path: str | Path) -> Path:
    """The folder that a local model's name stands for: the demo's own, or the path."""
    return DEMO_FOLDER if path == DEMO else expand(path)


def require_demo():
    """Makes sure that the demo is there.

    Raises:
        FileNotFoundError: If the installation left it out.
    """
    if not (DEMO_FOLDER / "config.json").exists():
        raise FileNotFoundError("no demo model came with this installation: name another model.")


def copy_demo(
    target: Path, dtype: str | None, overwrite: bool
) -> tuple[ShardWriter, dict[str, Any]]:
    """Writes the demo with its draft head into a folder of its own.

    Args:
        target: The folder.
        dtype: The type that the weights are unpacked to; None leaves them packed.
        overwrite: Whether an earlier folder of this package's may be replaced.

    Returns:
        What was noticed of the weights, and the rest of a conversion's report: layout, parameters
        and quantization.

    Raises:
        ValueError: If the target may not be replaced.
        OSError: If the demo is missing, or the disk is full.
    """
    require_demo()
    config = read_json(DEMO_FOLDER / "config.json")
    arrays = load_arrays(DEMO_FOLDER / "model.safetensors")
    quantization = config.pop("quantization")
    del config["quantization_config"]
    origin = {"source": DEMO, "layout": config.pop(MARK)["layout"]}
    if dtype is not None:
        arrays, quantization = unpacked(arrays, quantization, getattr(mx, dtype)), None
    index = read_json(DEMO_FOLDER / "model.safetensors.index.json")
    parameters = index["metadata"]["total_parameters"]

    def copy_rest(folder: Path):
        for name in (*REST, "draft"):
            copy = shutil.copytree if (DEMO_FOLDER / name).is_dir() else shutil.copyfile
            copy(DEMO_FOLDER / name, folder / name)

    shards = write_folder(
        target,
        [arrays],
        config,
        origin=origin,
        parameters=parameters,
        quantization=quantization,
        save_tokenizer=copy_rest,
        card=CARD,
        overwrite=overwrite,
    )
    return shards, origin | {"parameters": parameters, "quantization": quantization}


def unpacked(
    arrays: dict[str, mx.array], quantization: dict[str, Any], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Packed weights, unpacked to a type, and the others cast to it."""
    common, own = packed_settings(quantization)
    plain = {}
    for name, array in arrays.items():
        path, _, kind = name.rpartition(".")
        scales = arrays.get(f"{path}.scales")
        if scales is not None and kind == "weight":
            settings = own.get(path, common._asdict())
            scales, biases = scales.astype(dtype), arrays[f"{path}.biases"].astype(dtype)
            array = mx.dequantize(array, scales, biases, **settings)
        if kind not in ("scales", "biases"):
            plain[name] = array.astype(dtype)
    return plain

"""Peak memory of a conversion, on a synthetic checkpoint of BlockFFN-XLarge's shapes (3.3 GB).

The bound is 1.5 GB plus a third of the checkpoint's size. Run: python bench/convert_memory.py
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from blockffn_mlx.checkpoints.canonical import published_shapes  # noqa: E402
from blockffn_mlx.models.blockffn import ModelArgs  # noqa: E402
from helpers.torch_files import save_bin  # noqa: E402

XLARGE = {
    "vocab_size": 122753,
    "hidden_size": 1792,
    "num_hidden_layers": 35,
    "attention_type": "mla",
    "num_attention_heads": 14,
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "ffn_type": "block_linear",
    "expert_size": 128,
    "num_experts": 56,
    "norm_after_router": "rms",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}


def build(folder: Path):
    """Writes the checkpoint as the published ones are: one .bin, 2-D experts, bfloat16."""
    folder.mkdir()
    tensors = {}
    for name, shape in published_shapes(ModelArgs.from_dict(XLARGE)).items():
        if len(shape) == 3:
            name = name.removesuffix(".weight")
            num_experts, rows, columns = shape
            up = name.endswith("up_proj")
            shape = (num_experts * rows, columns) if up else (rows, num_experts * columns)
        # A constant costs no time to make, and conversion does not look at values.
        tensors[name] = mx.full(shape, 0.01, mx.bfloat16)
    save_bin(folder / "pytorch_model.bin", tensors)
    (folder / "config.json").write_text(json.dumps(XLARGE))


def measure(source: Path, target: Path, flags: list[str]) -> dict[str, float]:
    """Converts in a process of its own, which the system's accounting then describes."""
    command = [sys.executable, "-c", "from blockffn_mlx.cli.convert import main; exit(main())"]
    command += ["--hf-path", str(source), "--mlx-path", str(target), "--json", *flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit("the conversion failed")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes here
    return {
        "peak_gb": usage.ru_maxrss * unit / 1e9,
        "seconds": time.perf_counter() - start,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--build", type=Path, help="only write the checkpoint, into this folder")
    args = parser.parse_args()
    if args.build:
        return build(args.build)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        # Linux counts the parent's memory at a fork to the child's peak: build in another process.
        subprocess.run([sys.executable, __file__, "--build", str(source)], check=True)
        size = (source / "pytorch_model.bin").stat().st_size / 1e9
        bound = 1.5 + size / 3
        result = {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "method": "ru_maxrss of the converting process, one run each",
            "checkpoint_gb": size,
            "bound_gb": bound,
        }
        for name, flags in (("bfloat16", []), ("4-bit", ["-q"])):
            result[name] = measure(source, Path(folder) / name, flags)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(max(result[name]["peak_gb"] for name in ("bfloat16", "4-bit")) > bound)


if __name__ == "__main__":
    main()

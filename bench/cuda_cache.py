"""Compiles here what a script would compile on an NVIDIA GPU, where every second counts.

MLX looks for a kernel's machine code in MLX_PTX_CACHE_DIR, by the name and the hash of its text,
before it compiles the text. This runs a script on a CPU with every kernel of this package recorded
instead of launched (its outputs are zeros), compiles the recorded texts with NVRTC, and leaves them
under those names. No GPU is needed; whatever the script prints meanwhile means nothing.

usage: python bench/cuda_cache.py FOLDER --nvrtc LIBNVRTC --include DIR:... SCRIPT [ARGUMENTS]
DIR are MLX's own device headers' root and CUDA's. Then, with the same XDG_CACHE_HOME, since texts
name their headers by path: MLX_PTX_CACHE_DIR=FOLDER python SCRIPT.
"""

import argparse
import runpy
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from nvrtc import compile_named

from blockffn_mlx import device
from blockffn_mlx.kernels import kernel as kernel_module
from blockffn_mlx.kernels import probe
from blockffn_mlx.kernels.text import filed, kernel_text

HEADER = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
CUDA_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
NAME_TYPES = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}


def short(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def cuda_type(dtype: mx.Dtype) -> str:
    name = short(dtype)
    return CUDA_TYPES.get(name, "bool" if name.startswith("bool") else f"{name}_t")


def mlx_source(text, name: str, inputs: list, dtypes: list, template: list) -> tuple[str, str]:
    """Name and text of a kernel as MLX 0.32 puts them together: the hash is over every byte."""
    full = f"custom_kernel_{name}"
    constants = ""
    for key, value in template:
        if isinstance(value, bool):
            full += "_t" if value else "_f"
            constants += f"  constexpr bool {key} = {str(value).lower()};\n"
        elif isinstance(value, int):
            full += f"_{value}"
            constants += f"  constexpr int {key} = {value};\n"
        else:
            full += f"_{NAME_TYPES.get(short(value), short(value) + '_t')}"
            constants += f"  using {key} = {cuda_type(value)};\n"
    parameters = ""
    for key, array in zip(text.input_names, inputs, strict=True):
        parameters += f"    const {cuda_type(array.dtype)}* {key},\n"
        if array.ndim:
            for suffix, kind in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
                if f"{key}_{suffix}" in text.source:
                    parameters += f"    const __grid_constant__ {kind} {key}_{suffix},\n"
    outputs = zip(text.output_names, dtypes, strict=True)
    parameters += ",\n".join(f"    {cuda_type(dtype)}* {key}" for key, dtype in outputs)
    return full, (
        f"{HEADER}{text.header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {full}(\n{parameters}) {{\n{constants}{constants and chr(10)}"
        f"{text.source}\n}}\n\n}} // namespace mlx::core::cu\n"
    )


def string_hash(data: bytes) -> int:
    """std::hash of a string in libstdc++ (MurmurHash64A)."""
    mask, mul = (1 << 64) - 1, 0xC6A4A7935BD1E995
    value = 0xC70F6907 ^ (len(data) * mul & mask)
    whole = len(data) & ~7
    for i in range(0, whole, 8):
        part = int.from_bytes(data[i : i + 8], "little") * mul & mask
        part = (part ^ part >> 47) * mul & mask
        value = (value ^ part) * mul & mask
    if len(data) > whole:
        value = (value ^ int.from_bytes(data[whole:], "little")) * mul & mask
    value = (value ^ value >> 47) * mul & mask
    return value ^ value >> 47


def record(texts: dict[str, tuple[str, str]]) -> None:
    """From now on kernels are noted in `texts` by module name, and give zeros."""

    def build(kernel: Any, backend: str, packed: bool = False, memory: int = 0) -> Any:
        name = f"blockffn_{kernel.name}{'_affine' if packed else ''}"
        text = filed(kernel_text(kernel, "cuda", packed))

        def launch(*, inputs, template, output_shapes, output_dtypes, **_):
            full, source = mlx_source(text, name, inputs, output_dtypes, template)
            texts[f"{full}_{string_hash(source.encode()):x}"] = (f"mlx::core::cu::{full}", source)
            zeros = [mx.zeros(*o) for o in zip(output_shapes, output_dtypes, strict=True)]
            return mx.depends(zeros, inputs)  # so that the graph is the real one

        return launch

    def verdict(tile_class: probe.TileClass) -> bool:
        if tile_class not in seen:
            seen.add(tile_class)
            probe.find_fault(tile_class)
        return True

    seen: set[probe.TileClass] = set()
    kernel_module.build_kernel = build
    probe.verdict = verdict
    for function in ("gpu_backend", "compute_backend", "kernel_backend"):
        setattr(device, function, lambda: "cuda")


def compile_to(
    entry: tuple[str, tuple[str, str]], folder: Path, library: str, include: list[str]
) -> str:
    module, (name, source) = entry
    cubin, mangled, log = compile_named(source, name, library, include)
    (folder / f"{module}.txt").write_text(f"{name}\t{mangled}\n")
    (folder / f"{module}.ptx").write_bytes(cubin)
    spills = [line for line in log.splitlines() if "spill" in line and " 0 bytes spill" not in line]
    return f"{module} {len(cubin)} {' '.join(spills)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nvrtc", required=True)
    parser.add_argument("--include", required=True)
    parser.add_argument("--seconds", type=int, default=0, help="end the script after so many")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    texts: dict[str, tuple[str, str]] = {}
    record(texts)
    sys.path.insert(0, str(args.script.resolve().parent))
    sys.argv = [str(args.script), *args.arguments]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(args.seconds)
    try:
        runpy.run_path(str(args.script), run_name="__main__")
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # what it launched counts
        print(f"{args.script} ended: {error!r}", file=sys.stderr)
    signal.alarm(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    missing = [e for e in texts.items() if not (args.folder / f"{e[0]}.ptx").exists()]
    print(f"{len(texts)} kernels recorded, {len(missing)} to compile", file=sys.stderr)
    work = partial(
        compile_to, folder=args.folder, library=args.nvrtc, include=args.include.split(":")
    )
    with ProcessPoolExecutor() as pool:
        for line in pool.map(work, missing):
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

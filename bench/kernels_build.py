"""Compiles the kernels' variants for the H100 to cubins, with a manifest. Needs no GPU.

usage: python bench/kernels_build.py FOLDER --library libnvrtc.so.13 --include CUDA_HEADERS
"""

import argparse
import ctypes
import hashlib
import json
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from kernels_cells import GROUPS, variants

from blockffn_mlx import kernel_text, kernels

PRELUDE = """
typedef unsigned int uint32_t;
struct Shape { int sizes[10]; int operator[](int i) const { return sizes[i]; } };
"""


def cuda_source(name: str, bits: int | None, template: dict[str, int | bool]) -> str:
    """The text that MLX would make of a projection for bfloat16, without MLX's own headers."""
    text = kernel_text.kernel_text(name, "cuda", bits is not None)
    parameters = []
    for array in text.input_names:
        packed = array == "active" or bits and array == "weight"
        kind = "uint32_t" if packed else "__nv_bfloat16"
        parameters.append(f"const {kind}* {array}")
        if f"{array}_shape" in text.source:
            parameters.append(f"const __grid_constant__ Shape {array}_shape")
    for array in text.output_names:
        parameters.append(f"{'uint32_t' if array == 'active' else '__nv_bfloat16'}* {array}")
    values = "".join(
        f"  constexpr {type(value).__name__} {key} = {str(value).lower()};\n"
        for key, value in template.items()
    )
    return (
        f"{PRELUDE}{text.header}"
        f'extern "C" __global__ void projection({", ".join(parameters)}) {{\n'
        f"  using T = __nv_bfloat16;\n{values}{text.source}}}\n"
    )


def compile_cubin(source: str, library: str, include: str) -> tuple[bytes, str]:
    """Cubin and log of `source`, compiled as MLX does.

    Raises:
        ValueError: With the compiler's log.
    """
    nvrtc = ctypes.CDLL(library)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    flags = [
        b"--device-as-default-execution-space",
        b"--gpu-architecture=sm_90a",
        b"--ptxas-options=-v",
        f"--include-path={include}".encode(),
    ]
    status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    if status:
        raise ValueError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log.value.decode()


def build(variant: dict, folder: Path, library: str, include: str) -> dict:
    """Compiles one variant, unless the folder has it, and returns its manifest entry."""
    tile = variant["tile"]
    template = {
        **{key.upper(): value for key, value in kernels.Tile(*tile)._asdict().items()},
        "EXPERTS": variant["experts"],
        "HIDDEN": variant["hidden_size"],
        "EXPERT_SIZE": variant["expert_size"],
    }
    bits = variant["bits"]
    width = variant["hidden_size"] if variant["name"] == "up" else variant["expert_size"]
    if variant["name"] == "up":
        template["SILU"] = True
    if bits:
        template |= {"BITS": bits, "GROUP_SIZE": min(64, width)}
    source = cuda_source(variant["name"], bits, template)
    key = hashlib.sha1(source.encode()).hexdigest()[:16]
    path, log_path = folder / f"{key}.cubin", folder / f"{key}.log"
    if not path.exists():
        cubin, log = compile_cubin(source, library, include)
        log_path.write_text(log)
        path.write_bytes(cubin)
    log = log_path.read_text()
    return {
        **variant,
        "cubin": path.name,
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spills": int(re.search(r"(\d+) bytes spill stores", log)[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--library", default="libnvrtc.so")
    parser.add_argument("--include", default="/usr/local/cuda/include")
    parser.add_argument("--groups", nargs="*", default=list(GROUPS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    work = partial(build, folder=args.folder, library=args.library, include=args.include)
    with ProcessPoolExecutor() as pool:
        manifest = list(pool.map(work, variants(args.groups)))
    used = {entry["cubin"] for entry in manifest}
    for path in args.folder.glob("*.cubin"):
        if path.name not in used:
            path.unlink()
            path.with_suffix(".log").unlink()
    (args.folder / "manifest.json").write_text(json.dumps(manifest))
    size = sum(path.stat().st_size for path in args.folder.glob("*.cubin")) >> 10
    print(f"{len(manifest)} variants, {size} KiB; spilling:")
    for entry in manifest:
        if entry["spills"]:
            print(entry["name"], entry["bits"], entry["tile"], entry["registers"], entry["spills"])


if __name__ == "__main__":
    main()

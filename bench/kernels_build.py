"""Writes the CUDA text of the kernels' variants, with a manifest, for kernels_h100.py. Needs MLX.

usage: python bench/kernels_build.py FOLDER
"""

import argparse
import hashlib
import json
from pathlib import Path

from kernels_cells import GROUPS, variants

from blockffn_mlx.kernels import KERNELS, Tile, kernel_text

PRELUDE = """
typedef unsigned int uint32_t;
struct Shape { int sizes[10]; int operator[](int i) const { return sizes[i]; } };
"""


def cuda_source(
    name: str,
    bits: int | None,
    template: dict[str, int | bool],
    wide: tuple[str, ...] = (),
    staged: bool = False,
) -> str:
    """The text that MLX would make of a projection for bfloat16, without MLX's own headers.

    Inputs named in `wide` are float32.
    """
    text = kernel_text(KERNELS[name], "cuda", bits is not None, staged)
    parameters = []
    for array in text.input_names:
        packed = array == "active" or bits and array == "weight"
        kind = "uint32_t" if packed else "float" if array in wide else "__nv_bfloat16"
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


def write_source(variant: dict, folder: Path) -> dict:
    """Writes the text of a variant and returns its manifest entry."""
    template = {
        **{key.upper(): value for key, value in Tile(*variant["tile"])._asdict().items()},
        "EXPERTS": variant["experts"],
        "HIDDEN": variant["hidden_size"],
        "EXPERT_SIZE": variant["expert_size"],
    }
    if variant["name"] == "up":
        template["SILU"] = True
    if variant["bits"]:
        template |= {"BITS": variant["bits"], "GROUP_SIZE": 64}
    source = cuda_source(variant["name"], variant["bits"], template)
    path = folder / f"{hashlib.sha1(source.encode()).hexdigest()[:16]}.cu"
    path.write_text(source)
    return {**variant, "file": path.stem}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    manifest = [write_source(variant, args.folder) for variant in variants(args.groups)]
    (args.folder / "manifest.json").write_text(json.dumps(manifest))
    print(f"{len(manifest)} variants")


if __name__ == "__main__":
    main()

"""Times DECO's kernels at the 1.2B's shapes: replays of a CUDA graph over layers, weights cold.

usage: python bench/deco_h100.py FOLDER [--out FILE.json] [--bits 0 8 4] [--library L --include I]

FOLDER gets the compiled kernels. Needs MLX for their text, PyTorch for memory, graphs and cuBLAS.
Each token uses 20% of the 102 experts; the chunk uses 20%, 50% or (tokens drawn apart) nearly all
of them. Every cell is checked first against float64. "products" are the two dense products alone,
"dense" has what lies between them in PyTorch's operations, unfused.
"""

import argparse
import glob
import json
from pathlib import Path

import nvrtc
import torch
from kernels_build import cuda_source
from kernels_cells import Group
from kernels_h100 import BANDWIDTH, Kernel, Layers, replay_time

from blockffn_mlx.kernels import TILES

EXPERTS, WIDTH, HIDDEN, LAYERS = 102, 64, 1792, 31
TOKENS, SHARES = (8, 32, 1), (0.2, 0.5, 1.0)
WIDE = ("logits", "scale", "norm", "eps", "factor")


class DecoLayers(Layers):
    """Layers with scores of their own kind."""

    def __init__(self, bits: int | None):
        super().__init__(Group(HIDDEN, WIDTH, EXPERTS, LAYERS, bits, TOKENS, ()))
        self.scale = torch.full((EXPERTS,), 0.1, device="cuda")
        self.norm = 1 + 0.1 * torch.randn(WIDTH, device="cuda")
        self.eps, self.one = (torch.tensor([v], device="cuda") for v in (1e-5, 1.0))

    def set_chunk(self, tokens: int, share: float):
        """Random inputs; a token uses a fifth of all experts, out of `share` of them."""
        self.tokens, bf16 = tokens, torch.bfloat16
        pool, used = round(share * EXPERTS), round(0.2 * EXPERTS)
        self.x = [torch.randn(tokens, HIDDEN, device="cuda").to(bf16) for _ in range(LAYERS)]
        self.logits = []
        for _ in range(LAYERS):
            experts = torch.randperm(EXPERTS, device="cuda")[:pool]
            logits = -torch.rand(tokens, EXPERTS + 1, device="cuda")
            for token in range(tokens):
                own = experts[torch.randperm(pool, device="cuda")[:used]]
                logits[token, own] = 10 * torch.rand(used, device="cuda") + 1
            logits[:, -1] = 0.1
            self.logits.append(logits)
        self.h = torch.empty(EXPERTS, tokens, WIDTH, device="cuda", dtype=bf16)
        self.active = torch.empty(1 + EXPERTS, device="cuda", dtype=torch.int32)
        self.y = torch.empty(tokens, HIDDEN, device="cuda", dtype=bf16)
        self.shared = torch.randn(tokens, HIDDEN, device="cuda").to(bf16)
        used = [int((logits[:, :-1] > 0).any(0).sum()) for logits in self.logits]
        self.union = sum(used) / LAYERS

    def scores(self, layer: int) -> torch.Tensor:
        return (self.logits[layer][:, :-1].relu() * self.scale).bfloat16()

    def run(self, up: Kernel, down: Kernel, layer: int):
        x, weights = self.x[layer], self.weights[layer]
        inputs = (self.logits[layer], self.scale, self.norm, self.eps)
        up(x, list(x.shape), *inputs, *weights["up"], self.h, self.active)
        added = (self.shared, self.one)
        down(self.h, list(self.h.shape), self.active, *added, *weights["down"], self.y)

    def between(self, z: torch.Tensor, layer: int) -> torch.Tensor:
        """From the up products [T, E, d] to what the down product takes."""
        z = z.float() - self.logits[layer][:, -1:, None]
        z = z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.norm
        return torch.nn.functional.silu(z) * self.scores(layer)[..., None]

    def run_dense(self, layer: int, whole: bool = True):
        up, down = (self.weights[layer][name][0] for name in ("up", "down"))
        z = torch.nn.functional.linear(self.x[layer], up.view(-1, HIDDEN))
        if whole:
            z = self.between(z.view(self.tokens, EXPERTS, WIDTH), layer)
            z = z.bfloat16().view(self.tokens, -1)
        out = torch.nn.functional.linear(z, down.view(HIDDEN, -1))
        if whole:
            out + self.shared

    def error(self, up: Kernel, down: Kernel) -> float:
        """Against the formula in float64, from poisoned scratch."""
        for scratch, value in ((self.h, torch.nan), (self.active, -1), (self.y, torch.nan)):
            scratch.fill_(value)
        self.run(up, down, 0)
        every = torch.arange(EXPERTS, device="cuda")
        weights = [self.plain(0, name, every) for name in ("up", "down")]
        z = torch.einsum("th,edh->ted", self.x[0].double(), weights[0])
        z = z - self.logits[0][:, -1:, None]
        z = z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.norm.double()
        h = torch.nn.functional.silu(z) * self.scores(0)[..., None].double()
        expected = torch.einsum("ted,ehd->th", h, weights[1]) + self.shared.double()
        return float((self.y.double() - expected).norm() / expected.norm())


def measure(layers: DecoLayers, up: Kernel, down: Kernel) -> dict:
    """Error and microseconds a layer for the chunk that is set."""
    total = sum(array.nbytes for arrays in layers.weights[0].values() for array in arrays)
    row = {
        "bits": layers.group.bits or 16,
        "tokens": layers.tokens,
        "union": layers.union,
        "error": layers.error(up, down),
        "floor": total * layers.union / EXPERTS / BANDWIDTH * 1e6,
        "kernels": replay_time(lambda i: layers.run(up, down, i), LAYERS),
    }
    if layers.group.bits is None:
        row["dense"] = replay_time(layers.run_dense, LAYERS)
        row["products"] = replay_time(lambda i: layers.run_dense(i, False), LAYERS)
    return row


def build(name: str, tile, bits: int | None, folder: Path, library: str, include: str) -> Kernel:
    """A kernel, compiled unless it was before."""
    template = {key.upper(): value for key, value in tile._asdict().items()}
    template |= {"EXPERTS": EXPERTS, "HIDDEN": HIDDEN, "EXPERT_SIZE": WIDTH}
    template |= {"BITS": bits, "GROUP_SIZE": 64} if bits else {}
    path = folder / f"{name}-{tile.tokens}-{bits}.cu"
    path.write_text(cuda_source(name, bits, template, WIDE))
    nvrtc.compile_file(path, library, include)
    shape = {"hidden_size": HIDDEN, "expert_size": WIDTH, "experts": EXPERTS}
    kernel = Kernel({"name": name, "file": path.stem, "tile": list(tile), **shape}, folder)
    if name == "norm_up":
        kernel.groups = EXPERTS
    return kernel


def found(pattern: str, default: str) -> str:
    """A file of an installed CUDA package."""
    try:
        import nvidia

        paths = [p for root in nvidia.__path__ for p in glob.glob(f"{root}/{pattern}")]
    except ImportError:
        paths = []
    return sorted(paths)[-1] if paths else default


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bits", nargs="*", type=int, default=[0, 8, 4])
    parser.add_argument("--library", default=found("*/lib/libnvrtc.so*", "libnvrtc.so.13"))
    headers = str(Path(found("*/include/cuda_bf16.h", "/usr/local/cuda/include/.")).parent)
    parser.add_argument("--include", default=headers)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.zeros(1, device="cuda")  # makes the context that the driver calls rely on
    print(torch.cuda.get_device_name(), "torch", torch.__version__, args.library, flush=True)
    rows = []
    for bits in (b or None for b in args.bits):
        layers = DecoLayers(bits)
        for tokens in TOKENS:
            table = TILES[f"cuda {bits} bits" if bits else "cuda"]
            tiles = next(t for t in table if tokens <= t.up.tokens)
            up, down = (
                build(name, tile, bits, args.folder, args.library, args.include)
                for name, tile in (("norm_up", tiles.up), ("residual_down", tiles.down))
            )
            for share in SHARES:
                layers.set_chunk(tokens, share)
                rows.append(measure(layers, up, down))
                print(json.dumps(rows[-1]), flush=True)
                if args.out:  # as it goes, for whoever is cut off
                    args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

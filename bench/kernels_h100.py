"""Times the compiled kernels: replays of a CUDA graph over different layers, weights cold.

usage: python bench/kernels_h100.py FOLDER [--out FILE.json]   (FOLDER from kernels_build.py)

Needs PyTorch, for memory, graphs and cuBLAS. Every variant is checked first, on fresh random
inputs with poisoned scratch, against a float64 product over the active experts.
"""

import argparse
import ctypes
import json
import statistics
from pathlib import Path

import nvrtc
import torch
from kernels_cells import GROUPS, MAX_GROUPS, bucket

BANDWIDTH = 3.0e12  # bytes a second, the device-to-device copy rate seen on this card
driver = ctypes.CDLL("libcuda.so.1")


class Kernel:
    """A compiled projection and how it is launched."""

    def __init__(self, entry: dict, folder: Path, max_groups: int | None = None):
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        image = (folder / entry["file"]).with_suffix(".cubin").read_bytes()
        check(driver.cuModuleLoadData(ctypes.byref(module), image))
        check(driver.cuModuleGetFunction(ctypes.byref(function), module, b"projection"))
        self.entry, self.function = entry, function
        rows = 8 * entry["tile"][2]
        self.threads = 32 * entry["tile"][3]
        outputs = entry["hidden_size"]
        if entry["name"] == "up":
            outputs = entry["experts"] * entry["expert_size"]
        self.groups = min(outputs // rows, max_groups or outputs)

    def __call__(self, *arguments) -> None:
        values = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                values.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                values.append((ctypes.c_int * 10)(*argument))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        check(
            driver.cuLaunchKernel(
                self.function, self.groups, 1, 1, self.threads, 1, 1, 0, stream, pointers, None
            )
        )


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA driver error {status}")


class Layers:
    """Weights of the layers of one group, and the inputs of one cell."""

    def __init__(self, group):
        self.group = group
        shapes = {
            "up": (group.experts, group.expert_size, group.hidden_size),
            "down": (group.experts, group.hidden_size, group.expert_size),
        }
        self.weights = [
            {name: self.random_weights(shape) for name, shape in shapes.items()}
            for _ in range(group.layers)
        ]

    def random_weights(self, shape: tuple[int, int, int]) -> list[torch.Tensor]:
        scale = shape[-1] ** -0.5
        if self.group.bits is None:
            return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(scale)]
        packed = (*shape[:2], shape[2] * self.group.bits // 32)
        groups = (*shape[:2], shape[2] // 64)
        weight = torch.randint(-(2**31), 2**31, packed, device="cuda", dtype=torch.int32)
        step = scale * 3.4 / 2**self.group.bits
        scales = (1 + torch.rand(groups, device="cuda")) * step
        biases = -scales * 2 ** (self.group.bits - 1)
        return [weight, scales.bfloat16(), biases.bfloat16()]

    def plain(self, layer: int, name: str, experts: torch.Tensor) -> torch.Tensor:
        """Weights of some experts in float64, dequantised as MLX does."""
        weight, *rest = (array[experts] for array in self.weights[layer][name])
        if not rest:
            return weight.double()
        bits = self.group.bits
        shifts = torch.arange(0, 32, bits, device="cuda", dtype=torch.int32)
        values = (weight[..., None] >> shifts & 2**bits - 1).flatten(2).float()
        scales, biases = (array.float().repeat_interleave(64, dim=2) for array in rest)
        return (values * scales + biases).bfloat16().double()

    def set_cell(self, tokens: int, union: int) -> None:
        group = self.group
        self.tokens, self.union = tokens, union
        self.x, self.scores = [], []
        for _ in range(group.layers):
            self.x.append(
                torch.randn(tokens, group.hidden_size, device="cuda", dtype=torch.bfloat16)
            )
            chosen = torch.randperm(group.experts, device="cuda")[:union]
            used = torch.rand(tokens, union, device="cuda") < 0.4
            one_token = torch.randint(tokens, (union,), device="cuda")
            used[one_token, torch.arange(union, device="cuda")] = True
            scores = torch.zeros(tokens, group.experts, device="cuda", dtype=torch.bfloat16)
            values = torch.rand(tokens, union, device="cuda") + 0.5
            scores[:, chosen] = (used * values).bfloat16()
            self.scores.append(scores)
        self.h = torch.empty(
            group.experts, tokens, group.expert_size, device="cuda", dtype=torch.bfloat16
        )
        self.active = torch.empty(1 + group.experts, device="cuda", dtype=torch.int32)
        self.y = torch.empty(tokens, group.hidden_size, device="cuda", dtype=torch.bfloat16)
        self.reference = self.compute_reference(0)

    def compute_reference(self, layer: int) -> torch.Tensor:
        experts = self.scores[layer].ne(0).any(0).nonzero().flatten()
        z = torch.einsum("th,edh->ted", self.x[layer].double(), self.plain(layer, "up", experts))
        scores = self.scores[layer][:, experts, None].double()
        h = torch.where(scores != 0, torch.nn.functional.silu(z) * scores, 0.0)
        return torch.einsum("ted,ehd->th", h, self.plain(layer, "down", experts))

    def run(self, up: Kernel | None, down: Kernel | None, layer: int) -> None:
        weights, scores = self.weights[layer], self.scores[layer]
        if up:
            shape = list(self.x[layer].shape)
            up(self.x[layer], shape, scores, *weights["up"], self.h, self.active)
        if down:
            down(self.h, list(self.h.shape), self.active, *weights["down"], self.y)

    def run_dense(self, layer: int) -> None:
        group = self.group
        up, down = (self.weights[layer][name][0] for name in ("up", "down"))
        h = torch.nn.functional.linear(self.x[layer], up.view(-1, group.hidden_size))
        h = torch.nn.functional.silu(h).view(self.tokens, group.experts, group.expert_size)
        h = (h * self.scores[layer][..., None]).view(self.tokens, -1)
        torch.nn.functional.linear(h, down.view(group.hidden_size, -1))

    def error(self, up: Kernel, down: Kernel) -> float:
        self.h.fill_(torch.nan)
        self.active.fill_(-1)
        self.y.fill_(torch.nan)
        self.run(up, down, 0)
        return float((self.y.double() - self.reference).norm() / self.reference.norm())

    def floor(self) -> float:
        """Microseconds to read the union's weights once."""
        total = sum(array.nbytes for arrays in self.weights[0].values() for array in arrays)
        return total * self.union / self.group.experts / BANDWIDTH * 1e6


def replay_time(work, layers: int, replays: int = 9) -> float:
    """Median microseconds a layer of `work(layer)`, captured over all layers in one graph."""
    work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            work(layer)
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times[2:])


def best_pair(layers: Layers, ups: list[Kernel], downs: list[Kernel]) -> tuple[dict, list[dict]]:
    """Takes turns at the two projections, two rounds; returns the best pair and all timings."""
    count, rows, seen = layers.group.layers, [], {}
    up, down = ups[0], downs[0]

    def time(up: Kernel, down: Kernel) -> float:
        key = (id(up), id(down))
        if key not in seen:
            error = layers.error(up, down)
            seen[key] = replay_time(lambda layer: layers.run(up, down, layer), count)
            if not error < 1e-2:
                seen[key] = float("inf")
            row = {side.entry["name"]: side.entry["tile"] for side in (up, down)}
            row |= {"groups": up.groups, "time": seen[key], "error": error}
            rows.append(row)
        return seen[key]

    for _ in range(2):
        up = min(ups, key=lambda candidate: time(candidate, down))
        down = min(downs, key=lambda candidate: time(up, candidate))
    scores, layers.scores = layers.scores, [torch.zeros_like(s) for s in layers.scores]
    empty = replay_time(lambda layer: layers.run(up, down, layer), count)
    layers.scores = scores
    best = {
        "up": up.entry["tile"],
        "down": down.entry["tile"],
        "groups": up.groups,
        "time": time(up, down),
        "again": replay_time(lambda layer: layers.run(up, down, layer), count, 25),
        "up_alone": replay_time(lambda layer: layers.run(up, None, layer), count),
        "down_alone": replay_time(lambda layer: layers.run(None, down, layer), count),
        "empty_union": empty,
        "error": layers.error(up, down),
    }
    return best, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--library", default="libnvrtc.so.13")
    parser.add_argument("--include", default="/usr/local/cuda/include")
    parser.add_argument("--groups", nargs="*")
    parser.add_argument("--tokens", nargs="*", type=int)
    args = parser.parse_args()
    manifest = json.loads((args.folder / "manifest.json").read_text())
    nvrtc.compile_folder(args.folder, args.library, args.include)
    torch.zeros(1, device="cuda")  # makes the context that the driver calls rely on
    kernels = []
    for entry in manifest:
        entry["registers"], entry["spills"] = nvrtc.registers(args.folder / entry["file"])
        if entry["registers"] * 32 * entry["tile"][3] <= 65536:
            group_limits = MAX_GROUPS if entry["name"] == "up" else [None]
            kernels += [Kernel(entry, args.folder, most) for most in group_limits]
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(
        f"{'layer':20} {'T':>3} {'union':>5} {'floor':>7} {'kernels':>8} {'dense':>8} "
        f"{'up':>7} {'down':>7} {'empty':>7}  error   up tile / down tile / groups"
    )
    results = []
    for name in args.groups or dict.fromkeys(entry["group"] for entry in manifest):
        layers = Layers(GROUPS[name])
        for tokens in args.tokens or layers.group.tokens:
            mine = [
                k
                for k in kernels
                if k.entry["group"] == name and k.entry["tile"][0] == bucket(tokens)
            ]
            ups, downs = ([k for k in mine if k.entry["name"] == side] for side in ("up", "down"))
            dense = float("nan")
            for union in layers.group.unions:
                layers.set_cell(tokens, union)
                if layers.group.bits is None and dense != dense:
                    dense = replay_time(layers.run_dense, layers.group.layers)
                best, rows = best_pair(layers, ups, downs)
                results.append(
                    {
                        "group": name,
                        "tokens": tokens,
                        "union": union,
                        "floor": layers.floor(),
                        "dense": dense,
                        "best": best,
                        "all": rows,
                    }
                )
                print(
                    f"{name:20} {tokens:3} {union:5} {layers.floor():7.1f} {best['again']:8.2f} "
                    f"{dense:8.1f} {best['up_alone']:7.2f} {best['down_alone']:7.2f} "
                    f"{best['empty_union']:7.2f}  "
                    f"{best['error']:.1e} {best['up'][2:]} / {best['down'][2:]} / "
                    f"{best['groups']}",
                    flush=True,
                )
        del layers
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()

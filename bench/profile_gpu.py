"""What a pass of the 3B shapes takes on an NVIDIA GPU, kernel by kernel: CUPTI through PyTorch.

usage: python bench/profile_gpu.py [--bits 0] [--tokens 1 8 32] [--llama]
Times of the host mean nothing while this watches. Needs PyTorch beside MLX's CUDA build.
"""

import argparse
from collections import defaultdict

import mlx.core as mx
import torch
from pass_h100 import dense_model, filled_cache, finished, sparse_model, token_ids
from torch.profiler import ProfilerActivity, profile

PASSES = 5


def watched(model, tokens: int) -> dict[str, list[float]]:
    """Microseconds of every kernel of PASSES passes, by name."""
    cache, ids = filled_cache(model, 1), mx.array(token_ids(model, tokens))[None]

    def one():
        mx.eval(mx.argmax(model(ids, cache=cache), axis=-1))
        for layer_cache in cache:
            layer_cache.trim(tokens)

    for _ in range(4):
        one()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PASSES):
            one()
        mx.synchronize()
    found = defaultdict(list)
    for event in profiler.events():
        if str(event.device_type).endswith("CUDA"):
            found[event.name].append(event.time_range.elapsed_us())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--llama", action="store_true")
    args = parser.parse_args()
    torch.zeros(1).cuda()  # PyTorch watches nothing before
    mx.random.seed(0)
    model = finished((dense_model if args.llama else sparse_model)(36), args.bits)
    for tokens in args.tokens:
        found = watched(model, tokens)
        launches = sum(map(len, found.values())) / PASSES
        busy = sum(map(sum, found.values())) / PASSES / 1e3
        print(f"{tokens} tokens: {launches:.0f} kernels, {busy:.2f} ms on the GPU", flush=True)
        for name, times in sorted(found.items(), key=lambda item: -sum(item[1])):
            share = f"{sum(times) / PASSES:8.1f} us {len(times) / PASSES:6.1f} x"
            print(f"{share} {sum(times) / len(times):6.2f} us  {name[:100]}", flush=True)


if __name__ == "__main__":
    main()

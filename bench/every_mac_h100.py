"""What keeps kernels right and fast on machines that we do not have, run on a GPU that we do.

usage: python bench/every_mac_h100.py [PART ...] [--out FILE.json]

Parts, under four minutes together: what the first use of a class costs, and a second start; every
kernel in every tile class as blockffn-doctor examines it, and fresh random cases against float64;
the layer without kernels; greedy tokens of a batch; tiles by `blockffn-bench kernels --tune`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kernels_check
import mlx.core as mx

import blockffn_mlx as bf
from blockffn_mlx import device, kernels
from blockffn_mlx.analysis import doctor
from blockffn_mlx.ffn import make_plan, plan
from blockffn_mlx.kernels import RandomLayer, Sizes, probe, random_layer, verdicts
from blockffn_mlx.quantisation import Quantization

BACKEND = device.gpu_backend() or "metal"
SHAPE = (128, 128, 2048)  # experts, expert size, hidden size: the 3B model's
WORKERS = 12
PACKINGS = {"plain": (0, 0), "4-bit": (4, 64)}


def command(name: str, *flags: str, cache: str) -> subprocess.Popen:
    """A command of the package with a cache folder of its own."""
    module = f"from blockffn_mlx.cli.{name} import main; raise SystemExit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", module, *flags],
        env={**os.environ, "XDG_CACHE_HOME": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def doctor_and_cases(cache: str) -> dict[str, Any]:
    """Every tile class of every kernel as the doctor examines it, and fresh cases."""
    rows, failed = [], []
    work = [(c._replace(dtype=name_of(c.dtype)), kind) for c, kind in doctor.examinations(BACKEND)]
    with get_context("spawn").Pool(WORKERS) as pool:
        results = [(item, pool.apply_async(examine, item)) for item in work]
        deadline = time.monotonic() + 90
        for item, result in results:
            try:
                rows.append(result.get(max(0.0, deadline - time.monotonic())))
            except Exception as error:  # one class that breaks must not hide the others
                failed.append([str(item), f"{type(error).__name__}: {error}"])
        pool.terminate()
    worst: dict[str, float] = {}
    for row in rows:
        key = f"{row.dtype} {row.weights or 'no weights'}"
        worst[key] = max([worst.get(key, 0.0), *row.errors.values()])
    return {
        "classes": len(rows),
        "of": len(work),
        "kernels": sorted({row.kernel for row in rows}),
        "wrong": [
            [r.kernel, r.weights, r.dtype, r.tokens, r.errors, r.failure]
            for r in rows
            if not r.right
        ],
        "failed": failed,
        "worst": worst,
        "cases": kernels_check.check_cases(300, WORKERS, int(time.time()), 60),
    }


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def examine(tile_class: probe.TileClass, kind: str) -> doctor.Verdict:
    """A class in a process of its own; dtypes travel by name. Times mean nothing there."""
    doctor.seconds_per_call = lambda function, x: 0.0
    return doctor.examine_class(tile_class._replace(dtype=getattr(mx, tile_class.dtype)), kind)


def first_use(cache: str) -> list[dict[str, Any]]:
    """Seconds until a class is known, at its first use and at the next start."""
    verdicts.folder = lambda: Path(cache) / "first_use"
    rows = []
    for packing in (None, Quantization(64, 4, "affine")):
        for name, kernel in kernels.KERNELS.items():
            if packing and not kernel.projection:
                continue
            seconds = []
            for _ in range(2):
                probe.verdict.cache_clear()
                begin = time.perf_counter()
                works = probe.works(kernel, 8, mx.bfloat16, packing, backend=BACKEND)
                seconds.append(time.perf_counter() - begin)
            rows.append(
                {
                    "kernel": name,
                    "bits": packing.bits if packing else None,
                    "works": works,
                    "first_s": seconds[0],
                    "known_s": seconds[1],
                }
            )
    return rows


def chain(chosen: plan.Plan, layer: RandomLayer) -> mx.array:
    """36 layers, each on the result before."""
    x = layer.x
    for _ in range(36):
        x = chosen.run(x, layer.scores, layer.up, layer.down)
    return x


def without_kernels(cache: str) -> list[dict[str, Any]]:
    """Microseconds a layer in a chain of 36: kernels, what is taken without them, and the union."""
    rows = []
    for (name, packing), tokens in [(p, t) for p in PACKINGS.items() for t in (1, 8)]:
        layer = random_layer(tokens, *SHAPE, 40 if tokens > 1 else 16, mx.bfloat16, packing)
        sizes = Sizes.of(layer.x, layer.up, layer.down)
        row = {"weights": name, "tokens": tokens}
        kernel_backend, device.kernel_backend = device.kernel_backend, lambda: None
        fallback = make_plan(sizes, "silu")
        device.kernel_backend = kernel_backend
        row["fallback"] = fallback.strategy
        plans = {
            "kernels_us": make_plan(sizes, "silu", BACKEND),
            "fallback_us": fallback,
            "union_on_the_host_us": make_plan(sizes, "silu", "ops"),
        }
        for what, chosen in plans.items():
            row[what] = kernels_check.milliseconds(partial(chain, chosen, layer), 5) * 1e3 / 36
        rows.append(row)
    return rows


def tune(cache: str) -> list[dict[str, Any]]:
    """The tiles that --tune finds for the 3B model's layer, beside the table's."""
    found = []
    for flags in (["--tokens", "8", "32"], ["--tokens", "8", "--q-bits", "4"]):
        process = command("bench", "kernels", "--tune", "--json", *flags, cache=cache)
        try:
            out, err = process.communicate(timeout=75)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = "", "took longer than 75 s"
        found.append(json.loads(out) if out else {"flags": flags, "failed": err.strip()[-500:]})
    return found


def tokens(cache: str) -> dict[str, Any]:
    """Greedy tokens and a batch of different prompts, in float32, through kernels and without."""
    verdicts.folder = lambda: Path(cache) / "tokens"
    args = bf.ModelArgs(
        vocab_size=997, hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, expert_size=64, num_experts=40, norm_after_router="rms",
        rms_norm_eps=1e-5, scale_emb=12, scale_depth=1.4, dim_model_base=64,
    )  # fmt: skip
    mx.random.seed(3)
    model = bf.Model(args)
    model.eval()
    mx.eval(model.parameters())
    ids = mx.random.randint(0, 997, (4, 12))
    results = {}
    for name in ("dense", "auto"):
        for layer in model.layers:
            layer.mlp.backend = name
        plan.forget()
        cache_of_batch, sequences = model.make_cache(), ids
        logits = model(ids, cache_of_batch)
        for _ in range(16):
            step = mx.argmax(logits[:, -1:], axis=-1)
            sequences = mx.concatenate([sequences, step], axis=1)
            logits = model(step, cache_of_batch)
        results[name] = (sequences.tolist(), logits.astype(mx.float32))
    error = mx.abs(results["auto"][1] - results["dense"][1]).max()
    return {
        "same_tokens": results["auto"][0] == results["dense"][0],
        "relative_error": (error / mx.abs(results["dense"][1]).max()).item(),
    }


PARTS = {
    "first_use": first_use,
    "doctor_and_cases": doctor_and_cases,
    "without_kernels": without_kernels,
    "tokens": tokens,
    "tune": tune,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # else float32 products are no float32
    results: dict[str, Any] = {"device": device.name(), "mlx": mx.__version__, "backend": BACKEND}
    print(results, flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for name in args.parts:
            begin = time.perf_counter()
            try:
                results[name] = PARTS[name](cache)
            except Exception as error:  # the rest of the run is still worth having
                results[name] = f"failed: {type(error).__name__}: {error}"
            results[f"{name}_s"] = time.perf_counter() - begin
            print(name, json.dumps(results[name], indent=1), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

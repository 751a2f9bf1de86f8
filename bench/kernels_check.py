"""Everything the kernels promise, on this machine's GPU through MLX, with fresh random inputs.

usage: python bench/kernels_check.py [PART ...] [--cases 400] [--workers 12] [--out FILE.json]

Parts: cases against float64, the same for long chunks, and golden models' logits.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from multiprocessing import TimeoutError, get_context
from pathlib import Path

import mlx.core as mx
import numpy as np

import blockffn_mlx as bf
from blockffn_mlx import kernels
from blockffn_mlx.ffn import chunk_union_ffn

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tests"))
from helpers.ffn_cases import TOLERANCE, UNIONS, Case, float64, relative_error  # noqa: E402

TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64)
LONG_TOKENS = (65, 127, 128, 300, 513, 1000, 1025, 1500)
EXPERTS = (1, 9, 40, 56, 128, 180, 256)
EXPERT_SIZES = (32, 64, 96, 128)
HIDDEN_SIZES = (64, 96, 128, 192, 256, 320, 512, 1024, 2048)
PACKINGS = ((0, 64), (4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128))
GOLDEN = ("gqa_block", "mla_linear", "gqa_bf16_sharded")


def backend() -> str:
    return "metal" if mx.metal.is_available() else "cuda"


def sample(count: int, seed: int, tokens: tuple[int, ...], forms: int | None = None) -> list[Case]:
    """Random cases; of no more than some forms, each of which has to be compiled."""
    # no grouped kernel of CUDA's takes float32
    whole = tokens is TOKENS or backend() == "metal"
    dtypes = [dtype for dtype in TOLERANCE if whole or dtype != mx.float32]
    rng = np.random.default_rng(seed)
    cases = []
    while len(cases) < (forms or count):
        experts, size, hidden = (int(rng.choice(c)) for c in (EXPERTS, EXPERT_SIZES, HIDDEN_SIZES))
        index = len(cases)  # tokens, dtype and packing take turns, so that all pairs come up
        dtype = dtypes[index % len(dtypes)]
        bits, group_size = PACKINGS[index // 3 % len(PACKINGS)]
        union, act = str(rng.choice(UNIONS)), str(rng.choice(["silu", "relu"]))
        sizes = (int(rng.choice(tokens)), experts, size, hidden)
        if experts * size * hidden <= 2**25:
            seed = int(rng.integers(2**31))
            cases.append(Case(*sizes, dtype, union, act, bits, group_size, seed))
    while len(cases) < count:
        union, seed = str(rng.choice(UNIONS)), int(rng.integers(2**31))
        form = cases[len(cases) % len(cases[:forms])]
        cases.append(replace(form, tokens=int(rng.choice(tokens)), union=union, seed=seed))
    return cases


def run_case(arguments: tuple) -> tuple[str, str, int, float, bool, bool]:
    """Name, dtype, bits, error, and whether it is right and gives the same bits twice."""
    name, *fields = arguments
    fields[4] = getattr(mx, fields[4])
    case = Case(*fields)
    x, scores, up, down, expected = case.operands()
    outputs = []
    for fill in (mx.nan, 1e30):  # what freed memory holds next, and so the scratch
        poison = [mx.full((4_000_000,), fill) for _ in range(4)]
        mx.eval(poison)
        del poison
        y = chunk_union_ffn(x, scores, up, down, act=case.act, backend=backend())
        mx.eval(y)
        outputs.append(y)
    error = relative_error(outputs[0], expected)
    silent = ~float64(scores).any(-1)
    right = error < TOLERANCE[case.dtype] and not float64(outputs[0])[silent].any()
    same = bool(mx.array_equal(*outputs))
    return name, str(case.dtype).removeprefix("mlx.core."), case.bits, error, right, same


def check_cases(
    count: int,
    workers: int,
    seed: int,
    seconds: float,
    tokens: tuple[int, ...] = TOKENS,
    forms: int | None = None,
) -> dict:
    work = []
    for c in sample(count, seed, tokens, forms):
        dtype = str(c.dtype).removeprefix("mlx.core.")
        fields = (c.tokens, c.experts, c.expert_size, c.hidden_size, dtype, c.union, c.act)
        work.append((str(c), *fields, c.bits, c.group_size, c.seed))
    worst, wrong, done = defaultdict(float), [], 0
    deadline = time.monotonic() + seconds
    with get_context("spawn").Pool(workers) as pool:
        results = pool.imap_unordered(run_case, work)
        while done < len(work) and (left := deadline - time.monotonic()) > 0:
            try:
                name, dtype, bits, error, right, same = results.next(left)
            except TimeoutError:
                break
            except Exception as failure:  # one case that breaks must not hide the others
                done += 1
                wrong.append([f"{type(failure).__name__}: {failure}"])
                continue
            done += 1
            key = f"{dtype} {bits or 'plain'}"
            worst[key] = max(worst[key], error)
            if not (right and same):
                wrong.append([name, error, right, same])
        pool.terminate()
    return {"seed": seed, "cases": done, "worst": dict(worst), "wrong": wrong}


def check_golden() -> list[dict]:
    """Logits of every golden model with all feed-forward layers in the kernels."""
    rows = []
    launches = []
    original = kernels.Call.__call__
    kernels.Call.__call__ = lambda call, *inputs: (
        launches.append(call.kernel.name) or original(call, *inputs)
    )
    for name in GOLDEN:
        source = REPO / "tests" / "data" / "golden" / name
        with tempfile.TemporaryDirectory() as folder:
            bf.convert(str(source), f"{folder}/mlx")
            model, _ = bf.load(f"{folder}/mlx")
            expected = np.load(source / "golden.npz")
            for row in range(2):
                launches.clear()
                logits = model(mx.array(expected["input_ids"][row : row + 1]))
                mx.eval(logits)
                error = relative_error(logits, expected["logits"][row : row + 1].astype(float))
                tokens = expected["input_ids"].shape[1]
                rows.append(
                    {
                        "model": name,
                        "row": row,
                        "tokens": tokens,
                        "error": error,
                        "launches": len(launches),
                        "layers": len(model.layers),
                    }
                )
    kernels.Call.__call__ = original
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["cases", "long", "golden"])
    parser.add_argument("--seconds", type=float, default=600, help="for the cases, at most")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {
        "device": str(mx.device_info().get("device_name")),
        "mlx": mx.__version__,
        "backend": kernels.available_backend(),
    }
    print(results, flush=True)
    work = {
        "golden": check_golden,
        "long": lambda: check_cases(args.cases, args.workers, args.seed, args.seconds, LONG_TOKENS),
        "cases": lambda: check_cases(args.cases, args.workers, args.seed, args.seconds),
    }
    for name in args.parts:
        try:
            results[name] = work[name]()
        except Exception as error:  # the rest of the run is still worth having
            results[name] = f"failed: {type(error).__name__}: {error}"
        print(name, json.dumps(results[name], indent=1), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

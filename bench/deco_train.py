"""Trains a DECO of the demo's size for 65 million tokens under one choice of objectives.

usage: deco_train.py keep FOLDER               keep what FOLDER has of the text
       deco_train.py run SETTING OUT [--set TABLE.KEY=VALUE ...] [--max-seconds N]
       deco_train.py all OUT [--gpus N] [--jobs N] [--max-seconds N] [--set ...]    every setting
       deco_train.py small OUT [--jobs 2]      every setting at SMALL's size, for a CPU
       deco_train.py table OUT                 the table of all finished runs

SETTING is one of SETTINGS; OUT/SETTING.jsonl has its figures as they come, OUT/SETTING.json its
record. What ran out of time goes on by the same command. `run` takes one GPU, `all` shares the
settings out, without MLX's compiler: on CUDA it makes some 70 kernels of a training step, four
seconds each. Text and kernels are kept in DECO_WORK (~/deco): the text may come in several calls of
keep, the manifest first, large files cut by split(1) (NAME.u16.xz.aa, .ab, ...). A pack that never
came whole is left out, and the record says so.
"""

import argparse
import json
import lzma
import math
import os
import queue
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(os.environ.get("DECO_WORK", Path.home() / "deco"))
os.environ.setdefault("MLX_PTX_CACHE_DIR", str(WORK / "kernels-0"))
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402

from blockffn_mlx.training.build import prepare  # noqa: E402
from blockffn_mlx.training.config import load_config  # noqa: E402
from blockffn_mlx.training.trainer import Trainer  # noqa: E402

SETTINGS = {
    "both": ("deco", ["al", "cs", "entropy"]),
    "entropy": ("deco", ["entropy"]),
    "al_cs": ("deco", ["al", "cs"]),
    "none": ("deco", []),
    "blockffn_al_cs": ("blockffn", ["al", "cs"]),
    "blockffn_none": ("blockffn", []),
}
# What a DECO has and a BlockFFN of the same size has not.
DECO_FIELDS = ("ffn_type", "head_dim", "intermediate_size", "shared_expert_size")
# A model and a run that a core of a CPU trains in some minutes.
SMALL = [
    "model.hidden_size=128",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "model.head_dim=32",
    "model.intermediate_size=320",
    "model.num_experts=24",
    "model.shared_expert_size=32",
    "optimizer.dtype='float32'",
    "data.validation_tokens=1025",
    "stage.0.accumulate=1",
    "stage.1.accumulate=1",
    "stage.0.batch_size=16",
    "stage.1.batch_size=16",
    "stage.0.context=128",
    "stage.1.context=128",
    "stage.0.steps=200",
    "stage.0.lr=4e-3",
    "stage.0.warmup=50",
    "stage.1.steps=60",
    "stage.1.decay=60",
    "stage.1.lr=4e-3",
    "sparsity.start=100",
    "sparsity.entropy_multiplier=1.122",
    "log_interval=20",
]
# A BlockFFN's weights of AL and CS in the demo's short runs; in toy runs a DECO's yielded to less.
BLOCKFFN_WEIGHTS = {"al": 3e-3, "cs": 6e-2}
# A step without mx.compile is thousands of launches, in more CUDA graphs than MLX keeps by default;
# too many new ones are an error of its.
EAGER = {
    "MLX_DISABLE_COMPILE": "1",
    "MLX_CUDA_GRAPH_CACHE_SIZE": "4096",
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}
TABLE_HEAD = "| objectives | loss, real text | loss, all | TLS | CLS_8 | reuse |"


def keep(folder: Path):
    """Keeps the files that are there, and unpacks the packs that are whole."""
    text = WORK / "text"
    text.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name == "manifest.json" or ".u16.xz" in path.name:
            shutil.copy(path, text)
    for pack in json.loads((text / "manifest.json").read_text())["packs"].values():
        parts = sorted(text.glob(f"{pack['file']}*"))
        if sum(part.stat().st_size for part in parts) == pack["xz_bytes"]:
            packed = b"".join(part.read_bytes() for part in parts)
            (text / pack["file"]).with_suffix("").write_bytes(lzma.decompress(packed))
            for part in parts:
                part.unlink()
    print("kept:", *sorted(path.name for path in text.iterdir()), flush=True)


def present_sources() -> tuple[Path, list[str]]:
    """A folder of the packs that have come, and the training sources that are missing."""
    text, found = WORK / "text", WORK / f"found-{os.getpid()}"
    manifest = json.loads((text / "manifest.json").read_text())
    packs, missing = {}, []
    for name, pack in manifest["packs"].items():
        file = pack["file"].removesuffix(".xz")
        if (text / file).exists():
            packs[name] = pack | {"file": file}
        else:
            missing += [part["source"] for part in pack["parts"] if part["split"] == "train"]
    found.mkdir(exist_ok=True)
    for pack in packs.values():
        (found / pack["file"]).unlink(missing_ok=True)
        (found / pack["file"]).symlink_to(text / pack["file"])
    (found / "manifest.json").write_text(json.dumps(manifest | {"packs": packs}))
    return found, missing


def run(setting: str, out: Path, overrides: list[str], max_seconds: float):
    """Trains, evaluates and writes the record; a run that ran out of time goes on next time."""
    begin = time.perf_counter()
    data, missing = present_sources()
    config = load_config(ROOT / "examples" / "demo_deco.toml", overrides)
    family, config.sparsity.objective = SETTINGS[setting]
    if family == "blockffn":
        config.model = blockffn_model(config.model)
        config.sparsity = replace(config.sparsity, **BLOCKFFN_WEIGHTS)
    config.output = str(WORK / "runs" / setting)
    config.data.path, config.data.tokenizer = [str(data)], None
    for stage in config.stage:
        stage.weights = {n: w for n, w in (stage.weights or {}).items() if n not in missing}
    model, corpus, _ = prepare(config)
    out.mkdir(parents=True, exist_ok=True)

    def tell(record: dict):
        line = json.dumps({k: v for k, v in record.items() if k != "sources"} | {"at": seconds()})
        print(setting, line, flush=True)
        with open(out / f"{setting}.jsonl", "a") as file:
            file.write(line + "\n")

    def seconds() -> float:
        return time.perf_counter() - begin

    trainer = Trainer(config, model, corpus, on_record=tell)
    finished = trainer.train(max_seconds)
    log = trainer.log.read()
    result = {
        "setting": setting,
        "finished": finished,
        "steps": trainer.step,
        "device": str(mx.device_info().get("device_name", "cpu")),
        "sources_left_out": missing,
        "tokens": sum(stage.tokens for stage in config.stage),
        "seconds": seconds(),
        **{name: log[-1][name] for name in ("real", "template", "all", "sources") if finished},
        "overrides": overrides,
        "log": [record for record in log if record["kind"] == "train"],
    }
    (out / f"{setting}.json").write_text(json.dumps(result, indent=1))
    print(table(out), flush=True)


def blockffn_model(model: dict) -> dict:
    """The fields of a BlockFFN in the sizes of a DECO; its scalings are 1 as the demo's."""
    own = {name: value for name, value in model.items() if name not in DECO_FIELDS}
    scalings = {
        "dim_model_base": own["hidden_size"],
        "scale_depth": own["num_hidden_layers"] ** 0.5,
    }
    return {**own, "norm_after_router": "rms", "rms_norm_eps": 1e-5, **scalings}


def run_all(out: Path, jobs: int, gpus: int, overrides: list[str], max_seconds: float = math.inf):
    """All settings that are not finished, some at a time; worker i takes GPU i modulo `gpus`."""
    eager = ["optimizer.compiled=false"] if gpus else []
    flags = [flag for override in [*eager, *overrides] for flag in ("--set", override)]
    end = time.perf_counter() + max_seconds
    workers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for worker in range(jobs):
        workers.put(worker)

    def one(setting: str):
        worker, left = workers.get(), end - time.perf_counter()
        # Two that compile at once must not share a folder.
        own = {"MLX_PTX_CACHE_DIR": str(WORK / f"kernels-{worker}")}
        if gpus:
            own |= EAGER | {"CUDA_VISIBLE_DEVICES": str(worker % gpus)}
        if left > 0 and not is_finished(out / f"{setting}.json"):
            command = [sys.executable, __file__, "run", setting, str(out), *flags]
            subprocess.run([*command, "--max-seconds", str(left)], env=os.environ | own)
        workers.put(worker)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, SETTINGS))
    print(table(out), flush=True)


def is_finished(path: Path) -> bool:
    """Whether a record is of a run that came to its end."""
    return path.exists() and json.loads(path.read_text())["finished"]


def table(out: Path) -> str:
    """Markdown of the finished runs in a folder."""
    lines = [TABLE_HEAD, "| --- " * 6 + "|"]
    for path in (out / f"{name}.json" for name in SETTINGS):
        if is_finished(path):
            record = json.loads(path.read_text())
            real, everything = record["real"], record["all"]["loss"]
            shares = [f"{real[name]:.1%}" for name in ("tls", "cls_8", "reuse")]
            cells = [path.stem, f"{real['loss']:.3f}", f"{everything:.3f}", *shares]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("keep").add_argument("folder", type=Path)
    commands.add_parser("table").add_argument("out", type=Path)
    small = commands.add_parser("small")
    small.add_argument("out", type=Path)
    small.add_argument("--jobs", type=int, default=2)
    small.add_argument("--set", action="append", default=[])
    every = commands.add_parser("all")
    every.add_argument("out", type=Path)
    every.add_argument("--gpus", type=int, default=1)
    every.add_argument("--jobs", type=int, help="runs at a time; one a GPU by default")
    runner = commands.add_parser("run")
    runner.add_argument("setting", choices=SETTINGS)
    runner.add_argument("out", type=Path)
    for parsed in (every, runner):
        parsed.add_argument("--set", action="append", default=[])
        parsed.add_argument("--max-seconds", type=float, default=math.inf)
    args = parser.parse_args()
    if args.command == "keep":
        keep(args.folder)
    elif args.command == "table":
        print(table(args.out))
    elif args.command == "small":
        run_all(args.out, args.jobs, 0, [*SMALL, *args.set])
    elif args.command == "all":
        run_all(args.out, args.jobs or args.gpus, args.gpus, args.set, args.max_seconds)
    else:
        run(args.setting, args.out, args.set, args.max_seconds)


if __name__ == "__main__":
    main()

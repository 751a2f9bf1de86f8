"""A seeded fuzz campaign over what is read from files: python tests/fuzz_cases.py --help.

Each case damages a good file, or makes an odd one, and reads it. Allowed is a result, or ValueError
or OSError with a sentence; anything else, a hang or a crash is a find, told with the case's number.
"""

import argparse
import base64
import faulthandler
import json
import pickle
import random
import resource
import shutil
import signal
import string
import struct
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from sentencepiece import sentencepiece_model_pb2

import blockffn_mlx as bf
from blockffn_mlx.chat.transcript import load_transcript, save_transcript
from blockffn_mlx.checkpoints.canonical import canonicalize
from blockffn_mlx.checkpoints.reader import load_checkpoint, load_pickle, open_checkpoint, read_json
from blockffn_mlx.checkpoints.tokenizer import read_tokenizer
from blockffn_mlx.speculative import load_draft
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.state import read_state, save_state
from helpers.mutations import mutated_bytes, mutated_json, odd, opcodes, toml_text, write_json
from helpers.torch_files import dict_pickle, save_bin, save_legacy, tensor_ops, write_zip

GOLDEN = Path(__file__).parent / "data" / "golden"
SECONDS, MEGABYTES = 20, 4000  # a case that takes longer hangs; a family that takes more is a bomb
Read = Callable[[], Any]


def pickles(folder: Path) -> Callable[[random.Random], Read]:
    ops = {
        "w": tensor_ops("FloatStorage", "0", 6, 0, (2, 3), (3, 1)),
        "v": tensor_ops("HalfStorage", "1", 4, 1, (3,), (1,)),
    }
    state = dict_pickle(ops)
    plain = [pickle.dumps([1, 2.5, "x", {"a": (None, True)}], p) for p in range(6)]
    data = {"0": bytes(24), "1": bytes(8)}
    whole = write_zip(folder / "good.bin", state, data).read_bytes()
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    legacy = save_legacy(folder / "good.pt", arrays).read_bytes()

    def case(rng: random.Random) -> Read:
        path = folder / "case.bin"
        match rng.randrange(6):
            case 0:
                path.write_bytes(mutated_bytes(rng.choice(plain), rng))
                return lambda: load_pickle(path)
            case 1:
                path.write_bytes(opcodes(rng))
                return lambda: load_pickle(path)
            case 2:
                write_zip(path, opcodes(rng), data)
            case 3:
                write_zip(path, mutated_bytes(state, rng), data)
            case 4:
                path.write_bytes(mutated_bytes(legacy, rng))
            case _:
                path.write_bytes(mutated_bytes(whole, rng))
        return lambda: load_checkpoint(path)

    return case


def safetensors(folder: Path) -> Callable[[random.Random], Read]:
    arrays = {"a": mx.arange(6.0), "b": mx.ones((2, 3), mx.bfloat16), "c": mx.array([True])}
    mx.save_safetensors(str(folder / "good.safetensors"), arrays, {"format": "mlx"})
    data = (folder / "good.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]

    def case(rng: random.Random) -> Read:
        path = folder / "case.safetensors"
        if rng.random() < 0.3:
            path.write_bytes(mutated_bytes(data, rng))
        else:
            new = json.dumps(mutated_json(header, rng)).encode("utf-8", "surrogatepass")
            length = len(new) + rng.choice([0] * 9 + [1, -1, 2**40])
            path.write_bytes(struct.pack("<q", length) + new + body)
        return lambda: load_checkpoint(path)

    return case


def indexes(folder: Path) -> Callable[[random.Random], Read]:
    mx.save_safetensors(str(folder / "one.safetensors"), {"a": mx.ones(2)})
    save_bin(folder / "two.bin", {"b": mx.zeros(3)})
    index = {"metadata": {"size": 20}, "weight_map": {"a": "one.safetensors", "b": "two.bin"}}

    def case(rng: random.Random) -> Read:
        for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            (folder / name).unlink(missing_ok=True)
            if rng.random() < 0.7:
                write_json(folder / name, mutated_json(index, rng), rng)
        return lambda: load_checkpoint(folder)

    return case


def configs(folder: Path) -> Callable[[random.Random], Read]:
    sources = [GOLDEN / name for name in ("gqa_block", "mla_linear", "deco_simple")]
    known = [(open_checkpoint(source), read_json(source / "config.json")) for source in sources]

    def case(rng: random.Random) -> Read:
        tensors, config = rng.choice(known)
        write_json(folder / "config.json", mutated_json(config, rng), rng)
        return lambda: canonicalize(tensors, read_json(folder / "config.json"))

    return case


def converted(folder: Path) -> Callable[[random.Random], Read]:
    """What `load` reads of a folder that calls itself converted."""
    names = ["config.json", "generation_config.json", "tokenizer_config.json"]
    folders, contents = [], []
    for source, options in (
        ("gqa_block", {"quantize": True, "q_group_size": 32}),
        ("mla_linear", {}),
        ("deco_simple", {}),
    ):
        bf.convert(str(GOLDEN / source), str(folder / source), **options)
        folders.append(folder / source)
        there = [name for name in names if (folder / source / name).exists()]
        contents.append({name: read_json(folder / source / name) for name in there})

    def case(rng: random.Random) -> Read:
        which = rng.randrange(len(folders))
        for name, content in contents[which].items():
            (folders[which] / name).write_text(json.dumps(content))
        name = rng.choice(["config.json", *contents[which]])
        write_json(folders[which] / name, mutated_json(contents[which][name], rng), rng)

        def read():
            model, _ = bf.load(str(folders[which]), lazy=True)
            mx.eval(model(mx.array([[1, 2, 3]])))

        return read

    return case


def tokenizers(folder: Path) -> Callable[[random.Random], Read]:
    good, odd_one = folder / "good", folder / "odd"
    good.mkdir(), odd_one.mkdir()
    source = GOLDEN / "gqa_block"
    read_tokenizer(source, 384).save(good)
    fast = read_json(good / "tokenizer.json")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((source / "tokenizer.model").read_bytes())
    charsmap = proto.normalizer_spec.precompiled_charsmap
    fast["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(charsmap).decode(),
            },
            fast["normalizer"],
        ],
    }
    settings = {
        name: read_json(source / name)
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    }

    def write_model(rng: random.Random):
        new = sentencepiece_model_pb2.ModelProto()
        new.CopyFrom(proto)
        new.trainer_spec.model_type = rng.choice([1, 2, 2, 2])
        match rng.randrange(5):
            case 0:
                new.normalizer_spec.precompiled_charsmap = mutated_bytes(charsmap, rng)
            case 1:
                piece = rng.choice(new.pieces)
                piece.piece = str(rng.choice(["", "a", "▁", "ab" * 300, "x" * 100_000, "<s>"]))
            case 2:
                piece = rng.choice(new.pieces)
                piece.score = rng.choice([0.0, float("inf"), float("nan"), -1e38])
                piece.type = rng.choice([1, 2, 3, 4, 5, 6])
            case 3:
                del new.pieces[rng.randrange(len(new.pieces)) :]
                new.trainer_spec.unk_id = rng.choice([-1, 0, 5, 10**6])
            case _:
                new.trainer_spec.unk_piece = rng.choice(["", "<unk>", "none"])
                new.trainer_spec.byte_fallback = rng.random() < 0.5
        data = new.SerializeToString()
        data = mutated_bytes(data, rng) if rng.random() < 0.3 else data
        (odd_one / "tokenizer.model").write_bytes(data)

    def case(rng: random.Random) -> Read:
        for file in odd_one.iterdir():
            file.unlink()
        for name, content in settings.items():
            new = mutated_json(content, rng) if rng.random() < 0.3 else content
            write_json(odd_one / name, new, rng)
        if rng.random() < 0.5:
            new = mutated_json(fast, rng)
            if rng.random() < 0.3 and isinstance(new, dict):
                damaged = base64.b64encode(mutated_bytes(charsmap, rng)).decode()
                new["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": damaged}
            write_json(odd_one / "tokenizer.json", new, rng)
        else:
            write_model(rng)
        alphabet = string.printable + "éﬁ①Ｗ中🎉\u0301\u200d"
        text = "".join(rng.choice(alphabet) for _ in range(50))

        def read():
            found = read_tokenizer(odd_one, 384)
            if found is not None:
                ids = found.tokenizer.encode(text).ids
                assert not ids or max(ids) < 384, "an id outside the embedding"
                found.tokenizer.decode(ids)

        return read

    return case


def transcripts(folder: Path) -> Callable[[random.Random], Read]:
    path = folder / "chat.jsonl"
    messages = [("system", "s"), ("user", "hi"), ("assistant", "hello\n\u2028"), ("user", "更多")]
    save_transcript(path, messages)
    good = path.read_bytes()

    def case(rng: random.Random) -> Read:
        if rng.random() < 0.5:
            path.write_bytes(mutated_bytes(good, rng))
        else:
            lines = [json.loads(line) for line in good.decode().split("\n") if line]
            lines = mutated_json(lines, rng)
            lines = lines if isinstance(lines, list) else [lines]
            path.write_text("\n".join(json.dumps(line) for line in lines))

        def read():
            found = load_transcript(path)
            save_transcript(folder / "again.jsonl", found)
            assert load_transcript(folder / "again.jsonl") == found, "saved and loaded differ"

        return read

    return case


def training_configs(folder: Path) -> Callable[[random.Random], Read]:
    examples = Path(__file__).parents[1] / "examples"
    texts = [path.read_text(encoding="utf-8") for path in sorted(examples.glob("*.toml"))]
    tables = [tomllib.loads(text) for text in texts]
    path = folder / "run.toml"

    def case(rng: random.Random) -> Read:
        overrides = []
        if rng.random() < 0.3:
            path.write_bytes(mutated_bytes(rng.choice(texts).encode(), rng))
        else:
            table = mutated_json(rng.choice(tables), rng)
            table = table if isinstance(table, dict) else {"output": table}
            lines = [f"{json.dumps(key)} = {toml_text(value)}" for key, value in table.items()]
            path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        if rng.random() < 0.2:
            name = rng.choice(["stage.0.steps", "data.path", "stage.x.y", "output", "", "stage"])
            overrides = [f"{name}={toml_text(odd(rng))}"]
        return lambda: load_config(path, overrides)

    return case


def training_states(folder: Path) -> Callable[[random.Random], Read]:
    arrays = {"model": {"w": mx.ones((2, 3))}, "optimizer": {"step": mx.array(3)}}
    state = {"sampler": {"state": {"state": 5, "inc": 7}}, "stage": 0, "losses": [1.0, 2.0]}
    path = save_state(folder, 3, arrays, state, keep=1)
    files = {name: (path / name).read_bytes() for name in ("state.json", "arrays.safetensors")}

    def case(rng: random.Random) -> Read:
        for name, data in files.items():
            (path / name).write_bytes(data)
        match rng.randrange(4):
            case 0:
                name = rng.choice(list(files))
                (path / name).write_bytes(mutated_bytes(files[name], rng))
            case 1:
                (path / rng.choice(list(files))).unlink()
            case _:
                new = mutated_json(json.loads(files["state.json"]), rng)
                if isinstance(new, dict) and rng.random() < 0.5:
                    new.pop("check", None)  # as of before checkpoints were checked
                write_json(path / "state.json", new, rng)
        return lambda: read_state(path)

    return case


def drafts(folder: Path) -> Callable[[random.Random], Read]:
    source = GOLDEN / "gqa_block_eagle"
    bf.convert(str(GOLDEN / "gqa_block"), str(folder / "model"))
    model, _ = bf.load(str(folder / "model"))
    head = folder / "head"
    shutil.copytree(source, head)
    config = read_json(source / "config.json")
    array = folder / "list.npy"
    np.save(array, np.arange(5))

    def case(rng: random.Random) -> Read:
        for file in head.glob("freq_*"):
            file.unlink()
        write_json(head / "config.json", config, random.Random(1))
        match rng.randrange(4):
            case 0:
                (head / "freq_1.npy").write_bytes(mutated_bytes(array.read_bytes(), rng))
            case 1:
                write_json(head / "freq_1.json", mutated_json([1, 2, 3], rng), rng)
            case _:
                write_json(head / "config.json", mutated_json(config, rng), rng)
        return lambda: load_draft(head, model)

    return case


FAMILIES = {
    "pickles": pickles,
    "safetensors": safetensors,
    "indexes": indexes,
    "configs": configs,
    "converted": converted,
    "tokenizers": tokenizers,
    "transcripts": transcripts,
    "training-configs": training_configs,
    "training-states": training_states,
    "drafts": drafts,
}


def alarm(*_: Any):
    raise AssertionError(f"it takes more than {SECONDS} seconds")


def run(family: str, cases: int, seed: int, only: int | None = None) -> list[str]:
    """Runs a family's cases; returns a line for each find."""
    finds = []
    signal.signal(signal.SIGALRM, alarm)
    with tempfile.TemporaryDirectory() as place:
        case = FAMILIES[family](Path(place))
        for number in range(cases) if only is None else [only]:
            rng = random.Random(f"{family} {seed} {number}")
            # Where a case ends the process, this is the last thing that was said.
            print(f"\r{family} {number} ", end="", file=sys.stderr, flush=True)
            read = case(rng)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                read()
            except (ValueError, OSError) as error:
                text = str(error)
                if isinstance(error, UnicodeError) or len(text) > 2000:
                    finds.append(f"{family} {number}: {type(error).__name__}: {text[:100]}")
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of compiled code is no Exception
                finds.append(f"{family} {number}: {type(error).__name__}: {str(error)[:200]}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    unit = 20 if sys.platform == "darwin" else 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit
    if peak > MEGABYTES:
        finds.append(f"{family}: {peak} MB of memory were used")
    return finds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run one case again")
    args = parser.parse_args()
    faulthandler.enable()
    finds = []
    for family in args.families or FAMILIES:
        found = run(family, args.cases, args.seed, args.only)
        print(f"{family}: {args.cases} cases, {len(found)} finds", flush=True)
        finds += found
    print("\n".join(finds), end="\n" if finds else "")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())

"""Damage for files: bytes and values changed, JSON of odd values, pickles of random opcodes."""

import copy
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.torch_files import tensor_ops

ODD = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308),
    *(float("inf"), float("nan"), "", "a", "1e4", "1", "../x", "\ud800", "\x00", "x" * 5000),
    *([], {}, [[1]], [None], {"a": 1}, ["a", 1], {"": {}}, [0] * 1000, "[" * 100),
]


def odd(rng: random.Random) -> Any:
    value = rng.choice(ODD)
    for _ in range(rng.choice([0] * 20 + [1, 3, 100])):
        value = [value] if rng.random() < 0.5 else {"x": value}
    return copy.deepcopy(value)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key inside a JSON value, the largest ones thinned out."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items)[:200]:
        yield value, key
        if isinstance(child, (dict, list)):
            yield from places(child)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = list(places(value)) if isinstance(value, (dict, list)) else []
        if not found or rng.random() < 0.02:
            return odd(rng)
        container, key = rng.choice(found)
        match rng.randrange(6):
            case 0 if isinstance(container, dict):
                container.pop(key, None)
            case 1 if isinstance(container, dict) and key in container:
                container[str(odd(rng))[:20]] = container.pop(key)
            case 2 if isinstance(container, list):
                container.insert(key, odd(rng))
            case 3 if isinstance(container, list) or key in container:
                step = rng.choice([-1, 1, 2, 1000, 10**6, -(10**9)])
                container[key] = container[key] + step if type(container[key]) is int else step
            case _:
                container[key] = odd(rng)
    return value


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """A copy with bytes changed, cut, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                del data[at : at + rng.choice([1, 4, 100])]
            case 3:
                data[at:at] = data[at : at + rng.choice([1, 8, 200])]
            case 4:
                data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**32 - 1]))
            case _:
                data[at:at] = rng.randbytes(rng.choice([1, 4, 30]))
        if not data:
            return b""
    return bytes(data)


def write_json(path: Path, value: Any, rng: random.Random):
    text = json.dumps(value)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(mutated_bytes(data, rng) if rng.random() < 0.15 else data)


def opcodes(rng: random.Random) -> bytes:
    """A pickle of opcodes and arguments, many of which fit each other."""
    words = [
        *(b"(", b")", b"]", b"}", b"0", b"1", b"2", b"N", b"\x88", b"\x89", b"a", b"e", b"s"),
        *(b"u", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q", b"\x8f", b"\x90"),
        *(b"\x91", b"\x93", b"\x94", b"\x81", b"o", b"q\x00", b"q\x01", b"h\x00", b"h\x01"),
        *(b"j\x05\x00\x00\x00", b"r\xff\xff\xff\xff", b"K\x05", b"J\xff\xff\xff\xff", b"I-7\n"),
        *(b"L9999999999999999999999L\n", b"\x8a\x09" + b"\xff" * 9, b"F1e999\n", b"S'x'\n"),
        *(b"X\x01\x00\x00\x00w", b"U\x010", b"C\x02ab", b"Vx\\u0000\n", b"G" + b"\x7f" * 8),
        *(b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"cos\nsystem\n"),
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n"),
        *(b"X\x07\x00\x00\x00storage", b"X\x03\x00\x00\x00cpu", b"Pid\n", b"\x95" + b"\x00" * 8),
        tensor_ops("FloatStorage", "0", 6, 0, (2, 3), (3, 1)),
        tensor_ops("FloatStorage", "0", 6, rng.randint(-2, 9), (rng.randint(-1, 9),), (2,)),
    ]
    body = b"".join(rng.choice(words) for _ in range(rng.randint(1, 40)))
    return rng.choice([b"", b"\x80\x02", b"\x80\x04", b"\x80\x02}"]) + body + b"."


def toml_text(value: Any) -> str:
    """A TOML value; what TOML has no word for becomes something near it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps("" if value is None else value)

"""Run a compiled kernel on bytes: the Python side of runtime/run.cpp."""

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from .source import MetalError

U32, U64 = ctypes.c_uint32, ctypes.c_uint64
THREADGROUP_MEMORY = 32768
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("bytes", U64),
        ("writable", U32),
        ("initialised", U32),
        ("name", ctypes.c_char_p),
        ("written", ctypes.c_void_p),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("grid", U32 * 3),
        ("group", U32 * 3),
        ("lenient", U32),
        ("order", U32),
        ("seed", U64),
        ("poison", U32),
        ("group_memory", U32),
        ("count", U32),
        ("timeout", ctypes.c_double),
    ]


class _Totals(ctypes.Structure):
    _fields_ = [(n, U64) for n in ("groups", "threads", "simd_ops", "barriers", "unwritten")]
    _fields_ += [("threadgroup_bytes", U32), ("reports", U32)]


class _Traffic(ctypes.Structure):
    _fields_ = [(n, U64) for n in ("loads", "bytes", "distinct", "lines", "stored")]


@dataclass(frozen=True)
class Traffic:
    """What one dispatch moved from and to one buffer."""

    loads: int  # simdgroup loads (runtime/counters.h)
    bytes: int  # loaded; a byte that several lanes of a simdgroup load together counts once
    distinct: int  # bytes loaded at least once
    lines: int  # 128-byte lines touched, summed over simdgroup loads
    stored: int  # bytes


@dataclass(frozen=True)
class Counters:
    """What one dispatch did. `buffers` and `unwritten` are known in the check build only."""

    groups: int
    threads: int
    simd_ops: int
    barriers: int
    threadgroup_bytes: int
    unwritten: int  # bytes of outputs that nothing wrote
    buffers: dict[str, Traffic] = field(default_factory=dict)


@dataclass
class Buffer:
    name: str
    data: np.ndarray  # uint8, one-dimensional; a writable one is overwritten
    writable: bool = False
    initialised: bool = True
    written: np.ndarray | None = None  # uint8 by byte, 0: nothing wrote it; filled for outputs

    def _as_c(self) -> _Buffer:
        written = None if self.written is None else self.written.ctypes.data
        where = self.data.ctypes.data, self.data.nbytes
        return _Buffer(*where, self.writable, self.initialised, self.name.encode(), written)


@cache
def _library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def dispatch(
    library: Path,
    buffers: Sequence[Buffer],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    *,
    count: bool = False,
    lenient: bool = False,
    order: str = "forward",
    seed: int = 0,
    poison: int = 0xFF,
    timeout: float = 60.0,
    allow: Sequence[str] = (),
) -> Counters:
    """Run a kernel once.

    Args:
        library: what build.build returned.
        buffers: in the order of the kernel's buffer indices.
        grid: threads in x, y, z.
        threadgroup: threads of a threadgroup in x, y, z.
        count: fill Counters.buffers (check build).
        lenient: simd operations work on the lanes that came (Metal's rule), instead of failing.
        order: "forward", "backward" or "shuffled", of lanes and threadgroups.
        seed: of the shuffle.
        poison: byte that fills outputs and threadgroup memory beforehand.
        timeout: CPU seconds.
        allow: kinds of finding that are no error, for other people's kernels.

    Raises:
        MetalError: the kernel did something that Metal leaves undefined.
    """
    c_buffers = (_Buffer * max(1, len(buffers)))(*(b._as_c() for b in buffers))
    options = _Options(
        (U32 * 3)(*grid), (U32 * 3)(*threadgroup), lenient, ORDERS[order], seed, poison,
        THREADGROUP_MEMORY, count, timeout,
    )  # fmt: skip
    text, totals = ctypes.create_string_buffer(1 << 16), _Totals()
    traffic = (_Traffic * max(1, len(buffers)))()
    failed = _library(library).msl_run(
        c_buffers, len(buffers), ctypes.byref(options), text, U64(len(text)), ctypes.byref(totals),
        traffic,
    )  # fmt: skip
    message = _with_lines(library, text.value.decode())
    findings = [
        line
        for line in message.splitlines()
        if line.startswith("REPORT") and not any(kind in line for kind in allow)
    ]
    if failed:
        raise MetalError(message)
    if findings:
        raise MetalError("\n".join(findings))
    names = [f for f, _ in _Totals._fields_ if f != "reports"]
    moved = {
        b.name: Traffic(*(getattr(t, f) for f, _ in _Traffic._fields_))
        for b, t in zip(buffers, traffic, strict=False)
    }
    return Counters(**{n: getattr(totals, n) for n in names}, buffers=moved if count else {})


def _with_lines(library: Path, message: str) -> str:
    """Turn @0x123 into file:line, the innermost one outside the harness."""
    for address in sorted(set(re.findall(r"@(0x[0-9a-f]+)", message))):
        command = ["addr2line", "-i", "-e", str(library), hex(int(address, 16) - 1)]
        shown = subprocess.run(command, capture_output=True, text=True).stdout
        lines = [
            re.sub(r".*/| \(.*", "", line) for line in shown.splitlines() if re.search(r":\d", line)
        ]
        own = [line for line in lines if not line.startswith(("metal_", "entry", "run.cpp"))]
        if lines:
            message = re.sub(f"@{address}\\b", f"at {(own or lines)[0]}", message)
    return message

"""Reads pickles of plain data and tensors: the opcodes are interpreted here, nothing is executed.

Values only ever enter lists, tuples and dicts whose keys are text and numbers, so that nothing
large is hashed, and no opcode can set an attribute. What a pickle asks beyond that is refused.
"""

import io
import math
import pickletools
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from .tensor_info import BFLOAT16, are_sizes, span, stored_dtype

# Element type of a storage: a numpy dtype name, or bfloat16, which numpy lacks.
TORCH_STORAGES = {
    "BFloat16Storage": BFLOAT16,
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
ORDERED_DICT = ("collections", "OrderedDict")
REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
NAMES = {ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER} | {
    ("torch", storage) for storage in TORCH_STORAGES
}

MAX_BYTES = 32 << 20  # the tensors of a large model are described in less than one
MAX_OPCODES = 1 << 21
# A view may repeat its storage (stride 0), but not into more elements than this.
MAX_REPEATED_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Storage:
    """What the elements of tensors lie in."""

    key: str
    element: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * stored_dtype(self.element).itemsize


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view of a storage, inside its bounds; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(
    file: BinaryIO, source: str, allow_tensors: bool = True
) -> tuple[Any, dict[str, Storage]]:
    """Reads the pickle at a file's position, and leaves the file behind it.

    Args:
        file: The file.
        source: Names it in errors.
        allow_tensors: Whether the pickle may hold tensors, or only plain data.

    Returns:
        The value, in which a tensor is a `TensorRef` and a set a list; and its storages by key.

    Raises:
        ValueError: If the pickle is damaged, or holds anything else.
    """
    start = file.tell()
    data = io.BytesIO(file.read(MAX_BYTES))
    machine = _Machine(allow_tensors)
    try:
        value = machine.run(data)
    except _Refused as error:
        raise ValueError(f"{source} is refused: it {error}.") from error
    except Exception as error:  # whatever a damaged stream makes pickletools raise
        raise ValueError(f"{source} is damaged: its pickle cannot be read.") from error
    file.seek(start + data.tell())
    return value, machine.storages


class _Refused(Exception):
    """A pickle asks for more than plain data and tensors."""


@dataclass(frozen=True, slots=True)
class _Name:
    """Stands for the class or function that a pickle names."""

    module: str
    name: str


PUSH_ARGUMENT = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
KEYS = (str, bytes, int, float, bool, type(None))


class _Machine:
    """A pickle's stack and memo."""

    def __init__(self, allow_tensors: bool):
        self.allow_tensors = allow_tensors
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: io.BytesIO) -> Any:
        """The value on top of the stack where the pickle stops."""
        for opcode, argument, _ in islice(pickletools.genops(data), MAX_OPCODES):
            name = opcode.name
            if name in PUSH_ARGUMENT:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in CONTAINERS:
                self.stack.append(CONTAINERS[name]())
            elif name in TUPLES:
                items = [self.stack.pop() for _ in range(TUPLES[name])]
                self.stack.append(tuple(reversed(items)))
            elif name == "STOP":
                return self.stack.pop()
            else:
                self.step(name, argument)
        raise _Refused("is far longer than any checkpoint's")

    def step(self, name: str, argument: Any):
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "MARK":
                self.marks.append(len(stack))
            case "POP" if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.pop_items()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE":
                stack.append(tuple(self.pop_items()))
            case "LIST" | "FROZENSET":
                stack.append(self.pop_items())
            case "DICT":
                items = self.pop_items()
                stack.append({})
                self.set_items(items)
            case "APPEND":
                items = [stack.pop()]
                self.top(list).extend(items)
            case "APPENDS" | "ADDITEMS":
                items = self.pop_items()
                self.top(list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_items())
            case "GLOBAL":
                self.push_name(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                self.push_name(module, attribute)
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case "BUILD":
                # A state dict carries notes on its versions so; they are dropped.
                stack.pop()
                self.top(dict)
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "INST":
                self.push_name(*argument.split(" ", 1))
                raise _Refused("makes an object")
            case _:
                raise _Refused(f"uses {name}, which no tensor needs")

    def top(self, kind: type) -> Any:
        """The container on top of the stack."""
        if type(self.stack[-1]) is not kind:
            raise _Refused(f"changes something that is not a {kind.__name__}")
        return self.stack[-1]

    def pop_items(self) -> list[Any]:
        """All that was pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def set_items(self, items: list[Any]):
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Of all these only large numbers could be made to share a place in the dict.
            if type(key) not in KEYS or (type(key) is int and not -(1 << 60) < key < 1 << 60):
                raise _Refused("has keys that are neither text nor numbers")
            target[key] = value

    def push_name(self, module: Any, name: Any):
        if not (type(module) is type(name) is str):
            raise _Refused("names something that is not a class or function")
        if not self.allow_tensors or (module, name) not in NAMES:
            full = " ".join(f"{module}.{name}".split())[:200]
            raise _Refused(f"names {full}, which is not a tensor")
        self.stack.append(_Name(module, name))

    def call(self, function: Any, arguments: Any) -> Any:
        """What the few functions that tensors need would return."""
        if type(function) is not _Name or type(arguments) is not tuple:
            raise _Refused("calls something that is not a function")
        match (function.module, function.name), arguments:
            case (name, ()) if name == ORDERED_DICT:
                return {}
            case (name, (list(pairs),)) if name == ORDERED_DICT:
                self.stack.append({})
                self.set_items([part for key, value in pairs for part in (key, value)])
                return self.stack.pop()
            case (name, (storage, offset, shape, strides, *_)) if name == REBUILD_TENSOR:
                return _view(storage, offset, shape, strides)
            case (name, (tensor, *_)) if name == REBUILD_PARAMETER:
                return tensor
        raise _Refused("holds a tensor of an unknown kind")

    def storage(self, pid: Any) -> Storage:
        match pid:
            case ("storage", _Name("torch", kind), str(key), _, int(count)):
                pass
            case ("storage", _Name("torch", kind), str(key), _, int(count), None):
                pass  # before PyTorch 0.4: a part of a storage, or None
            case _:
                raise _Refused("holds a storage of an unknown kind")
        if not are_sizes((count,)):
            raise _Refused("holds a storage of an impossible size")
        storage = Storage(key, TORCH_STORAGES[kind], count)
        if self.storages.setdefault(key, storage) != storage:
            raise _Refused("describes one storage in two ways")
        return storage


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> TensorRef:
    plain = type(storage) is Storage and type(shape) is type(strides) is tuple
    if not plain or len(shape) != len(strides) or len(shape) > 32:
        raise _Refused("holds a tensor of an unknown kind")
    if not are_sizes((offset, *shape, *strides)):
        raise _Refused("holds a tensor with impossible sizes")
    if offset + span(shape, strides) > storage.count:
        raise _Refused("holds a tensor that reaches outside its storage")
    if math.prod(shape) > max(storage.count, MAX_REPEATED_ELEMENTS):
        raise _Refused("holds a tensor that is far larger than its data")
    return TensorRef(storage, offset, shape, strides)

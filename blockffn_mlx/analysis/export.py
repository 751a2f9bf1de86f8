"""Router scores for other tools: NumPy, CSV and Parquet, written as they come."""

import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..paths import replacing
from .reading import Tokens

# Of the long form: a row for each active expert. An expert without a row has the score 0.
COLUMNS = ("document", "position", "token_id", "token", "nats", "layer", "expert", "score")


class Shape(NamedTuple):
    """What is known before the first token.

    Attributes:
        tokens: Of all texts together.
        layers: Indices in the model of the layers that have a router.
        experts: In each of them.
    """

    tokens: int
    layers: list[int]
    experts: int


def check_format(path: Path):
    """Refuses what `exporting` could not write.

    Raises:
        ValueError: For another suffix, or Parquet without pyarrow.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path.name}: router scores are written as {', '.join(FORMATS)}")
    if path.suffix == ".parquet" and not find_spec("pyarrow"):
        raise ValueError("Parquet needs pyarrow: pip install pyarrow, or write .csv or .npz")


@contextmanager
def exporting(path: Path, shape: Shape) -> Iterator[Callable[[Tokens], None]]:
    """Writes router scores to a file that appears as a whole, or not at all.

    Args:
        path: Its suffix is the format. ".npz" holds dense arrays: `scores` float32 [N, L, E], and
            for each of N tokens `document`, `position`, `token_id`, `token` and `nats`; besides
            `layers` [L] and the `names` of documents. ".csv" and ".parquet" hold a row for each
            active expert of a token, see COLUMNS.
        shape: Of what will come.

    Yields:
        What takes the tokens, in order; it keeps none of the scores.

    Raises:
        ValueError: For another suffix, Parquet without pyarrow, or another number of tokens.
        OSError: If the file cannot be written.
    """
    check_format(path)
    with replacing(path) as file, FORMATS[path.suffix](file, shape) as take:
        yield take


@contextmanager
def _npz(file: BinaryIO, shape: Shape) -> Iterator[Callable[[Tokens], None]]:
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("document", "position", "token_id", "token", "nats")
    }
    names: dict[int, str] = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("scores.npy", "w", force_zip64=True) as member:
            dims = (shape.tokens, len(shape.layers), shape.experts)
            header = {"descr": "<f4", "fortran_order": False, "shape": dims}
            np.lib.format.write_array_header_1_0(member, header)

            def take(tokens: Tokens):
                count = len(tokens.ids)
                names[tokens.document] = tokens.name
                columns["document"].append(np.full(count, tokens.document, np.int32))
                columns["position"].append(np.arange(tokens.start, tokens.start + count))
                columns["token_id"].append(np.array(tokens.ids, np.int32))
                columns["token"].append(np.array(tokens.texts))
                columns["nats"].append(tokens.nats.astype(np.float32))
                member.write(tokens.scores.swapaxes(0, 1).astype("<f4").tobytes())

            yield take
        if sum(map(len, columns["token_id"])) != shape.tokens:
            raise ValueError(f"there are not {shape.tokens} tokens")
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        arrays["layers"] = np.array(shape.layers)
        arrays["names"] = np.array([names.get(i, "") for i in range(max(names) + 1)])
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def long_form(tokens: Tokens, layers: list[int]) -> dict[str, Any]:
    """The columns of the active experts, by token, layer and expert."""
    place, layer, expert = np.nonzero(tokens.scores.swapaxes(0, 1))
    return {
        "document": [tokens.name] * len(place),
        "position": (place + tokens.start).tolist(),
        "token_id": np.array(tokens.ids)[place].tolist(),
        "token": [tokens.texts[i] for i in place.tolist()],
        "nats": tokens.nats[place].tolist(),
        "layer": np.array(layers)[layer].tolist(),
        "expert": expert.tolist(),
        "score": tokens.scores[layer, place, expert].tolist(),
    }


@contextmanager
def _csv(file: BinaryIO, shape: Shape) -> Iterator[Callable[[Tokens], None]]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)

    def take(tokens: Tokens):
        rows = long_form(tokens, shape.layers)
        rows["nats"] = ["" if n != n else f"{n:.6g}" for n in rows["nats"]]
        rows["score"] = [f"{score:.9g}" for score in rows["score"]]
        writer.writerows(zip(*(rows[name] for name in COLUMNS), strict=True))

    try:
        yield take
    finally:
        text.detach()  # writes what it held back; the file is another's


@contextmanager
def _parquet(file: BinaryIO, shape: Shape) -> Iterator[Callable[[Tokens], None]]:
    import pyarrow
    from pyarrow import parquet

    kinds = (
        pyarrow.string(), pyarrow.int64(), pyarrow.int32(), pyarrow.string(), pyarrow.float32(),
        pyarrow.int16(), pyarrow.int16(), pyarrow.float32(),
    )  # fmt: skip
    schema = pyarrow.schema(list(zip(COLUMNS, kinds, strict=True)))
    with parquet.ParquetWriter(file, schema) as writer:
        yield lambda tokens: writer.write_table(
            pyarrow.table(long_form(tokens, shape.layers), schema=schema)
        )


FORMATS = {".npz": _npz, ".csv": _csv, ".parquet": _parquet}

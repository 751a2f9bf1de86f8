"""The text that MLX is given: it hashes every byte of it at every launch."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from blockffn_mlx.kernels import KERNELS, random_layer
from blockffn_mlx.kernels.text import filed, kernel_text, read_source, without_comments


def test_a_text_for_cuda_names_its_header_by_path(tmp_path, monkeypatch):
    monkeypatch.setattr("blockffn_mlx.device.cache_folder", lambda: tmp_path)
    text = kernel_text(KERNELS["routed_up"], "cuda")
    short = filed(text)
    path = Path(re.fullmatch(r'#include "(.*)"\n', short.header)[1])
    assert path.read_text() == text.header
    assert len(short.header + short.source) < 2000
    path.write_text("something else")
    assert filed(text) == short
    assert path.read_text() == text.header


def test_a_header_that_cannot_be_filed_stays_in_the_text(tmp_path, monkeypatch):
    text = kernel_text(KERNELS["route"], "cuda")
    (tmp_path / "kernels").write_text("a file in the way")
    monkeypatch.setattr("blockffn_mlx.device.cache_folder", lambda: tmp_path)
    assert filed(text) == text
    monkeypatch.setattr("blockffn_mlx.device.cache_folder", lambda: tmp_path / 'a "name"')
    assert filed(text) == text


def test_what_metal_compiles_has_no_comments():
    source = read_source("up.metal", {})
    short = without_comments(source)
    assert "//" in source
    assert "//" not in short
    assert len(short) < 0.8 * len(source)
    assert re.sub(r"\s*//.*|\s", "", source) == re.sub(r"\s", "", short)


READ_ONCE = {("best_tree", "root")}  # by one thread, once a draft


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_reads_an_array_that_lies_with_the_host(name, monkeypatch):
    """MLX's CUDA build keeps 8 bytes and less there (`on_device`)."""
    taken = {}

    def build(kernel, backend, packed, memory=0):
        def launch(*, inputs, output_shapes, output_dtypes, **_):
            names = kernel_text(kernel, backend, packed).input_names
            taken.update((n, array.nbytes) for n, array in zip(names, inputs, strict=True))
            return [mx.zeros(*out) for out in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr("blockffn_mlx.kernels.kernel.build_kernel", build)
    kernel = KERNELS[name]
    kernel.run(kernel.sample(random_layer(8, 12, 64, 64, 4, mx.float32)), "cuda")
    assert taken
    assert [n for n, size in taken.items() if size <= 8 and (name, n) not in READ_ONCE] == []

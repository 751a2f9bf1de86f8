"""Shared fixtures: golden checkpoints, converted once a session, and small random models."""

import shutil
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx.ffn import plan
from blockffn_mlx.kernels import verdicts
from helpers.models import GOLDEN

# What a shell starts in its background ignores Ctrl-C, and so would every command tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    mx.random.seed(7)


@pytest.fixture(autouse=True)
def nothing_of_another_test(monkeypatch, tmp_path_factory):
    """Tests put other kernels, devices and tile tables in place; none is known from before."""
    folder = tmp_path_factory.getbasetemp() / "verdicts"
    monkeypatch.setattr(verdicts, "folder", lambda: folder)
    yield
    plan.forget()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Converts a golden checkpoint on first use; returns the folder by name."""
    folders = {}

    def convert(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "mlx"
            bf.convert(str(GOLDEN / name), str(folders[name]))
        return folders[name]

    return convert


@pytest.fixture(scope="session")
def golden(converted):
    """Loads a golden checkpoint and what the original code computed with it."""

    def load(name: str):
        model, tokenizer = bf.load(str(converted(name)))
        return model, tokenizer, np.load(GOLDEN / name / "golden.npz")

    return load

"""A cache of the test's own, for conversions that are kept."""

import sys

import pytest

from blockffn_mlx.checkpoints import cache as model_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A model cache of the test's own."""
    monkeypatch.setattr(model_cache, "cache_folder", lambda: tmp_path / "cache")
    convert_module = sys.modules["blockffn_mlx.cli.convert"]
    monkeypatch.setattr(convert_module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"

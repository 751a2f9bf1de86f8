"""A cache of the test's own, for conversions that are kept."""

import pytest

from blockffn_mlx.checkpoints import cache as model_cache
from blockffn_mlx.cli import convert as convert_command


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A model cache of the test's own."""
    for module in (model_cache, convert_command):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"

"""What the tests of training share."""

import pytest

from helpers.packed_text import write_packed
from helpers.small_run import write_run


@pytest.fixture
def folder(tmp_path):
    """A folder with the small run's text and configuration."""
    return write_run(tmp_path)


@pytest.fixture
def packed(tmp_path):
    """A folder of packed tokens."""
    return write_packed(tmp_path)

"""Models on disk: reading, naming, converting, writing."""

from .reader import load_checkpoint

__all__ = ["load_checkpoint"]

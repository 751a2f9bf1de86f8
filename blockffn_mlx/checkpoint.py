"""Kept on purpose: scripts import the readers of checkpoints from here."""

from .checkpoints.reader import TensorInfo, load_checkpoint, load_pickle, open_checkpoint, read_json

__all__ = ["TensorInfo", "load_checkpoint", "load_pickle", "open_checkpoint", "read_json"]

"""Kept on purpose: the model_file of every converted folder imports these names from here."""

from .models.blockffn import Model, ModelArgs

__all__ = ["Model", "ModelArgs"]

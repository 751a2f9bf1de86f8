"""Lets stock mlx-lm run this folder: mlx_lm.generate --trust-remote-code."""

from blockffn_mlx.model import Model, ModelArgs  # noqa: F401

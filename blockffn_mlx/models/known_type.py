"""Makes the models' type known to transformers, which mlx-lm has read a folder's tokenizer.

Without it every stock command warns that the folder "can yield errors".
"""

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class BlockFFNConfig(PreTrainedConfig):
    """The fields of a config.json, whatever they are."""

    model_type = "blockffn"


if BlockFFNConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(BlockFFNConfig.model_type, BlockFFNConfig)

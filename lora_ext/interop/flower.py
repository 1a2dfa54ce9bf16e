"""Federated fine-tuning on Flower, under the name it had: :mod:`lora_ext.federated.flower`."""

from lora_ext.federated.flower import *  # noqa: F403
from lora_ext.federated.flower import __all__ as __all__

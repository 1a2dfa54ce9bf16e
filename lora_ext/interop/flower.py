"""Old import path of :mod:`lora_ext.federated.flower`, federated fine-tuning with Flower."""

from lora_ext.federated.flower import *  # noqa: F403
from lora_ext.federated.flower import __all__ as __all__

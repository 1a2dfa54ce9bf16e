"""Mixture-of-depths ensembles: the last layers of a language model predict together.

Source: "Tuning Language Models by Mixture-of-Depths Ensemble" (arXiv 2410.13077); not the
mixture of depths that lets tokens skip layers (arXiv 2404.02258).
"""

from typing import TYPE_CHECKING

from lora_ext._on_demand import on_demand

from ._model import apply, remove
from .config import InexactMixError, ModConfig
from .files import load, load_state_dict, save, state_dict, trainable_report
from .layers import DepthMixer

if TYPE_CHECKING:
    from ._output import ModOutput

__all__ = [
    "DepthMixer", "InexactMixError", "ModConfig", "ModOutput", "apply", "load", "load_state_dict",
    "remove", "save", "state_dict", "trainable_report",
]  # fmt: skip

__getattr__ = on_demand(__name__, _output="ModOutput")  # needs transformers

"""The wrapper for vLLM's CUDA platform: written, run on the emulator in parts, never on a GPU.

Off by default; ``LORA_EXT_VLLM=cuda`` chooses it. A captured graph follows the step: ids and ranks
are read from buffers that keep their place, and what the host knows of a step decides nothing in a
capture.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._updates import Updates

_Base: Any = importlib.import_module("vllm.lora.punica_wrapper.punica_gpu").PunicaWrapperGPU


class LoraExtWrapperCUDA(Updates, _Base):
    """vLLM's CUDA wrapper with the updates of lora_ext.

    What remains vLLM's: the buffers of ids, routed experts, and classification heads that an
    adapter replaces.
    """

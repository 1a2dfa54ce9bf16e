"""Wrapper for vLLM's CUDA platform: tested in parts on the emulator, never on a GPU.

Off by default; ``LORA_EXT_VLLM=cuda`` enables it. A captured graph uses the rows of each step: it
reads ids and ranks from buffers with a fixed address. During a capture, no decision depends on the
step's state on the host.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._updates import Updates

_Base: Any = importlib.import_module("vllm.lora.punica_wrapper.punica_gpu").PunicaWrapperGPU


class LoraExtWrapperCUDA(Updates, _Base):
    """vLLM's CUDA wrapper with the updates of lora_ext.

    vLLM still manages the buffers of ids, routed experts and classification heads that an adapter
    replaces.
    """

"""Punica wrapper for vLLM's CUDA platform: the object that computes the updates of LoRA layers.

Parts of it are tested on the emulator, but it has never run on a GPU. It is disabled by default and
enabled by ``LORA_EXT_VLLM=cuda``. A captured CUDA graph reads adapter ids and ranks from buffers
with fixed addresses, so each replay uses the rows of the current step. During a capture, no
decision depends on the current step's state on the host.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._updates import Updates

_Base: Any = importlib.import_module("vllm.lora.punica_wrapper.punica_gpu").PunicaWrapperGPU


class LoraExtWrapperCUDA(Updates, _Base):
    """vLLM's CUDA wrapper, with lora_ext's methods for the updates.

    vLLM's methods still manage the buffers of adapter ids, and still compute routed experts and the
    classification heads that adapters replace.
    """

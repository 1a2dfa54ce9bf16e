"""Import the compiled module, or say in one sentence why that is impossible and what helps."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch  # first: its libraries are then in the process, and ours carries no path to them


def build_info() -> dict[str, object]:
    """What ``setup.py`` wrote down about this build; empty when nothing was built."""
    try:
        info = importlib.import_module("lora_ext._build_info")
    except ImportError:
        return {}
    return {key: value for key, value in vars(info).items() if not key.startswith("_")}


def explain(error: ImportError) -> str:
    """The sentence for a failed import of ``lora_ext._C``."""
    info = build_info()
    if not info:
        return (
            "lora_ext is not built: run `pip install --no-build-isolation .` in its source folder, "
            "and start Python outside of it."
        )
    remedy = "run `pip install --no-build-isolation --force-reinstall --no-deps .` once more"
    if info["torch"] != torch.__version__:
        return f"lora_ext is built for torch {info['torch']}, found {torch.__version__}: {remedy}."
    return f"lora_ext._C cannot be loaded ({error}): {remedy}."


def load(name: str = "_C") -> ModuleType:
    """Import ``lora_ext.<name>``; its ops are registered with the dispatcher afterwards.

    ``LORA_EXT_DEBUG=1`` makes every launch on a device check its adapter ids, which waits for it.
    """
    try:
        module = importlib.import_module(f"lora_ext.{name}")
    except ImportError as error:
        raise ImportError(explain(error)) from error
    module.set_debug(os.environ.get("LORA_EXT_DEBUG", "0") == "1")
    return module

"""Import the compiled module, or say in one sentence why that is impossible and what helps."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch  # first: its libraries are then in the process, and ours carries no path to them


def build_info() -> dict[str, object]:
    """What ``setup.py`` wrote down about this build; empty when nothing was built."""
    try:
        info = importlib.import_module("lora_ext._build_info")
    except ImportError:
        return {}
    return {key: value for key, value in vars(info).items() if not key.startswith("_")}


def hidden() -> Path | None:
    """Another lora_ext that Python would find if it did not find this one: an installed package
    behind the checkout that Python was started in."""
    here = Path(__file__).resolve().parent
    found = [Path(entry, "lora_ext") for entry in sys.path]
    for finder in sys.meta_path:  # editable installs are on no path
        spec = finder.find_spec("lora_ext", None)
        if spec is not None and spec.origin is not None:
            found.append(Path(spec.origin).parent)
    for path in found:
        if path.resolve() != here and (path / "__init__.py").is_file():
            return path.resolve()
    return None


def explain(error: ImportError) -> str:
    """The sentence for a failed import of ``lora_ext._C``."""
    info = build_info()
    if not info:
        here, other = Path(__file__).resolve().parent, hidden()
        if other is not None:
            return (
                f"lora_ext in {here} is not built, and hides the one in {other}: start Python "
                f"outside of {here.parent}, or run `pip install --no-build-isolation -e .` there."
            )
        return (
            f"lora_ext in {here} is not built: run `pip install --no-build-isolation .` in its "
            "source folder, and start Python outside of it."
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


def vllm_mode() -> str:
    """``LORA_EXT_VLLM``: which of vLLM's platforms call lora_ext, "1" for the CPU by default."""
    return os.environ.get("LORA_EXT_VLLM", "1")

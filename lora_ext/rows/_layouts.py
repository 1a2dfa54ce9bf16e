"""Layouts of activations other than ``(sequences, tokens, features)``.

A layer receives only activations, and their shape may not determine their layout: for example,
``(4, 4, features)`` may be (sequences, tokens) or (tokens, sequences). All layers with an adapter
per row use this module: layers of a pool, layers with their own adapters, PEFT's layers, and layers
with masks per row or with several clients in a batch.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

#: By model type, a pattern for the names of modules with inputs of shape (tokens, sequences, ...).
#: Other modules are assumed to have sequences first. A layer of a pool corrects this assumption at
#: the first batch in which the numbers of tokens and sequences differ.
TOKENS_FIRST = {
    "xlnet": r"(^|\.)(layer\.\d+\.|word_embedding$)",
    "fsmt": r"(^|\.)layers\.\d+\.",
    "longformer": r"(^|\.)attention\.self\.",
    "led": r"(^|\.)longformer_self_attn\.",
}


def tokens_first(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules with tokens as the first dimension of their input.

    Every module with a config, such as an encoder or the base of a PEFT model, is looked up by its
    own model type.
    """
    found: set[str] = set()
    for root, module in model.named_modules():
        config = getattr(module, "config", None)
        pattern = TOKENS_FIRST.get(str(getattr(config, "model_type", None)))
        if pattern is not None:
            names = (name for name, _ in module.named_modules() if re.search(pattern, name))
            found.update(f"{root}.{name}".removeprefix(".") for name in names)
    return frozenset(found)


def set_tokens_first(model: nn.Module) -> None:
    """Set the attribute ``tokens_first`` of all layers with tokens as their first dimension."""
    for name in tokens_first(model):
        layer: Any = model.get_submodule(name)
        if hasattr(type(layer), "tokens_first"):
            layer.tokens_first = True

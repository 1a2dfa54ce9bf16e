"""Layouts of activations other than ``(sequences, tokens, features)``.

A layer sees only activations: ``(4, 4, features)`` may be four sequences of four tokens, or the
transpose. All layers with an adapter per row use this module: those of a pool, those with their own
adapters, PEFT's layers, and layers with masks per row or with several clients in a batch.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

#: Patterns of modules whose input is (tokens, sequences, ...), by model type. Other modules are
#: assumed to have sequences first; a pool's layer corrects this at a batch whose number of tokens
#: is not its number of sequences.
TOKENS_FIRST = {
    "xlnet": r"(^|\.)(layer\.\d+\.|word_embedding$)",
    "fsmt": r"(^|\.)layers\.\d+\.",
    "longformer": r"(^|\.)attention\.self\.",
    "led": r"(^|\.)longformer_self_attn\.",
}


def tokens_first(model: nn.Module) -> frozenset[str]:
    """Return the names of a model's modules whose input has tokens in the first dimension.

    A model inside another one, such as an encoder or a PEFT model's base, has its own type.
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
    """Set ``layer.tokens_first`` in a model's layers that have this attribute and this layout."""
    for name in tokens_first(model):
        layer: Any = model.get_submodule(name)
        if hasattr(type(layer), "tokens_first"):
            layer.tokens_first = True

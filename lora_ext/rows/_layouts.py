"""What the layers of a model see of a batch, where that is not ``(sequences, tokens, features)``.

A layer sees activations alone: four by four of them may be four sequences of four tokens, or the
same turned. Whoever gives rows adapters of their own asks here: the layers of a pool, names and ids
of layers with adapters of their own, PEFT's layers, masks for each row, clients of one batch.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

#: Modules whose input has its tokens in the first dimension and the sequences in the second, by
#: model type. Of others nothing is known, and sequences are taken to come first; a pool's layer
#: still learns it from a batch with another number of tokens than sequences.
TOKENS_FIRST = {
    "xlnet": r"(^|\.)(layer\.\d+\.|word_embedding$)",
    "fsmt": r"(^|\.)layers\.\d+\.",
    "longformer": r"(^|\.)attention\.self\.",
    "led": r"(^|\.)longformer_self_attn\.",
}


def tokens_first(model: nn.Module) -> frozenset[str]:
    """The names of a model's modules that see tokens first.

    A model inside another one, of encoder and decoder or PEFT's, counts by its own type.
    """
    found: set[str] = set()
    for root, module in model.named_modules():
        config = getattr(module, "config", None)
        pattern = TOKENS_FIRST.get(str(getattr(config, "model_type", None)))
        if pattern is not None:
            names = (name for name, _ in module.named_modules() if re.search(pattern, name))
            found.update(f"{root}.{name}".removeprefix(".") for name in names)
    return frozenset(found)


def tell(model: nn.Module) -> None:
    """Let those layers of a model know that have rows of their own: ``layer.tokens_first``."""
    for name in tokens_first(model):
        layer: Any = model.get_submodule(name)
        if hasattr(type(layer), "tokens_first"):
            layer.tokens_first = True

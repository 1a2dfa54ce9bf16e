"""The modules of a base model that adapters go on, told apart without importing transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

# These read the weights of their linear children without calling them: an adapter on such a child
# would be ignored, always or on torch's fast path for evaluation.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """In and out features of a linear layer, transformers' ``Conv1D`` included; None for others."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__.startswith("transformers."):
            rows, columns = module.weight.shape  # pyright: ignore[reportGeneralTypeIssues]
            return rows, columns  # pyright: ignore[reportReturnType]
    return None


def head_names(model: nn.Module) -> tuple[str | None, str | None]:
    """The names of the output head and of the classifier, where the model has them.

    PEFT's "all-linear" leaves the first out; and the second, where there is no first and the task
    is "SEQ_CLS".
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    candidates = (getattr(model, name, None) for name in ("score", "classifier"))
    classifier = next((module for module in candidates if module is not None), None)
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(head)), names.get(id(classifier))

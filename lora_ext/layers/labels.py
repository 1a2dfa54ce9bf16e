"""Labels of language models: what is not predicted, and which position predicts what."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: The label of a position that nothing is predicted for, as torch and transformers have it.
IGNORE = -100


def shift_labels(labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """Move labels from under their own inputs to the positions that predict them.

    transformers passes labels that equal the inputs; position ``t`` predicts input ``t + 1``, so
    ``shifted[..., t] = labels[..., t + 1]``, and the last position predicts nothing.

    Args:
        labels: ``(..., S)``, integers; what comes back has this shape and dtype.
        ignore: the label of the last position.
    """
    return F.pad(labels[..., 1:], (0, 1), value=ignore)

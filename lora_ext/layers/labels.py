"""Labels of language models: the ignored label, and the shift to the predicting position."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: Label of an ignored position, as in torch and transformers.
IGNORE = -100


def shift_labels(labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """Shift labels by one, to the positions that predict them.

    transformers passes labels that equal the inputs; position ``t`` predicts input ``t + 1``, so
    ``shifted[..., t] = labels[..., t + 1]``, and the last position predicts nothing.

    Args:
        labels: ``(..., S)``, integers.
        ignore: the label of the last position.

    Returns:
        ``(..., S)`` in the dtype of ``labels``.
    """
    return F.pad(labels[..., 1:], (0, 1), value=ignore)

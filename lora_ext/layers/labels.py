"""Labels of language models: the label to ignore, and the shift by one position."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: Label of an ignored position, as in torch and transformers.
IGNORE = -100


def shift_labels(labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """Return labels shifted by one position, so that each is at the position that predicts it.

    In transformers, the labels of a sequence are its input ids. Position ``t`` predicts input
    ``t + 1``, so ``shifted[..., t] = labels[..., t + 1]``. The last position has no label and gets
    ``ignore``.

    Args:
        labels: integer tensor ``(..., S)`` of labels for ``S`` positions.
        ignore: label for the last position.

    Returns:
        The shifted labels ``(..., S)``, in the dtype of ``labels``.
    """
    return F.pad(labels[..., 1:], (0, 1), value=ignore)

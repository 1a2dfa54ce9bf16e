"""Output of :class:`VoraForCausalLM`, a ``ModelOutput`` of transformers."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclasses.dataclass
class VoraOutput(ModelOutput):
    """Losses, logits and the mask of the vision tokens.

    Shape letters: ``B`` samples, ``T`` tokens per sample including those of images, ``V``
    vocabulary.

    Attributes:
        loss: ``lm_loss + distill_weight * distill_loss``, without terms that are None.
        logits: ``(B, T, V)``.
        lm_loss: mean cross entropy of the next tokens; None without labels, 0 if all are ignored.
        distill_loss: distillation loss of the blocks, before weighting; 0 for a batch without
            images, None if there are images but no states of a teacher.
        vision_mask: ``(B, T)`` bool, True for tokens of images.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    distill_loss: Tensor | None = None
    vision_mask: Tensor | None = None

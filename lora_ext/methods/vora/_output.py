"""What :class:`VoraForCausalLM` returns: an output of transformers."""

from __future__ import annotations

import dataclasses

from torch import Tensor

try:
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise ImportError(
        "VoraOutput: transformers is not installed; run `pip install transformers`"
    ) from error


@dataclasses.dataclass
class VoraOutput(ModelOutput):
    """Loss, logits, and which of them are of vision tokens.

    Attributes:
        loss: ``lm_loss + distill_weight * distill_loss``, of those that there are.
        logits: ``(B, T, V)``, T with the tokens of the images.
        lm_loss: mean cross entropy of the next tokens; None without labels, 0 where none counts.
        distill_loss: of the blocks, not weighted; None for images without a teacher, 0 for a batch
            without images.
        vision_mask: ``(B, T)`` bool.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    distill_loss: Tensor | None = None
    vision_mask: Tensor | None = None

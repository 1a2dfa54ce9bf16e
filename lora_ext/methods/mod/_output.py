"""Output of a model with MoD: the model's own fields, and the terms of the loss."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import Tensor

try:
    from transformers.utils.generic import ModelOutput
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ModOutput: transformers is not installed; run `pip install transformers`"
    ) from error


@dataclasses.dataclass
class ModOutput(ModelOutput):
    """Output of a model with MoD: the model's own output with the logits of the mixture, and the
    fields that MoD adds.

    The class of a model's output inherits from this class and from the model's own output class,
    and has the fields of both.

    Shape letters: ``B`` sequences, ``T`` positions, ``V`` vocabulary, ``k`` layers of the ensemble.

    Attributes:
        loss: ``ce_loss + distill_weight * distill_loss + layer_ce * layer_ce_loss``.
        logits: logits ``(B, T, V)`` of the mixture; log-probabilities if probabilities are mixed.
        ce_loss: value of the model's own loss function for these logits; 0 if all labels are
            ignored.
        distill_loss: divergence of the late layers (all but the last) from the last layer; None if
            its weight is 0.
        layer_ce_loss: mean cross entropy of the late layers; None if its weight is 0.
        routing_weights: ``(B, T, k)``, float32 (float64 for float64), weights of the layers.
        layer_losses: ``(k,)``, cross entropy of each layer's own logits; only in evaluation mode
            with labels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    ce_loss: Tensor | None = None
    distill_loss: Tensor | None = None
    layer_ce_loss: Tensor | None = None
    routing_weights: Tensor | None = None
    layer_losses: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses are created at run time, so pickle cannot import them. The model's own output
        # class is stored instead.
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _remade, (getattr(type(self), "own_class", None), values)


#: Fields that MoD adds to a model's output.
ADDED = tuple(f.name for f in dataclasses.fields(ModOutput) if f.name not in ("loss", "logits"))


@functools.cache
def output_class(own: type) -> type[ModOutput]:
    """Return a subclass of :class:`ModOutput` with the fields of a model's own output class."""
    made = type(ModOutput.__name__, (ModOutput, own), {"own_class": own, "__module__": __name__})
    return dataclasses.dataclass(made)


def mod_output(own: Any, **values: Any) -> ModOutput:
    """Return the output of a model as a :class:`ModOutput`, with ``values`` replaced or added."""
    kept = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
    return output_class(type(own))(**(kept | values))


def _remade(own: type | None, values: dict[str, Any]) -> ModOutput:
    return (ModOutput if own is None else output_class(own))(**values)

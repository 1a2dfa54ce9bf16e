"""Forward of a model with MoD (mixture-of-depths ensembles), and the hooks that mix its last
layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.layers import Head, measured_head

from ._objective import Layers, Targets, distillation, kept, layer_losses, mixed_logits, still
from .config import ModConfig
from .layers import DepthMixer


class Call:
    """State of one forward of a model with MoD; it is discarded after the forward."""

    def __init__(self, mixer: DepthMixer, replace: bool):
        self.mixer = mixer
        self.replace = replace  # True if the mixture replaces the last hidden state
        self.hiddens = [torch.empty(0)] * mixer.config.k  # hidden states before the norms
        self.last = self.weights = torch.empty(0)  # output of the decoder; weights of the layers
        self.grad = torch.is_grad_enabled()


#: State of the forward that runs in this thread, or None. The hooks store hidden states in it.
_running: ContextVar[Call | None] = ContextVar("lora_ext.mod_call", default=None)


def _call_of(mixer: DepthMixer) -> Call | None:
    call = _running.get()
    return call if call is not None and call.mixer is mixer else None


class Capture:
    """Forward hook that stores a block's output as hidden state ``place`` of the ensemble."""

    def __init__(self, mixer: DepthMixer, place: int):
        self.mixer, self.place = mixer, place

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        """Store the block's output if a forward of the model is running.

        Nothing is stored if a checkpoint recomputes the block in the backward pass. Raise
        RuntimeError inside a reentrant checkpoint, because outputs of blocks in such a checkpoint
        have no gradient.
        """
        call = _call_of(self.mixer)
        if call is None:
            return
        fits = not call.grad or torch.is_grad_enabled()
        expected = "blocks whose outputs carry gradients"
        remedy = "call gradient_checkpointing_enable({'use_reentrant': False})"
        found = f"a reentrant checkpoint; {remedy}"
        require(fits, "mod", "model", expected, found, RuntimeError)
        call.hiddens[self.place] = output[0] if isinstance(output, tuple) else output


class Mix:
    """Forward hook of the decoder (the module that contains the blocks and the final norm) that
    mixes the hidden states."""

    def __init__(self, mixer: DepthMixer):
        self.mixer = mixer

    def __call__(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        """Replace the decoder's last hidden state with the mixture if ``Call.replace`` is True;
        otherwise compute only the weights of the layers."""
        call = _call_of(self.mixer)
        if call is None:
            return None
        call.last = output[0]
        if not call.replace:
            call.weights = self.mixer.weights(call.hiddens)
            return None
        call.last, call.weights = self.mixer(call.hiddens)
        if isinstance(output, tuple):
            return (call.last, *output[1:])
        output.last_hidden_state = call.last
        return None


class Ensemble:
    """State of MoD on a model, stored in the model's ``__dict__``.

    Args:
        config: settings of MoD.
        mixer: mixer of the model.
        softcap: soft cap of the model's logits, or None.

    Attributes:
        explicit: True if the logits or probabilities of the layers are mixed, one chunk at a time;
            False if the hidden states are mixed.
        head: function from hidden states to logits; None until a forward has determined it.
    """

    KEY = "_lora_ext_mod"

    def __init__(self, config: ModConfig, mixer: DepthMixer, softcap: float | None):
        self.config = config
        self.mixer = mixer
        self.softcap = softcap
        self.head: Head | None = None
        linear = softcap is None and config.mix == "logit" and config.backend != "chunked"
        self.explicit = config.k > 1 and not linear

    def run(self, lm: Any, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Run the forward of the causal LM ``lm`` with the mixture.

        Args:
            lm: the model.
            forward: the model's own forward, without MoD.
            given: keyword arguments of the call.

        Returns:
            a :class:`ModOutput`, or a tuple if ``return_dict`` is False.
        """
        from ._output import mod_output

        asked = given.pop("return_dict", None)
        as_dict = getattr(lm.config, "return_dict", True) if asked is None else asked
        labels, keep = given.get("labels"), given.get("logits_to_keep", 0)
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if isinstance(labels, Tensor) and isinstance(inputs, Tensor) and isinstance(keep, int):
            shape, found = tuple(inputs.shape[:2]), tuple(labels.shape)
            require(keep != 0 or found == shape, "mod", "labels", f"shape (B, T) = {shape}", found)
        named = inspect.signature(forward).parameters
        own = dict(given)
        if self.explicit:  # the model's own logits are not used
            own.pop("labels", None)
            own |= {"logits_to_keep": 1} if "logits_to_keep" in named else {}
        call = Call(self.mixer, replace=self.config.k > 1 and not self.explicit)
        unknown = self.head is None and self.config.k > 1
        # measured_head computes the logits a second time from the same hidden states, and compares
        # both results. Dropout would make the results differ.
        with still(lm.get_output_embeddings()) if unknown else nullcontext():
            token = _running.set(call)
            try:
                output = forward(**own, return_dict=True)
            finally:
                _running.reset(token)
            if unknown and output.logits.numel():
                entered = kept(call.last, own.get("logits_to_keep", 0))
                self.head = measured_head("mod", lm, self.softcap, entered, output.logits)

        added: dict[str, Any] = {"routing_weights": call.weights}
        loss = output.loss
        if self.explicit:
            config, layers = self.config, self._layers(lm, given, call)
            weights = kept(call.weights, keep).to(layers.weight.device)
            logits = mixed_logits(layers, weights, config.vocab_chunk, config.mix == "prob")
            added["logits"] = logits
            if labels is not None:
                others = {name: value for name, value in given.items() if name not in named}
                others |= {"labels": labels, "vocab_size": logits.shape[-1]}
                loss = lm.loss_function(logits=logits, **others)
        if loss is not None:
            added |= self._terms(lm, given, call, loss)
        result = mod_output(output, **added)
        return result if as_dict else result.to_tuple()

    def _terms(self, lm: Any, given: dict[str, Any], call: Call, loss: Tensor) -> dict[str, Any]:
        """Return the loss and its terms by their field names in :class:`ModOutput`."""
        config, zero = self.config, torch.zeros_like(loss)
        targets = Targets.of(config, given, call.weights.shape[:-1], loss.device)
        ce = torch.where(targets.counted.any(), loss, zero)  # a mean over no labels is NaN
        terms: dict[str, Any] = {"ce_loss": ce, "loss": ce}
        wanted = config.distill_weight or config.layer_ce or not lm.training
        layers = self._layers(lm, given, call).flat() if config.k > 1 and wanted else None
        if config.distill_weight:
            distilled = zero if layers is None else distillation(config, layers, targets)
            terms["distill_loss"] = distilled
            terms["loss"] = terms["loss"] + config.distill_weight * distilled
        if config.layer_ce:
            late = zero if layers is None else layer_losses(config, layers.late(), targets).mean()
            terms["layer_ce_loss"] = late * targets.share
            terms["loss"] = terms["loss"] + config.layer_ce * terms["layer_ce_loss"]
        if not lm.training:
            with torch.no_grad():
                alone = ce[None] if layers is None else layer_losses(config, layers, targets)
                terms["layer_losses"] = alone
        return terms

    def _layers(self, lm: Any, given: dict[str, Any], call: Call) -> Layers:
        """Return the head and each layer's normed hidden states at the positions that
        ``logits_to_keep`` keeps."""
        head = self.head or Head(self.softcap)  # an empty batch does not determine the head
        weight, bias = head.parameters(lm)
        keep = given.get("logits_to_keep", 0)
        normed = [kept(n, keep).to(weight) for n in self.mixer.normed(call.hiddens)]
        return Layers(head, weight, bias, normed)


def with_mixture(lm: Any, own: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Run the forward of a causal LM with MoD, or the forward ``own`` of a model without MoD.

    A model has no MoD if ``mod.remove`` was called after a caller stored a reference to its
    forward.
    """
    ensemble: Ensemble | None = lm.__dict__.get(Ensemble.KEY)
    return own(**given) if ensemble is None else ensemble.run(lm, own, given)

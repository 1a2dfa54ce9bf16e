"""Training loss of a causal LM, computed in chunks of the vocabulary to save memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_ext import ops
from lora_ext._checks import require
from lora_ext._torch import compiles, evaluating
from lora_ext.rows import context_value

from ..base._spacing import remove_hooks
from ..labels import IGNORE, shift_labels
from ._forwards import Forward
from ._head import Head, causal_lm, measured_head, softcap_of

Model = TypeVar("Model", bound=nn.Module)

_WHERE = "chunked_loss"
_LOSS = "_loss_function"  # attribute of a model; if set, transformers uses it as the loss function


def chunked_loss(model: Model, enabled: bool = True, *, chunk: int = 8192) -> Model:
    """Make a causal LM compute its training loss in chunks of the logits; change it in place.

    A forward in training mode with ``labels`` then returns ``logits=None`` and the loss of
    transformers' ``ForCausalLMLoss``, which may depend on the arguments ``num_items_in_batch`` and
    ``shift_labels``. :func:`lora_ext.ops.chunked_cross_entropy` computes the product of the output
    layer, the softmax and their gradients for ``chunk`` columns at a time. For B sequences of T
    tokens and a vocabulary of V tokens, ``B T chunk`` logits are in memory instead of ``B T V``.
    Forwards in evaluation mode, without labels or without gradients do not change.

    Args:
        model: causal LM of transformers, which may be wrapped by PEFT or others, on one process or
            with DDP. Its output layer must be an ``nn.Linear``, which may be trained. Copies of the
            model also compute their loss in chunks.
        enabled: True to compute the loss in chunks, False to restore the model.
        chunk: number of columns of the logits that are in memory at a time.

    Returns:
        ``model``.

    Raises:
        ValueError: If the model is not a causal LM, ``chunk`` is below 1, or the loss is not
            transformers' own.
        NotImplementedError: If the model is an encoder-decoder model; the output layer has adapters
            or is quantised; FSDP2 has sharded the parameters; the logits are not the output layer's
            product, scaled or soft-capped; or the model does not pass its logits to a loss
            function.

    To detect unsupported models, the function runs the model once on four tokens. If all labels of
    a batch are ignored, the loss is 0 instead of NaN. Some trainers, such as TRL's, do not call the
    model's forward with labels, but compute the loss from the hidden states. Their training steps
    do not use this loss, and the first such step issues a warning.
    """
    lm = causal_lm(model, _WHERE)
    fits = isinstance(chunk, int) and chunk >= 1
    require(fits, _WHERE, "chunk", "an integer of at least 1", chunk)
    _remove(lm)
    if not enabled:
        return model
    layer, own = lm.get_output_embeddings(), lm.loss_function
    plain, found = type(layer) is nn.Linear, type(layer).__name__
    expected = "an output layer that is an nn.Linear"
    require(plain, _WHERE, "model", expected, found, NotImplementedError)
    name = getattr(own, "__name__", type(own).__name__)
    require(name == "ForCausalLMLoss", _WHERE, "model", "the loss ForCausalLMLoss", name)
    # FSDP2 leaves the parameters of its root module unsharded after a forward. An optimizer that is
    # created after the forward on four tokens would contain these unsharded parameters, which
    # training steps do not update.
    for path, parameter in lm.named_parameters():
        whole, expected = not hasattr(parameter, "full_tensor"), "parameters that are not sharded"
        found = f"a {type(parameter).__name__} in {path}; call {_WHERE} before fully_shard"
        require(whole, _WHERE, "model", expected, found, NotImplementedError)
    lm.__dict__[_LOSS] = loss = _Loss(layer, own, lm.__dict__.get(_LOSS), chunk)
    Forward.put_before(layer, _layer_forward)
    Forward.put_before(lm, _model_forward)
    if lm.base_model is not lm:
        loss.hook = lm.base_model.register_forward_pre_hook(_before_hidden_states)
    try:
        loss.head = _probed(lm, loss)
    except BaseException:
        _remove(lm)
        raise
    return model


@dataclass(eq=False)
class _Call:
    """State of a running forward of a model with a chunked loss."""

    layer: nn.Module  # output layer of the running model
    skip: bool  # True if the product of this layer is not computed
    entered: Tensor | None = None  # input of this layer: hidden states, (..., d)
    logits: Tensor | None = None  # logits that the model passed to its loss


_running: ContextVar[_Call | None] = ContextVar("lora_ext.chunked_loss", default=None)


def _call_of(layer: nn.Module) -> _Call | None:
    """Return the running forward of the model with output layer ``layer``, or None."""
    call = _running.get()
    return call if call is not None and call.layer is layer else None


@dataclass(eq=False)
class _Loss:
    """Loss function that computes the loss of a model in chunks; it is copied with the model."""

    layer: nn.Module
    own: Callable[..., Any]
    before: Callable[..., Any] | None  # loss that was set on the model; None for the class's loss
    chunk: int
    head: Head = field(default_factory=lambda: Head(None))
    hook: RemovableHandle | None = None  # handle of the hook `_before_hidden_states`

    def __call__(self, logits: Tensor, labels: Any, *args: Any, **given: Any) -> Any:
        """Return the loss; ``logits`` are not used if the output layer's product is skipped."""
        call = _call_of(self.layer)
        if call is not None:
            call.logits = logits
        if call is None or not call.skip:
            return self.own(logits, labels, *args, **given)
        layer: Any = self.layer
        hidden, weight, bias, scale = call.entered, layer.weight, layer.bias, self.head.scale
        if hidden is None or hasattr(weight, "full_tensor"):
            expected = f"the unsharded output layer from the call of {_WHERE}"
            found = f"another output layer, or a sharded weight ({type(weight).__name__})"
            raise NotImplementedError(f"{_WHERE}: model: expected {expected}, found {found}")
        ignore_index, count = given.get("ignore_index", IGNORE), given.get("num_items_in_batch")
        targets: Any = given.get("shift_labels")
        targets = shift_labels(labels, ignore_index) if targets is None else targets
        targets = targets.to(hidden.device).flatten()
        if scale != 1:
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        how = self.chunk, ignore_index, self.head.softcap
        loss = ops.chunked_cross_entropy(hidden.flatten(0, -2), weight, bias, targets, *how)
        return loss if count is None else loss * ((targets != ignore_index).sum() / count)


def _layer_forward(layer: nn.Module, own: Callable[..., Any], given: dict[str, Any]) -> Any:
    call = _call_of(layer)
    if call is None:
        return own(**given)
    call.entered = given["input"]
    # If the product is skipped, the model applies its operations on logits to the hidden states,
    # which differ from logits only in the size of the last dimension.
    return call.entered if call.skip else own(**given)


def _model_forward(lm: Any, own: Callable[..., Any], given: dict[str, Any]) -> Any:
    loss = lm.__dict__.get(_LOSS)
    if not (lm.training and torch.is_grad_enabled() and isinstance(loss, _Loss)):
        return own(**given)
    if given.get("labels") is None:
        if compiles():
            return own(**given)
        with context_value(_running, _Call(loss.layer, skip=False)):
            return own(**given)
    asked = given.pop("return_dict", None)
    as_dict = getattr(lm.config, "return_dict", True) if asked is None else asked
    call = _Call(loss.layer, skip=True)
    with context_value(_running, call):
        output = own(**given, return_dict=True)
    if call.entered is None and not compiles():
        _warn_of_another_head(lm.base_model)
    result = type(output)(**{name: x for name, x in output.items() if name != "logits"})
    return result if as_dict else result.to_tuple()


def _before_hidden_states(base: nn.Module, _: Any) -> None:
    """Warn if a training step directly calls ``base``, the model without its output layer."""
    outside = not compiles() and _running.get() is None
    if outside and base.training and torch.is_grad_enabled():
        _warn_of_another_head(base)


def _warn_of_another_head(base: nn.Module) -> None:
    if remove_hooks(base, _before_hidden_states):
        warnings.warn(
            f"{_WHERE}: model: expected training steps that use the loss of the model's forward, "
            f"found one that calls only {type(base).__name__} for its hidden states. TRL's "
            f"trainers do this and compute the loss in chunks themselves, so {_WHERE} has no "
            f"effect; remove it with {_WHERE}(model, enabled=False)",
            stacklevel=3,
        )


def _probed(lm: Any, loss: _Loss) -> Head:
    """Run a model on four tokens, and return its output head."""
    ids = torch.arange(4, device=lm.get_input_embeddings().weight.device)[None]
    call = _Call(loss.layer, skip=False)
    with evaluating(lm), torch.no_grad(), context_value(_running, call):
        lm(input_ids=ids, labels=ids)
    if call.logits is None or call.entered is None:
        expected = "a forward that passes its logits to loss_function"
        found = f"a {type(lm).__name__} that does not pass them"
        raise NotImplementedError(f"{_WHERE}: model: expected {expected}, found {found}")
    return measured_head(_WHERE, lm, softcap_of(lm), call.entered, call.logits)


def _remove(lm: Any) -> None:
    Forward.remove(lm, lambda run: run is _model_forward)
    remove_hooks(lm.base_model, _before_hidden_states)
    loss = lm.__dict__.get(_LOSS)
    if isinstance(loss, _Loss):
        Forward.remove(loss.layer, lambda run: run is _layer_forward)
        if loss.hook is not None:  # on another module if base_model was replaced
            loss.hook.remove()
        del lm.__dict__[_LOSS]
        if loss.before is not None:
            lm.__dict__[_LOSS] = loss.before

"""``apply`` and ``remove``, which add and remove a mixture-of-depths ensemble (MoD) of a causal LM.

The model is changed in place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext._checks import instance, require
from lora_ext.layers import Forward, causal_lm, decoder_layers, head_width, softcap_of

from ._ensemble import Capture, Ensemble, Mix, with_mixture
from .config import InexactMixError, ModConfig
from .layers import DepthMixer

Model = TypeVar("Model", bound=nn.Module)

NAME = "mod"  # name of the mixer as a child of the causal LM
_LFM2 = "embedding_norm"  # in LFM2, this is the final norm and not a norm of embeddings
_IGNORED = "keys_to_ignore_at_inference"  # list of the outputs that a Trainer does not gather


@dataclass(eq=False)
class Before:
    """State of a model before MoD, which :func:`remove` restores; a copy of the model has its
    own."""

    norm: nn.Module  # the model's final norm
    hooks: list[Any]
    flags: list[bool]  # requires_grad of the norm's parameters
    values: list[Tensor]  # copies of the norm's parameters if MoD trains them, otherwise empty
    ignored: list[str] | None  # list of ignored outputs that the model's configuration contained


_BEFORE = f"{Ensemble.KEY}_before"


def apply(model: Model, config: ModConfig | None = None) -> Model:
    """Make the last k layers of a causal LM predict as an ensemble, in place.

    Afterwards ``model(...)`` returns a :class:`ModOutput` with the logits of the mixture.
    ``generate`` and a Trainer use these logits. With labels, the loss includes the distillation
    term. All other output fields, such as the hidden states, are those of the model itself.

    New parameters are named ``mod.*`` and are trained; a copied final norm is trained only with
    ``train_final_norm``. The model's own parameters keep ``requires_grad``, except those of the
    final norm: they are trained only if ``share_final_norm`` and ``train_final_norm`` are both set.
    If the model also gets PEFT adapters, add the adapters before MoD, because PEFT freezes all
    existing parameters.

    Args:
        model: transformers causal LM: plain, a PEFT model (before or after
            :func:`lora_ext.from_peft`), or wrapped by :func:`lora_ext.nn.wrap`.
        config: settings; default is ``ModConfig()``.

    Returns:
        ``model``; :func:`remove` undoes the change.

    Raises:
        RuntimeError: If the model has MoD already: call :func:`remove` first.
        TypeError: If ``config`` is not a ModConfig, or the final norm computes neither RMSNorm nor
            LayerNorm.
        ValueError: If the model is not a causal LM, has fewer layers than k, or has an attribute
            ``mod`` that is not MoD.
        InexactMixError: If ``backend="hidden"`` and the head soft-caps its logits.
        NotImplementedError: If the model has an encoder in addition to the decoder, or a projection
            between the final norm and the head.

    The model is unchanged after an error.

    Source: arXiv 2410.13077.
    """
    config = ModConfig() if config is None else config
    instance("apply", "config", config, ModConfig)
    lm = causal_lm(model, "apply")
    from ._output import ADDED  # needs transformers, as the model does

    where = "apply"
    remedy = "one with MoD; call mod.remove(model) first"
    new = Ensemble.KEY not in lm.__dict__
    require(new, where, "model", "a model without MoD", remedy, RuntimeError)
    found = type(getattr(lm, NAME, None)).__name__
    require(not hasattr(lm, NAME), where, "model", f"no attribute {NAME!r}", f"a {found}")
    blocks = decoder_layers(lm)
    softcap = softcap_of(lm)
    stack = list(blocks)
    fits = config.k <= len(stack)
    require(fits, where, "k", f"at most the number of layers, {len(stack)}", config.k)
    exact = config.backend != "hidden" or softcap is None or config.k <= 1
    expected = f"'auto' or 'chunked' for a head that soft-caps its logits at {softcap}"
    found = "'hidden': mixing hidden states does not equal mixing such logits"
    require(exact, where, "backend", expected, found, InexactMixError)
    decoder = next(module for module in lm.modules() if blocks in module.children())
    norm = _final_norm(decoder, lm)
    # Some models, such as OPT-350m, project the normed hidden states before the head.
    width, head = norm.weight.shape[0], head_width(lm.get_output_embeddings())
    expected = f"a head with {width} input features, the width of the hidden states"
    found = f"{head} in {type(lm).__name__}, which projects them before the head"
    require(head == width, where, "model", expected, found, NotImplementedError)
    copies = [_copy(norm) for _ in range(config.k - config.share_final_norm)]
    mixer = DepthMixer([*copies, norm] if config.share_final_norm else copies, config)
    mixer.requires_grad_(True).train(lm.training)  # a shared norm is not a child of the mixer
    flags = [p.requires_grad for p in norm.parameters()]
    trained = config.share_final_norm and config.train_final_norm
    values = [p.detach().clone() for p in norm.parameters()] if trained else []
    norm.requires_grad_(trained)
    if not config.share_final_norm:
        mixer.final_norm.requires_grad_(config.train_final_norm)
    last = enumerate(stack[-config.k :])
    hooks = [block.register_forward_hook(Capture(mixer, place)) for place, block in last]
    hooks.append(decoder.register_forward_hook(Mix(mixer)))
    lm.add_module(NAME, mixer)
    ignored = lm.config.__dict__.get(_IGNORED)
    lm.__dict__[_BEFORE] = Before(norm, hooks, flags, values, ignored)
    lm.__dict__[Ensemble.KEY] = Ensemble(config, mixer, softcap)
    Forward.put_before(lm, with_mixture)
    # A Trainer must not gather MoD's outputs as predictions. A list in the configuration replaces
    # the Trainer's default list, so the new list also contains the default names.
    known = getattr(lm.config, _IGNORED, ["cache", "past_key_values"])
    setattr(lm.config, _IGNORED, [*known, *ADDED])
    return model


def remove(model: Model) -> Model:
    """Undo :func:`apply`: remove the hooks and modules of MoD, and restore the final norm's
    parameters and their ``requires_grad``.

    Returns:
        ``model``.

    Raises:
        RuntimeError: If the model has no MoD.
    """
    lm, _ = applied(model, "remove")
    before: Before = lm.__dict__.pop(_BEFORE)
    del lm.__dict__[Ensemble.KEY]
    for hook in before.hooks:
        hook.remove()
    own = list(before.norm.parameters())
    for parameter, flag in zip(own, before.flags, strict=True):
        parameter.requires_grad_(flag)
    with torch.no_grad():
        for parameter, value in zip(own, before.values, strict=False):
            parameter.copy_(value)
    Forward.remove(lm, lambda run: run is with_mixture)
    delattr(lm, NAME)
    lm.config.__dict__.pop(_IGNORED, None)
    if before.ignored is not None:
        setattr(lm.config, _IGNORED, before.ignored)
    return model


def applied(model: nn.Module, where: str) -> tuple[Any, Ensemble]:
    """Return the causal LM in ``model`` and its ensemble; raise RuntimeError if the model has no
    MoD."""
    for module in model.modules():
        ensemble = module.__dict__.get(Ensemble.KEY)
        if ensemble is not None:
            return module, ensemble
    found = f"{type(model).__name__} without MoD"
    raise RuntimeError(f"{where}: model: expected a model with MoD from mod.apply, found {found}")


def _final_norm(decoder: nn.Module, lm: Any) -> Any:
    """Return the norm between the last block and the head.

    This norm is the last child of the decoder whose weight has the width of the hidden states,
    except norms of embeddings.
    """
    width = lm.config.get_text_config(decoder=True).hidden_size
    children = dict(decoder.named_children())
    for name, child in reversed(children.items()):
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (width,):
            if "emb" not in name or name == _LFM2:
                return child
    expected = f"a final norm like RMSNorm or LayerNorm, with a weight of shape ({width},)"
    found = {name: type(child).__name__ for name, child in children.items()}
    raise TypeError(f"apply: model: expected {expected}, found {found}")


def _copy(norm: Any) -> nn.Module:
    """Return a copy of a norm without its hooks."""
    inner = getattr(norm, "modules_to_save", None)  # PEFT's wrapper around a norm that it trains
    made = copy.deepcopy(norm if inner is None else inner[norm.active_adapter])
    for module in made.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return made

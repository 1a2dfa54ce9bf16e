"""The layers of a model that see: put in, folded into its weights, taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lora_ext._checks import instance, require
from lora_ext.layers import Swap, decoder_layers, is_adapted, matches_suffix
from lora_ext.rows import PoolLayer

from .config import VoraConfig
from .layers import VoraLinear

Model = TypeVar("Model", bound=nn.Module)

KEY = "_lora_ext_vora"
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Applied:
    """What :func:`apply` did to a language model, which keeps it; a deep copy has a copy."""

    config: VoraConfig
    swap: Swap
    requires_grad: dict[str, bool]  # of the model's own parameters, as it was
    merged: bool = False

    @property
    def layers(self) -> dict[str, VoraLinear]:
        """VoRA's layers by their names in the language model, in its order."""
        placed: Any = self.swap.placed
        return placed

    def require_apart(self, where: str) -> None:
        """Raise RuntimeError where a layer's adapter is merged into its base weight by hand."""
        for name, layer in self.layers.items():
            expected = "an adapter apart from the base weight"
            found = f"{layer.merged_adapters} merged into it; unmerge it first"
            require(not layer.merged, f"vora.{where}", name, expected, found, RuntimeError)


def apply(model: Model, config: VoraConfig, *, autocast_adapter_dtype: bool = True) -> Model:
    """Let the first blocks of a language model see, and freeze all else.

    Works in place: each target in the first ``n_blocks`` blocks becomes a :class:`VoraLinear`
    around the very module. At first the model is what it was, bit for bit; the factors of these
    layers are all that is trained.

    Args:
        model: a causal LM of transformers, without adapters.
        config: which layers, their rank and route.
        autocast_adapter_dtype: beside a base weight of 16 bits, hold the factors in float32. False
            takes the dtype of the base weight, which is faster.

    Returns:
        ``model``; :func:`remove` undoes it, :func:`merge` makes it one model.

    Raises:
        ValueError: the model has fewer blocks than ``n_blocks``, or none of ``target_modules`` in
            them. TypeError: a target that is no linear layer. RuntimeError: applied already, or
            the model has adapters of another kind. The model is then as it was.

    Source: arXiv 2503.20680.
    """
    instance("vora.apply", "config", config, VoraConfig)
    state: Applied | None = model.__dict__.get(KEY)
    expected = "one without VoRA's layers"
    found = "them; call vora.remove first"
    require(state is None or state.merged, "vora.apply", "model", expected, found, RuntimeError)
    targets = _targets(model, config)
    layers: dict[str, nn.Module] = {}
    for name, module in targets.items():
        dtype = getattr(getattr(module, "weight", None), "dtype", None)
        wide = torch.float32 if autocast_adapter_dtype and dtype in _HALVES else None
        try:
            layers[name] = VoraLinear.from_linear(
                module, config.rank, config.route, config.scale, adapter_dtype=wide
            )
        except TypeError as error:
            raise TypeError(f"vora.apply: target_modules: {name}: {error}") from error
    # Before the swap, while every parameter of the model is its own.
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.__dict__[KEY] = Applied(config, Swap(model, layers, "vora.apply"), flags)
    return model


def remove(model: Model) -> Model:
    """Undo :func:`apply`: every module is the very object that it was, and trains if it did.

    Args:
        model: what was given to :func:`apply`, or the :class:`VoraForCausalLM` around it.

    Raises:
        RuntimeError: nothing was applied, it was merged (:func:`merge`), layers of it are merged
            by hand, or a layer was replaced since. The model is then as it was.
    """
    language = language_model(model)
    state = applied("remove", model)
    state.require_apart("remove")
    state.swap.restore(language, "vora.remove")
    _restore_flags(language, state)
    del language.__dict__[KEY]
    return model


def merge(model: Model, force: bool = False) -> Model:
    """Fold the adapters into the weights of the language model: ``W + scale B A``, rounded once.

    No :class:`VoraLinear` is left, every parameter is trained that was before :func:`apply`, and
    there is no way back. What reads images stays: embedding and mask are the model's eyes still.

    Args:
        model: as for :func:`remove`.
        force: merge route "vision" too, which changes what text tokens compute.

    Returns:
        ``model``.

    Raises:
        UnmergeableRouteError: route "vision" without ``force``. RuntimeError: nothing was applied,
            it is merged already, or layers of it are merged by hand. NotImplementedError: a
            quantised base weight. ValueError: a weight that is computed from others, or that
            other modules have too. The model is then as it was.

    Source: arXiv 2503.20680.
    """
    language = language_model(model)
    state = applied("merge", model)
    state.require_apart("merge")
    layers = state.layers
    for name, layer in layers.items():
        try:
            layer.check_merge(force)
            layer.base_weight.check_writable("merge")
        except (RuntimeError, ValueError) as error:
            raise type(error)(f"vora.merge: {name}: {error}") from error
    state.swap.check(language, "vora.merge")
    _check_shared(language, layers)
    for layer in layers.values():
        layer.merge(force, keep_copy=False)
    state.swap.restore(language, "vora.merge")
    _restore_flags(language, state)
    for layer in layers.values():
        base: Any = layer.base_layer
        if layer.has_extra_bias:  # it may be a new parameter of the model
            base.bias.requires_grad_(base.weight.requires_grad)
    # What is gone is not kept alive; that it was merged is remembered.
    language.__dict__[KEY] = Applied(state.config, Swap(language, {}, "vora.apply"), {}, True)
    return model


def language_model(model: Any) -> Any:
    """The language model inside a :class:`VoraForCausalLM`, and any other model as it is."""
    return model.model if getattr(model, "is_vora_wrapper", False) else model


def applied(where: str, model: nn.Module) -> Applied:
    """What :func:`apply` left on a model; a RuntimeError where that is nothing, or was merged
    since."""
    state: Applied | None = language_model(model).__dict__.get(KEY)
    if state is None or state.merged:
        folded = "that vora.merge has folded them into its weights"
        found = "none; call vora.apply first" if state is None else folded
        raise RuntimeError(f"vora.{where}: model: expected one with VoRA's layers, found {found}")
    return state


def _targets(model: nn.Module, config: VoraConfig) -> dict[str, nn.Module]:
    """The modules to adapt, by name."""
    for name, module in model.named_modules():
        fits = not is_adapted(module) and not isinstance(module, PoolLayer)
        found = f"{type(module).__name__} at {name!r}"
        require(fits, "vora.apply", "model", "one without adapters", found, RuntimeError)
    blocks = decoder_layers(model)
    expected = f"at most the model's {len(blocks)} blocks"
    require(config.n_blocks <= len(blocks), "vora.apply", "n_blocks", expected, config.n_blocks)
    names = {module: name for name, module in model.named_modules()}
    targets: dict[str, nn.Module] = {}
    for block in blocks[: config.n_blocks]:
        for inner, module in block.named_modules():
            if inner and matches_suffix(inner, config.target_modules):
                targets[names[module]] = module
    place = f"the first {config.n_blocks} blocks of {type(model).__name__}"
    expected = f"modules in {place} to match {config.target_modules}"
    require(targets, "vora.apply", "target_modules", expected, "none")
    return targets


def _check_shared(language: nn.Module, layers: dict[str, VoraLinear]) -> None:
    """Refuse a weight that other modules have too: they would compute with its update as well."""
    holders: dict[int, list[str]] = {}
    for name, parameter in language.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        found = holders[id(layer.base_layer.weight)]
        expected = "a weight of its own"
        require(len(found) <= 1, "vora.merge", name, expected, f"that it is all of {found}")


def _restore_flags(language: nn.Module, state: Applied) -> None:
    for name, parameter in language.named_parameters():
        if name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])

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
        expected = "an adapter apart from the base weight"
        for name, layer in self.layers.items():
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
    where = "vora.apply"
    instance(where, "config", config, VoraConfig)
    state: Applied | None = model.__dict__.get(KEY)
    new = state is None or state.merged
    found = "them; call vora.remove first"
    require(new, where, "model", "one without VoRA's layers", found, RuntimeError)
    layers: dict[str, nn.Module] = {}
    for name, module in _targets(where, model, config).items():
        dtype = getattr(getattr(module, "weight", None), "dtype", None)
        wide = torch.float32 if autocast_adapter_dtype and dtype in _HALVES else None
        try:
            layers[name] = VoraLinear.from_linear(
                module, config.rank, config.route, config.scale, adapter_dtype=wide
            )
        except TypeError as error:
            raise TypeError(f"{where}: target_modules: {name}: {error}") from error
    # Before the swap, while every parameter of the model is its own.
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.__dict__[KEY] = Applied(config, Swap(model, layers, where), flags)
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
    where = "vora.merge"
    state = applied("merge", model)
    state.require_apart("merge")
    layers = state.layers
    holders: dict[int, list[str]] = {}
    for name, parameter in language.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        try:
            layer.check_merge(force)
            layer.base_weight.check_writable("merge")
        except (RuntimeError, ValueError) as error:
            raise type(error)(f"{where}: {name}: {error}") from error
        # Other modules that have the weight would compute with its update as well.
        found = holders[id(layer.base_layer.weight)]
        require(len(found) <= 1, where, name, "a weight of its own", f"that it is all of {found}")
    state.swap.check(language, where)
    for layer in layers.values():
        layer.merge(force, keep_copy=False)
    state.swap.restore(language, where)
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


def _targets(where: str, model: nn.Module, config: VoraConfig) -> dict[str, nn.Module]:
    """Return the modules to adapt, by name."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        fits = not is_adapted(module)
        found = f"{type(module).__name__} at {name!r}"
        fits = fits and not isinstance(module, PoolLayer)
        require(fits, where, "model", "one without adapters", found, RuntimeError)
        names[module] = name
    blocks = decoder_layers(model)
    n = config.n_blocks
    require(n <= len(blocks), where, "n_blocks", f"at most the model's {len(blocks)} blocks", n)
    inside = (pair for block in blocks[:n] for pair in block.named_modules() if pair[0])
    kinds = config.target_modules
    targets = {names[m]: m for inner, m in inside if matches_suffix(inner, kinds)}
    expected = f"modules in the first {n} blocks of {type(model).__name__} to match {kinds}"
    require(targets, where, "target_modules", expected, "none")
    return targets


def _restore_flags(language: nn.Module, state: Applied) -> None:
    for name, parameter in language.named_parameters():
        if name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])

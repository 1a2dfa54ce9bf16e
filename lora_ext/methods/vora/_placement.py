"""Functions that add VoRA layers to a language model, merge these layers into the model's weights,
and remove them."""

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
    """State that :func:`apply` stores on a language model; a deep copy of the model copies it."""

    config: VoraConfig
    swap: Swap
    requires_grad: dict[str, bool]  # flags of the model's parameters before `apply`
    merged: bool = False

    @property
    def layers(self) -> dict[str, VoraLinear]:
        """VoRA layers by their names in the language model, in the order of its modules."""
        placed: Any = self.swap.placed
        return placed

    def require_apart(self, where: str) -> None:
        """Raise RuntimeError if a layer's adapter is merged into its base weight by
        :meth:`VoraLinear.merge`."""
        expected = "an adapter that is not merged into the base weight"
        for name, layer in self.layers.items():
            found = f"{layer.merged_adapters} merged; unmerge it first"
            require(not layer.merged, f"vora.{where}", name, expected, found, RuntimeError)


def apply(model: Model, config: VoraConfig, *, autocast_adapter_dtype: bool = True) -> Model:
    """Add VoRA's layers to the first blocks of a language model and freeze its other parameters.

    The model is changed in place: each target module in the first ``n_blocks`` blocks is wrapped in
    a :class:`VoraLinear`. The outputs remain bitwise the same until the layers are trained. Only
    the factors of these layers are trainable.

    Args:
        model: transformers causal LM without adapters.
        config: settings of the layers, such as rank and route.
        autocast_adapter_dtype: whether to store the factors in float32 if the base weight has 16
            bits. If False, the factors have the dtype of the base weight, which is faster.

    Returns:
        ``model``; :func:`remove` undoes the change, :func:`merge` merges the adapters.

    Raises:
        ValueError: If the model has fewer than ``n_blocks`` blocks, or no ``target_modules`` in
            them.
        TypeError: If a target is not a linear layer.
        RuntimeError: If the model already has VoRA layers or other adapters.

    The model is unchanged after an error.

    Source: arXiv 2503.20680.
    """
    where = "vora.apply"
    instance(where, "config", config, VoraConfig)
    state: Applied | None = model.__dict__.get(KEY)
    new = state is None or state.merged
    found = "a model with VoRA layers; call vora.remove first"
    require(new, where, "model", "a model without VoRA layers", found, RuntimeError)
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
    # Read before the swap, which adds the parameters of VoRA's layers.
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.__dict__[KEY] = Applied(config, Swap(model, layers, where), flags)
    return model


def remove(model: Model) -> Model:
    """Undo :func:`apply`: restore the original modules and the ``requires_grad`` flags.

    Args:
        model: model that was passed to :func:`apply`, or the :class:`VoraForCausalLM` around it.

    Returns:
        ``model``.

    Raises:
        RuntimeError: If nothing was applied, if the adapters were merged (by :func:`merge` or by
            :meth:`VoraLinear.merge`), or if a layer has been replaced since. The model is then
            unchanged.
    """
    language = language_model(model)
    state = applied("remove", model)
    state.require_apart("remove")
    state.swap.restore(language, "vora.remove")
    _restore_flags(language, state)
    del language.__dict__[KEY]
    return model


def merge(model: Model, force: bool = False) -> Model:
    """Merge the adapters into the weights of the language model: ``W + scale B A``, rounded once.

    Afterwards the model contains no :class:`VoraLinear`, and ``requires_grad`` of its parameters is
    as before :func:`apply`. This cannot be undone. The vision embedding and the attention mask of
    images are still used.

    Args:
        model: as for :func:`remove`.
        force: whether to merge route "vision" too, which changes the outputs for text tokens.

    Returns:
        ``model``.

    Raises:
        UnmergeableRouteError: If the route is "vision" without ``force``.
        RuntimeError: If nothing was applied, or the adapters were merged already (by this function
            or by :meth:`VoraLinear.merge`).
        NotImplementedError: If a base weight is quantised.
        ValueError: If a weight is computed from other tensors or shared with other modules.

    The model is unchanged after an error.

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
        # A merge would also change the outputs of other modules that share the weight.
        found = holders[id(layer.base_layer.weight)]
        require(len(found) <= 1, where, name, "a weight that is not shared", f"a weight of {found}")
    state.swap.check(language, where)
    for layer in layers.values():
        layer.merge(force, keep_copy=False)
    state.swap.restore(language, where)
    _restore_flags(language, state)
    for layer in layers.values():
        base: Any = layer.base_layer
        if layer.has_extra_bias:  # The bias may be a new parameter of the model.
            base.bias.requires_grad_(base.weight.requires_grad)
    # This releases the layers and records that they were merged.
    language.__dict__[KEY] = Applied(state.config, Swap(language, {}, "vora.apply"), {}, True)
    return model


def language_model(model: Any) -> Any:
    """Return the language model of a :class:`VoraForCausalLM`; return any other model unchanged."""
    return model.model if getattr(model, "is_vora_wrapper", False) else model


def applied(where: str, model: nn.Module) -> Applied:
    """Return the state of :func:`apply`; raise RuntimeError if :func:`apply` was not called or the
    layers were merged."""
    state: Applied | None = language_model(model).__dict__.get(KEY)
    if state is None or state.merged:
        merged = "a model whose VoRA layers vora.merge has merged"
        found = "no VoRA layers; call vora.apply first" if state is None else merged
        raise RuntimeError(f"vora.{where}: model: expected a model with VoRA layers, found {found}")
    return state


def _targets(where: str, model: nn.Module, config: VoraConfig) -> dict[str, nn.Module]:
    """Return the modules to adapt, by name."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        fits = not is_adapted(module)
        found = f"{type(module).__name__} at {name!r}"
        fits = fits and not isinstance(module, PoolLayer)
        require(fits, where, "model", "a model without adapters", found, RuntimeError)
        names[module] = name
    blocks = decoder_layers(model)
    n = config.n_blocks
    require(n <= len(blocks), where, "n_blocks", f"at most the number of blocks, {len(blocks)}", n)
    inside = (pair for block in blocks[:n] for pair in block.named_modules() if pair[0])
    kinds = config.target_modules
    targets = {names[m]: m for inner, m in inside if matches_suffix(inner, kinds)}
    expected = f"names of modules in the first {n} blocks of {type(model).__name__}"
    require(targets, where, "target_modules", expected, kinds)
    return targets


def _restore_flags(language: nn.Module, state: Applied) -> None:
    for name, parameter in language.named_parameters():
        if name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])

"""Functions that add trainable adapters to a model without PEFT, and remove them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext._checks import require, require_flags
from lora_ext.rows import PoolLayer, _generation, _layouts, layer_names

from .._lora_layer import LoraLayer
from ..base._modules import READS_WEIGHTS, head_names, linear_size, linear_sizes
from ..base._spacing import remove_hooks, space_products, unspace_products
from ..labels import IGNORE
from ..lora_conv import LoraConv
from ..lora_embedding import LoraEmbedding
from ..lora_linear import LoraLinear
from ._lora_config import LoraConfig
from ._swap import Swap

Model = TypeVar("Model", bound=nn.Module)

_KEY = "_lora_ext_wrap"
#: Fields of LoraConfig that are arguments of ``add_adapter`` with the same name.
_SETTINGS = (
    "lora_dropout", "init_lora_weights", "preserve_base_output", "use_rslora", "use_dora",
    "lora_bias",
)  # fmt: skip


@dataclass(eq=False)
class _Wrap:
    """State of a wrapped model, stored in the model's ``__dict__``."""

    swap: Swap
    requires_grad: dict[str, bool]  # flag of each parameter before wrapping
    spaced: list[nn.Module] = field(default_factory=list)  # layers with hooks of space_products


def wrap(
    model: Model,
    config: LoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> Model:
    """Add trainable adapters to a model and freeze the rest, as PEFT's ``get_peft_model`` does.

    The model is changed in place, without importing peft. :func:`unwrap` undoes the change. Linear
    layers (including transformers' ``Conv1D``), embeddings and patch-embedding convolutions are
    replaced by :class:`LoraLinear`, :class:`LoraEmbedding` and :class:`LoraConv`. Only the
    parameters of the adapter are trained. A classifier, which PEFT also trains for some tasks,
    stays frozen. The keys of ``state_dict`` are those of PEFT without the prefix
    ``base_model.model.``.

    Call the function again with another name to add another adapter. The new adapter is inactive
    and frozen until you call the ``set_adapter`` method of each layer.

    Args:
        model: module that has no adapters, or only those that earlier calls added.
        config: configuration with the modules to adapt and the settings of their adapters.
        adapter_name: name of the new adapter, without dots.
        autocast_adapter_dtype: whether an adapter is stored in float32 if its base weight has 16
            bits, as in PEFT. If False, it has the dtype of the base weight, which is faster.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``config`` is not a :class:`LoraConfig`, or
            ``autocast_adapter_dtype`` is not a bool.
        RuntimeError: If the model has adapters that ``wrap`` did not add.
        ValueError: If the configuration matches no module, or a module that cannot have an adapter;
            if an invocation token is outside the vocabulary; or if :meth:`LoraLinear.add_adapter`
            raises a ValueError.
        NotImplementedError: If the windows of a convolution overlap, or a parent module reads the
            weight of a layer instead of calling the layer.

    After any error the model is unchanged.

    Sources: LoRA (Hu et al. 2021); https://github.com/huggingface/peft for the rules.
    """
    known, expected = isinstance(config, LoraConfig), "a lora_ext.LoraConfig"
    require(known, "wrap", "config", expected, type(config), TypeError)
    require_flags("wrap", autocast_adapter_dtype=autocast_adapter_dtype)
    state: _Wrap | None = model.__dict__.get(_KEY)
    modules = _modules(model, {} if state is None else state.swap.placed)
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    config.check_vocabulary("wrap", getattr(embeddings, "num_embeddings", None))
    targets = _targets(model, modules, config)
    sizes, unused = config.ranks_and_alphas(targets)
    if unused:
        warnings.warn(f"wrap: config: {', '.join(unused)} matches no adapted module", stacklevel=2)
    adapted: dict[str, LoraLayer] = {}
    shared = {name: getattr(config, name) for name in _SETTINGS}
    shared["alora_invocation_tokens"] = config.invocation
    try:
        for name in targets:
            dtype = getattr(getattr(_base(modules[name]), "weight", None), "dtype", None)
            wide = autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16)
            own: dict[str, Any] = {"adapter_dtype": torch.float32 if wide else None}
            own["r"], own["lora_alpha"] = sizes[name]
            adapted[name] = _adapt(name, modules[name], adapter_name, shared | own)
    except BaseException:
        for layer in adapted.values():
            layer.delete_adapter(adapter_name)  # also restores the base weight
        raise
    new = {name: layer for name, layer in adapted.items() if layer is not modules[name]}
    if state is None:
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        state = model.__dict__[_KEY] = _Wrap(Swap(model, new, "wrap"), flags)
    else:
        state.swap.add(model, new)
        for layer in new.values():
            layer.set_adapter([])
    state.spaced += space_products(model)
    _layouts.set_tokens_first(model)
    if config.invocation and _warn_of_labels not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_warn_of_labels, with_kwargs=True)
    return model


def unwrap(model: Model) -> Model:
    """Undo :func:`wrap`: restore all modules and ``requires_grad`` flags, and return ``model``.

    A base weight that an initialisation (such as "pissa") has changed is restored bit for bit.

    Raises:
        RuntimeError: If the model is not wrapped, a layer has been replaced since, or adapters are
            merged. The model is then unchanged.
    """
    state: _Wrap | None = model.__dict__.get(_KEY)
    if state is None:
        found = f"a {type(model).__name__} that is not wrapped"
        raise RuntimeError(f"unwrap: model: expected a wrapped model, found {found}")
    layers: dict[str, Any] = state.swap.placed
    for name, layer in layers.items():
        expected = "adapters that are not merged"
        found = f"{layer.merged_adapters} merged into the base weight; unmerge them first"
        require(not layer.merged, "unwrap", name, expected, found, RuntimeError)
    state.swap.restore(model, "unwrap")
    for layer in layers.values():
        if layer._before_init is not None:
            layer.restore_base_weight()
    for name, parameter in model.named_parameters():
        if name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])
    unspace_products(state.spaced)
    remove_hooks(model, _warn_of_labels)
    del model.__dict__[_KEY]
    return model


def _warn_of_labels(_model: nn.Module, _args: Any, given: dict[str, Any]) -> None:
    """Warn before a forward if no row has a label after the start of its activated adapter."""
    labels, found = given.get("labels"), _generation.activated_in(layer_names.handle)
    if not isinstance(labels, Tensor) or found is None or found.starts is None:
        return
    starts = [
        start
        for place, start in zip(found.entries, found.starts, strict=True)
        if place >= 0 and found.invocations[place]
        for _ in range(found.repeat)
    ]
    # The label at a position is predicted by the token before it, hence the `+ 1`.
    if starts and not any(
        start is not None and bool((row[start + 1 :] != IGNORE).any())
        for start, row in zip(starts, labels, strict=False)
    ):
        warnings.warn(
            "wrap: labels: expected labels after the start of an activated adapter "
            f"(alora_invocation_tokens), found none in any row: {found.names!r:.200} would learn "
            "nothing from this batch",
            stacklevel=4,
        )


def _modules(model: nn.Module, wrapped: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules that may be adapted, by name: all except the parts of adapted layers."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        ours = wrapped.get(name) is module
        peft = any(base.__module__.startswith("peft.") for base in type(module).__mro__)
        foreign = peft or isinstance(module, PoolLayer)
        foreign |= isinstance(module, LoraLayer) and not ours
        expected, kind = "a model whose only adapters are those of wrap", type(module).__name__
        require(not foreign, "wrap", "model", expected, f"{kind} at {name!r}", RuntimeError)
        if ours:
            inside.update(module.modules())
        if name:
            found[name] = module
    return found


def _targets(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    """Return the names of the modules that the configuration matches, in the model's order."""
    linear = [*linear_sizes({name: _base(module) for name, module in modules.items()})]
    uncalled = {
        name
        for name in linear
        if isinstance(modules.get(name.rpartition(".")[0], model), READS_WEIGHTS)
    }
    head = config.head_of(*head_names(model))
    linear = [name for name in linear if name != head and name not in uncalled]
    found = config.targeted(modules, linear)
    expected = f"a module of {type(model).__name__} to match {config.target_modules!r}"
    require(found, "wrap", "target_modules", expected, "none")
    if ignored := sorted(found & uncalled):
        raise NotImplementedError(
            f"wrap: target_modules: expected layers that are called, found {ignored[0]!r}; its "
            "parent module only reads the layer's weight, so an adapter would be ignored"
        )
    return [name for name in modules if name in found]


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, LoraLayer) else module


def _adapt(name: str, module: nn.Module, adapter_name: str, settings: dict[str, Any]) -> LoraLayer:
    """Return a layer with the new adapter for ``module``; error messages contain ``name``."""
    try:
        if isinstance(module, LoraLayer):
            module.add_adapter(adapter_name, **settings)
            return module
        if linear_size(module) is not None:
            return LoraLinear(module, adapter_name, **settings)
        if isinstance(module, nn.Embedding):
            return LoraEmbedding(module, adapter_name, **settings)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return LoraConv(module, adapter_name, **settings)
        expected = "a Linear, Conv1D, Embedding, convolution, or in_features and out_features"
        raise ValueError(f"target_modules: expected {expected}, found a {type(module).__name__}")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"wrap: {name}: {error}") from error

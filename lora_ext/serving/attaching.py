"""``attach`` and ``detach``: replace modules of a model by layers of a pool.

This module does not import transformers.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lora_ext._checks import instance, require, require_flags
from lora_ext.adapter import ModelIndex, model_name
from lora_ext.layers import (
    Swap,
    find_module,
    pack_linears,
    packed_layers,
    space_products,
    unpack,
    unspace_products,
)
from lora_ext.pool import AdapterPool
from lora_ext.rows import BASE, ERROR, PoolLayer, UnknownAdapterError, _layouts, attachments

from ._continuous import requests_of
from ._hooks import Hooks, is_hook, uninstall
from ._names import CallNames
from ._pipelines import watch_pipelines
from .layers._multi_lora import MultiLoraLinear
from .layers._overlap import begin_early
from .layers._siblings import set_siblings
from .layers.multi_lora_embedding import MultiLoraEmbedding
from .layers.multi_lora_experts import MultiLoraExperts

Model = TypeVar("Model", bound=nn.Module)

_KEY = "_lora_ext_attachment"

# Modules of T5, MPNet, WavLM, SpeechT5 and MVP whose input is pairs of positions or a learned
# prompt instead of sequences.
_SHARED = re.compile(
    r"(^|\.)(\w*relative_attention_bias|rel_attn_embed|distance_embedding|pe_k|"
    r"(self|cross)_attn_prompt\..*)$"
)


@dataclass(eq=False)
class _Attachment:
    """State of an attached model, in its ``__dict__``; a deep copy of the model is attached too."""

    pool: AdapterPool
    swap: Swap
    packed: bool
    fused: bool
    hooked: list[tuple[str, str]]  # result of Hooks.install
    spaced: list[nn.Module]  # layers with hooks of space_products

    def __post_init__(self) -> None:
        attachments.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attachment:
        swap = copy.deepcopy(self.swap, memo)
        if self.fused:
            set_siblings(swap.placed)
        # The copied methods are hooks already, bound to the copied modules.
        spaced = copy.deepcopy(self.spaced, memo)
        return _Attachment(self.pool, swap, self.packed, self.fused, list(self.hooked), spaced)


def attach(
    model: Model,
    pool: AdapterPool,
    default: str | None = None,
    *,
    pack_base: bool = False,
    fuse_siblings: bool = False,
    overlap: bool = False,
) -> Model:
    """Replace every module that the pool may adapt by a layer of the pool.

    The layers are :class:`MultiLoraLinear`, :class:`MultiLoraEmbedding` and
    :class:`MultiLoraExperts`. The model is changed in place; :func:`detach` undoes it. Parameters,
    names and checkpoints do not change. A module with several names is replaced under its first, as
    in PEFT. If the model has ``generate``, its rows keep their adapters through beams and returned
    sequences. ``generate`` and the call of a transformers model take PEFT's ``adapter_names=``,
    which is equivalent to :func:`lora_ext.adapters` around them.

    Args:
        model: the model that the pool was made for, or one of the same shape.
        pool: the pool of the adapters.
        default: adapter of a call outside every block and without ``adapter_names=``: None for the
            base model, the name of an adapter, or "error" to raise RuntimeError.
        pack_base: keep a packed copy of the weight of every linear layer, which makes products of
            at most 32 rows on a CPU faster: see :func:`lora_ext.nn.pack_linears`. The copy needs as
            many bytes as the weights. A decode step of SmolLM2-135M with 16 adapters then takes
            0.58 of the time of the bare model, and without packing 1.2. It is not the default
            because of the memory: :func:`lora_ext.nn.packing` checks whether it fits.
        fuse_siblings: compute the updates of layers of one parent that are called with the same
            tensor (q, k, v; gate, up) in one op, which needs the launches of one layer on a GPU:
            see :mod:`lora_ext.serving.layers._siblings`. The first of them also calls the base
            layers of the others, a little earlier than the model does. The bits are the same. It
            applies on a GPU, outside gradients, autocast and ``torch.compile``, to plain linear
            bases without hooks and adapters without DoRA; other layers are computed separately.
        overlap: begin each layer's update on a second CUDA stream while its base product runs, in
            calls of at most 256 rows: see :mod:`lora_ext.serving.layers._overlap`. It applies under
            the conditions of ``fuse_siblings``, except to the output head, and excludes it. The
            bits are the same. It has not been timed on a GPU.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a module, ``pool`` is not a pool, or a flag is neither True
            nor False.
        UnknownAdapterError: If the pool lacks the default.
        RuntimeError: If the model, or a part of it, is attached or has PEFT's layers.
        ValueError: If a module of the pool is missing or has another size; the pool lacks a module
            of the model; ``overlap`` and ``fuse_siblings`` are both True; or ``pack_linears``
            raises.
        NotImplementedError: If transformers' ``tp_plan`` has divided the weights. After any error
            the model is unchanged.
    """
    _check_module("attach", model)
    instance("attach", "pool", pool, AdapterPool)
    require_flags("attach", pack_base=pack_base, fuse_siblings=fuse_siblings, overlap=overlap)
    one = not (overlap and fuse_siblings)
    require(one, "attach", "overlap", "False where fuse_siblings is True", overlap)
    default = None if default == BASE else default
    if default not in (None, ERROR) and default not in pool:
        raise UnknownAdapterError(
            "attach: default: expected None, 'error' or one of the adapters "
            f"{pool.names!r:.200}, found {default!r:.200}"
        )
    _check_free(model)
    layers: dict[str, PoolLayer] = {}
    for name in pool.modules:
        kind = MultiLoraEmbedding if name in pool.index.embedding else MultiLoraLinear
        layers[name] = kind(_module(model, name), pool, name)
        layers[name].shared = bool(_SHARED.search(name))
        layers[name].is_head = name == pool.index.output_head
    for name in pool.index.parameters:
        if any(parameter in pool.experts for parameter in pool.index.parameters[name]):
            layers[name] = MultiLoraExperts(_module(model, name), pool, name)
    for layer in layers.values():
        layer.default = default
    found = ModelIndex.build(model, pool.targets, device="cpu").specs
    if more := [name for name in found if name not in pool.index.specs]:
        raise ValueError(  # these layers would silently compute the base model
            f"attach: pool: expected a pool of this model, found one without {len(more)} modules "
            f"of the model, {more[0]!r} first; make the pool of this model"
        )
    pool.base_models.meet("attach: model", model_name(model), stacklevel=2)
    if pack_base:
        pack_linears(model)
    if fuse_siblings:
        set_siblings(layers)
    if overlap:
        begin_early(layers)
    swap = Swap(model, layers, "attach")
    _layouts.set_tokens_first(model)
    hooked = Hooks(CallNames(pool, default)).install(model)
    spaced = space_products(model)
    model.__dict__[_KEY] = _Attachment(pool, swap, pack_base, fuse_siblings, hooked, spaced)
    watch_pipelines()
    return model


def detach(model: Model) -> Model:
    """Restore the module objects that :func:`attach` replaced.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a module.
        RuntimeError: If the model is not attached, a layer was replaced or offloaded since, or a
            manager of continuous batching runs. The model is then unchanged.
    """
    _check_module("detach", model)
    attachment: _Attachment | None = model.__dict__.get(_KEY)
    if attachment is None:
        found = f"a {type(model).__name__} that is not"
        raise RuntimeError(f"detach: expected an attached model, found {found}")
    for name, module in model.named_modules():  # accelerate would leave weights on meta
        on_layer = name in attachment.swap.placed and "_hf_hook" in module.__dict__
        if on_layer or is_hook(module.__dict__.get("_old_forward")):
            raise RuntimeError(
                f"detach: {name or 'model'}: expected no hooks of accelerate, found some; call "
                "remove_hook_from_submodules(model) first, or offload before attach"
            )
    managers = requests_of(model)
    if any(requests.manager.is_running() for requests in managers):
        expected = "no running manager of continuous batching"
        raise RuntimeError(f"detach: expected {expected}, found one; stop it first")
    packed = packed_layers(model, "detach") if attachment.packed else []
    attachment.swap.restore(model, "detach")
    for requests in managers:
        requests.remove()
    uninstall(model, attachment.hooked)
    unspace_products(attachment.spaced)
    unpack(packed)
    del model.__dict__[_KEY]
    attachments.discard(attachment)
    return model


def _check_module(where: str, model: object) -> None:
    found = type(model).__name__
    require(isinstance(model, nn.Module), where, "model", "a torch.nn.Module", found, TypeError)


def _check_free(model: nn.Module) -> None:
    """Raise for a model that is attached, tensor-parallel, or has other adapter layers."""
    if _KEY in model.__dict__:
        raise RuntimeError(
            "attach: expected a model that is not attached, found an attached one; detach it first"
        )
    parts = getattr(model, "_tp_size", None) or 1  # attribute of transformers
    found = f"weights that tp_plan has divided between {parts} processes"
    require(parts == 1, "attach", "model", "undivided weights", found, NotImplementedError)
    for name, module in model.named_modules():
        if isinstance(module, PoolLayer) or type(module).__module__.startswith("peft."):
            found = f"{type(module).__name__} at {name!r}"
            raise RuntimeError(f"attach: expected a model without adapter layers, found {found}")


def _module(model: nn.Module, name: str) -> nn.Module:
    require(name, "attach", "pool", "a module inside the model", "the model itself")
    module = find_module(model, name)
    if module is None:
        raise ValueError(
            f"attach: pool: expected a pool of this model, found {name!r}, which the model lacks"
        )
    return module

"""``attach`` and ``detach``: replace modules of a model by layers that use the adapters of a pool.

This module does not import transformers.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lora_ext._checks import flag, instance, require, require_flags
from lora_ext.adapter import ModelIndex, model_name
from lora_ext.layers import (
    CHOICE,
    Swap,
    find_module,
    pack_if_faster,
    pack_linears,
    packed_layers,
    space_products,
    unpack,
    unspace_products,
)
from lora_ext.pool import AdapterPool, UnknownAdapterError
from lora_ext.rows import ERROR, Entry, PoolLayer, _entries, _layouts, attachments

from ._continuous import requests_of
from ._hooks import Hooks, is_hook, uninstall
from ._names import CallNames
from ._pipelines import watch_pipelines
from .layers._multi_lora import MultiLoraLinear
from .layers._siblings import set_siblings
from .layers.multi_lora_embedding import MultiLoraEmbedding
from .layers.multi_lora_experts import MultiLoraExperts

Model = TypeVar("Model", bound=nn.Module)

_KEY = "_lora_ext_attachment"

# Modules of T5, MPNet, WavLM, SpeechT5 and MVP that receive pairs of positions or a learned prompt.
# Such an input is the same for all sequences, so it has no row per sequence.
_SHARED = re.compile(
    r"(^|\.)(\w*relative_attention_bias|rel_attn_embed|distance_embedding|pe_k|"
    r"(self|cross)_attn_prompt\..*)$"
)


@dataclass(eq=False)
class _Attachment:
    """State of an attached model, stored in the model's ``__dict__``.

    A deep copy of the model copies this state, so the copy is attached, too.
    """

    pool: AdapterPool
    swap: Swap
    packed: bool
    fused: bool
    hooked: list[tuple[str, str]]  # result of Hooks.install
    spaced: list[nn.Module]  # layers on which space_products has registered hooks

    def __post_init__(self) -> None:
        attachments.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attachment:
        swap = copy.deepcopy(self.swap, memo)
        if self.fused:
            set_siblings(swap.placed)
        # No Hooks.install: the copied methods are already hooks, bound to the copied modules.
        spaced = copy.deepcopy(self.spaced, memo)
        return _Attachment(self.pool, swap, self.packed, self.fused, list(self.hooked), spaced)


def attach(
    model: Model,
    pool: AdapterPool,
    default: Entry = None,
    *,
    pack_base: bool | int | None = False,
    fuse_siblings: bool = False,
    overlap: bool = False,
) -> Model:
    """Replace every module that an adapter of the pool may target by a layer that uses the pool.

    The layers are :class:`MultiLoraLinear`, :class:`MultiLoraEmbedding` and
    :class:`MultiLoraExperts`. The model is changed in place, and :func:`detach` restores it.
    Parameters, their names and checkpoints do not change. A module that the model contains under
    several names is replaced only under the first name, as in PEFT. If the model has ``generate``,
    the adapter of a prompt is also used for its beams and for all sequences returned for it.
    ``generate`` and the forward of a transformers model accept PEFT's ``adapter_names=``, which is
    equivalent to a block of :func:`lora_ext.adapters` around the call.

    Args:
        model: model that the pool was made for, or a model with the same modules and sizes.
        pool: pool that contains the adapters.
        default: adapter of a call outside every block and without ``adapter_names=``: None for the
            base model, the name of an adapter, a mixture as in :func:`lora_ext.adapters`, or
            "error" to raise RuntimeError.
        pack_base: whether to keep a packed copy of the weight of every linear layer, which makes
            products of at most 32 rows on a CPU faster: see :func:`lora_ext.nn.pack_linears`. The
            copies need as many bytes as the weights. A decode step of SmolLM2-135M with 16 adapters
            takes 0.58 times as long as a step of the model without adapters. Without packing it
            takes 1.2 times as long as that step. The default is False because of the memory:
            :func:`lora_ext.nn.packing` checks whether the copies fit. With 8 or 4, the copies
            contain weights rounded to 8 or 4 bits, also on CUDA. None measures the largest layers,
            plain and packed, for less than a second, and keeps the faster form, which
            ``str(packing(model))`` names. Results of the two forms may differ in their last bits.
        fuse_siblings: whether to compute in one op the updates of all layers of one parent module
            that are called with the same tensor (q, k, v; gate, up). On a GPU they then need only
            the kernel launches of one layer: see :mod:`lora_ext.serving.layers._siblings`. The
            first of these layers also calls the base layers of the others, slightly earlier than
            the model does. The results are bitwise the same. The option has an effect on a GPU,
            without gradients, autocast and ``torch.compile``, for plain linear base layers without
            hooks and adapters that only add to the output. Other layers are computed separately.
        overlap: deprecated, without effect. Use ``fuse_siblings`` for fewer kernel launches.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a module, ``pool`` is not a pool, or a flag is neither True
            nor False.
        UnknownAdapterError: If the pool does not have an adapter in ``default``.
        RuntimeError: If the model, or a part of it, is attached or has PEFT's layers.
        ValueError: If ``default`` is not an entry; if a module of the pool is missing in the model
            or has the wrong size; if the pool lacks a module of the model; or if ``pack_linears``
            raises ValueError.
        NotImplementedError: If transformers' ``tp_plan`` has sharded the weights.

    After any error the model is unchanged.
    """
    _check_module("attach", model)
    instance("attach", "pool", pool, AdapterPool)
    require_flags("attach", fuse_siblings=fuse_siblings, overlap=overlap)
    bits = pack_base if type(pack_base) is int else None
    if pack_base is not None and bits not in (8, 4):
        pack_base = flag("attach", "pack_base", pack_base, expected="True, False, None, 8 or 4")
    if overlap:
        text = "attach: overlap has no effect and will be removed; leave it out"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    if default != ERROR:
        members = _entries.members_of(default, "attach: default")
        known = all(name in pool for name in _entries.names_in(default))
        expected = f"None, 'error' or one of the adapters {pool.names!r:.200}"
        require(known, "attach", "default", expected, f"{default!r:.200}", UnknownAdapterError)
        default = _entries.spelled(members)
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
        layer.default, layer.default_text = default, None if default is None else repr(default)
    found = ModelIndex.build(model, pool.targets, device="cpu").specs
    if more := [name for name in found if name not in pool.index.specs]:
        raise ValueError(  # these layers would silently compute the base model
            f"attach: pool: expected a pool made for this model, found one that lacks {len(more)} "
            f"modules of the model, for example {more[0]!r}; create a pool for this model"
        )
    pool.base_models.meet("attach: model", model_name(model), stacklevel=2)
    if pack_base is None:
        pack_base = pack_if_faster(model)
    elif pack_base:
        pack_linears(model, bits=bits)
    if fuse_siblings:
        set_siblings(layers)
    swap = Swap(model, layers, "attach")
    _layouts.set_tokens_first(model)
    hooked = Hooks(CallNames(pool, default)).install(model)
    spaced = space_products(model)
    model.__dict__[_KEY] = _Attachment(pool, swap, bool(pack_base), fuse_siblings, hooked, spaced)
    watch_pipelines()
    return model


def detach(model: Model) -> Model:
    """Restore the module objects that :func:`attach` replaced.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a module.
        RuntimeError: If the model is not attached, if one of its layers was replaced or offloaded
            since :func:`attach`, or if a manager of continuous batching is running. The model is
            then unchanged.
    """
    _check_module("detach", model)
    attachment: _Attachment | None = model.__dict__.get(_KEY)
    if attachment is None:
        found = f"a {type(model).__name__} that is not attached"
        raise RuntimeError(f"detach: expected an attached model, found {found}")
    for name, module in model.named_modules():  # accelerate would leave weights on the meta device
        on_layer = name in attachment.swap.placed and "_hf_hook" in module.__dict__
        if on_layer or is_hook(module.__dict__.get("_old_forward")):
            raise RuntimeError(
                f"detach: {name or 'model'}: expected no hooks of accelerate, found hooks; call "
                "remove_hook_from_submodules(model) first, or offload the model before attach"
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
    model.__dict__.pop(CHOICE, None)
    del model.__dict__[_KEY]
    attachments.discard(attachment)
    return model


def _check_module(where: str, model: object) -> None:
    found = type(model).__name__
    require(isinstance(model, nn.Module), where, "model", "a torch.nn.Module", found, TypeError)


def _check_free(model: nn.Module) -> None:
    """Raise an error if a model is attached, is tensor-parallel, or has adapter layers already."""
    if _KEY in model.__dict__:
        raise RuntimeError(
            "attach: expected a model that is not attached, found an attached one; detach it first"
        )
    parts = getattr(model, "_tp_size", None) or 1  # set by transformers' tensor parallelism
    found = f"weights that tp_plan has sharded across {parts} processes"
    require(parts == 1, "attach", "model", "unsharded weights", found, NotImplementedError)
    for name, module in model.named_modules():
        if isinstance(module, PoolLayer) or type(module).__module__.startswith("peft."):
            found = f"{type(module).__name__} at {name!r}"
            raise RuntimeError(f"attach: expected a model without adapter layers, found {found}")


def _module(model: nn.Module, name: str) -> nn.Module:
    require(name, "attach", "pool", "names of submodules of the model", "'' (the model itself)")
    module = find_module(model, name)
    if module is None:
        raise ValueError(
            f"attach: pool: expected modules of this model, found the unknown module {name!r}"
        )
    return module

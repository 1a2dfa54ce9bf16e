"""``from_peft``: run a PEFT model with lora_ext's kernels.

The layers keep their parameters, buffers and names. Only the class of each layer changes, to a
subclass with a ``forward`` that calls lora_ext (a *fused* layer). All other operations on a layer
(checkpoints, ``set_adapter``, merging, deleting) still run PEFT's code.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import nn

from lora_ext._checks import require
from lora_ext._torch import compiles
from lora_ext.layers import space_products, unspace_products
from lora_ext.rows import Assignment, _layouts, context_value, refuse_singular, several_processes

from . import _adapters, _kinds, _names
from ._experts import FusedExperts
from ._layers import Fused, FusedLinear
from ._routers import FusedXLora, router_of

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Report:
    """Names of the modules with LoRA adapters, by the package that runs them."""

    taken: tuple[str, ...]  # names of the modules that lora_ext runs
    # The reason why PEFT runs a module, by the name of the module.
    left: dict[str, str] = field(default_factory=dict)


def take_over(model: Model) -> Model:
    """Implement :func:`lora_ext.from_peft`. This module is imported on demand: it needs peft."""
    found, known = f"a {type(model).__name__}", isinstance(model, nn.Module)
    require(known, "from_peft", "model", "a torch.nn.Module", found, TypeError)
    _adapters.check_values(model)
    _kinds.swap_kinds(model, _never_called(model))
    if not any(isinstance(m, LoraLayer | _kinds.FusedKind) for m in model.modules()):
        raise ValueError("from_peft: model: expected layers with LoRA adapters, found none")
    _adapters.warn_of_other_bases(model)
    _swap(model, _fused_class)
    space_products(model)
    _layouts.set_tokens_first(model)
    for module in model.modules():
        if isinstance(module, _FusedLoraModel):
            module.turned = _adapters.turned_layers(module)
    found = report(model)
    if not found.taken:
        warnings.warn(
            "from_peft: model: expected layers that lora_ext can run, found none; PEFT runs "
            f"{_adapters.by_reason(found.left)}",
            stacklevel=3,  # the caller of lora_ext.from_peft
        )
    return model


def to_peft(model: Model) -> Model:
    """Undo :func:`lora_ext.from_peft`: restore PEFT's class of every layer.

    The layers keep their current parameters.

    Args:
        model: model that :func:`lora_ext.from_peft` returned. It is changed in place.

    Returns:
        ``model``.
    """
    _swap(model, lambda kind: getattr(kind, "of_peft", kind))
    block: Any
    for block in model.modules():
        if isinstance(block, BaseTunerLayer | LoraModel):
            for told in ("tokens_first", "turned", "configs", "plans"):
                vars(block).pop(told, None)
        _names.forget_checkpoints(block)
    unspace_products(model.modules())
    return model


def _fused_class(kind: type) -> type:
    plain = {
        PeftLinear: FusedLinear,
        ParamWrapper: FusedExperts,
        LoraModel: _FusedLoraModel,
        XLoraLinearLayer: FusedXLora,
    }
    return plain.get(kind) or _kinds.fused_version(kind)


def _swap(model: nn.Module, other: Callable[[type], type]) -> None:
    never_called = _never_called(model)
    module: Any
    for module in model.modules():
        if module not in never_called:
            module.__class__ = other(type(module))
        router = router_of(module)
        if router is not None:  # X-LoRA has stored a bound method of its class in the layer.
            router.__class__ = other(type(router))
            module.forward = router.forward


def _never_called(model: nn.Module) -> set[nn.Module]:
    """Return the output projections of all ``nn.MultiheadAttention``.

    ``nn.MultiheadAttention`` reads the weight of its output projection and never calls the module.
    """
    return {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def report(model: nn.Module) -> Report:
    """Return which LoRA layers of ``model`` lora_ext runs, and which PEFT still runs.

    For each layer that PEFT runs, the report contains the reason.
    """
    taken: list[str] = []
    left: dict[str, str] = {}
    never_called = _never_called(model)
    for name, module in model.named_modules():
        kind, router = type(module), router_of(module)
        if not isinstance(module, BaseTunerLayer):
            continue
        if module in never_called:
            reasons = {"nn.MultiheadAttention reads its weight and never calls it"}
        elif isinstance(router, FusedXLora):
            reasons = {router.uncovered()}
        elif router is not None:
            reasons = {f"PEFT's {type(router).__name__} computes it"}
        elif isinstance(module, Fused | _kinds.FusedKind):
            reasons = module.left()
        elif _fused_class(kind) is not kind:
            reasons = {"it was adapted after from_peft was called"}
        else:
            found = _kinds.full_name(kind)
            reasons = {f"lora_ext runs only {_kinds.COVERED}, found {found}"}
        why = "; ".join(sorted(filter(None, reasons)))
        left |= {name: why} if why else {}
        taken += [] if why else [name]
    return Report(tuple(taken), left)


#: True while a call with activated adapters (PEFT's ``alora_offsets``) runs.
_begins: ContextVar[bool] = ContextVar("lora_ext.peft_begins", default=False)


class _FusedLoraModel(LoraModel):
    """PEFT's ``LoraModel``, which also accepts ``adapter_names`` in training."""

    of_peft = LoraModel
    #: Names of the layers that PEFT runs and that have tokens as the first dimension of the input.
    turned: tuple[str, ...] = ()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's ``generate``; for activated adapters, check the settings first."""
        if _begins.get():
            _names.refuse_other_forwards(self.model, kwargs)
        return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """Call the model's ``generate_batch``; reject ``adapter_names``, which it would ignore."""
        if adapter_names is not None:
            raise NotImplementedError(
                "generate_batch: adapter_names: expected none for a PEFT model, whose requests all "
                f"use the active adapter, found {adapter_names!r:.200}; use lora_ext.attach for "
                "one adapter per request"
            )
        refuse_singular("generate_batch", kwargs)
        return self.model.generate_batch(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        plain = super()._unload_and_optionally_merge(*args, **kwargs)
        unspace_products(self.model.modules())
        return plain

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        refuse_singular("from_peft", kwargs)
        given: Assignment | None = None
        names, offsets = kwargs.get("adapter_names"), kwargs.pop("alora_offsets", None)
        if offsets is not None:  # `generate` may make several rows from one prompt.
            count = _names.copies_of_prompt(kwargs)
            offsets = [offset for offset in offsets for _ in range(count)]
        if names is None:
            _adapters.refuse_block(self, self.peft_config, self.active_adapters, other_names=True)
        else:
            listed = isinstance(names, list | tuple)
            require(listed, "from_peft", "adapter_names", "a list of one entry per row", names)
            require(None not in [*names], "from_peft", "adapter_names", "'__base__'", None)
            given = _names.assignment_of(names)
            _adapters.refuse_turned(given.each(), self.turned)
            if given.mixed or given.unused:
                _adapters.refuse_mixtures(self.model, given)
            kwargs["adapter_names"] = given.plain()
            if self.training:
                _adapters.refuse_names_of_a_reference(self.active_adapters, given)
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        training = self.training
        # PEFT raises for names in training mode, so the flag is off while PEFT adds its hooks.
        self.training = training and names is None
        try:
            hooks.__enter__()
        finally:
            self.training = training
        try:
            with contextlib.ExitStack() as stack:
                if given is not None and training:
                    _adapters.warn_of_frozen(self.model, given)
                    if several_processes() and torch.is_grad_enabled():
                        # A fused layer is checked in its forward, since FSDP2 gathers the
                        # parameters there. Only the other layers are checked here.
                        left, find = report(self.model).left.items(), self.model.get_submodule
                        others = {n: why for n, why in left if not isinstance(find(n), Fused)}
                        _adapters.refuse_layers_of_peft(self.model, others)
                if training and (names is not None or offsets is not None):
                    stack.enter_context(
                        _names.kept_by_checkpoints(self.model, _names.Given(given, offsets))
                    )
                if given is not None and given.mixed:
                    stack.enter_context(_names.entries_given(self.model, given))
                stack.enter_context(_names.offsets_given(self.model, offsets))
                if not compiles():  # Dynamo cannot trace contextvars. Only `generate` reads this.
                    stack.enter_context(context_value(_begins, offsets is not None))
                yield
        finally:
            # If PEFT's context received an exception, it would not remove its hooks.
            hooks.__exit__(None, None, None)


_FusedLoraModel.__name__ = LoraModel.__name__  # for output, as explained at FusedLinear

"""``attach`` and ``detach``: a pool's layers in somebody else's model. transformers itself is not
imported."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from lora_ext.nn import MultiLoraEmbedding, MultiLoraLinear
from lora_ext.nn.assignment import Names
from lora_ext.nn.attachment import attachments, pool_handle
from lora_ext.nn.context import adapters
from lora_ext.nn.generation import generation_scope, repeat_rows
from lora_ext.nn.pool_layer import PoolLayer
from lora_ext.nn.swap import Swap, find_module
from lora_ext.pool import AdapterPool

Model = TypeVar("Model", bound=nn.Module)

_KEY = "_lora_ext_attachment"
_OWN_FORWARD = "_lora_ext_own_forward"


@dataclass(eq=False)
class _Attachment:
    """Kept on the attached model; a deep copy of the model is attached too."""

    pool: AdapterPool
    swap: Swap
    hooked: list[tuple[str, str]] = field(default_factory=list)  # module, method

    def __post_init__(self) -> None:
        attachments.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attachment:
        return _Attachment(self.pool, copy.deepcopy(self.swap, memo), list(self.hooked))


def attach(model: Model, pool: AdapterPool) -> Model:
    """Put a :class:`MultiLoraLinear` or :class:`MultiLoraEmbedding` in the place of every module
    that the pool may adapt.

    Works in place; :func:`detach` undoes it. Parameters, names and checkpoints stay what they are.
    A module that is registered under several names is replaced under its first, as PEFT does.
    Where the model can ``generate``, its rows keep their adapters through beams and returned
    sequences. ``generate`` and the call of a transformers model take PEFT's ``adapter_names=``,
    which is :func:`lora_ext.adapters` around them.

    Args:
        model: the model that the pool was made for, or one of the same shape.
        pool: where the adapters are.

    Returns:
        ``model``.

    Raises:
        RuntimeError: the model, or a part of it, is attached or carries PEFT's layers. ValueError:
            a module of the pool is missing or has another size. The model is unchanged then.
    """
    if _KEY in model.__dict__:
        raise RuntimeError(
            "attach: expected a model that is not attached, found an attached one; detach it first"
        )
    for name, module in model.named_modules():
        if isinstance(module, PoolLayer) or type(module).__module__.startswith("peft."):
            raise RuntimeError(
                f"attach: expected a model without adapter layers, "
                f"found {type(module).__name__} at {name!r}"
            )
    layers: dict[str, PoolLayer] = {}
    for name in pool.modules:
        kind = MultiLoraEmbedding if name in pool.index.embedding else MultiLoraLinear
        layers[name] = kind(_module(model, name), pool, name)
    attachment = _Attachment(pool, Swap(model, layers, "attach"))
    for name, module in model.named_modules():
        for method, hook in _hooks(pool).items():
            # An instance with a method of its own is left alone.
            if callable(getattr(type(module), method, None)) and method not in module.__dict__:
                setattr(module, method, MethodType(hook, module))
                attachment.hooked.append((name, method))
        if hasattr(type(module), "get_input_embeddings"):
            # A model of transformers swallows arguments that it does not know: names would be lost.
            if "forward" in module.__dict__:  # as accelerate's offloading leaves it
                module.__dict__[_OWN_FORWARD] = module.__dict__["forward"]
            module.forward = MethodType(_forward(type(module), pool), module)
            attachment.hooked.append((name, "forward"))
    model.__dict__[_KEY] = attachment
    return model


def detach(model: Model) -> Model:
    """Put back the very module objects that :func:`attach` replaced.

    Returns:
        ``model``.

    Raises:
        RuntimeError: the model is not attached, or a layer was replaced since. The model is
            unchanged then.
    """
    attachment: _Attachment | None = model.__dict__.get(_KEY)
    if attachment is None:
        raise RuntimeError("detach: expected an attached model, found one that is not")
    attachment.swap.restore(model, "detach")
    for name, method in attachment.hooked:
        module = find_module(model, name)
        if module is not None:
            module.__dict__.pop(method, None)
            if method == "forward" and _OWN_FORWARD in module.__dict__:
                module.__dict__[method] = module.__dict__.pop(_OWN_FORWARD)
    del model.__dict__[_KEY]
    attachments.discard(attachment)
    return model


def _module(model: nn.Module, name: str) -> nn.Module:
    if not name:
        raise ValueError("attach: pool: expected a module inside the model, found the model itself")
    module = find_module(model, name)
    if module is None:
        raise ValueError(
            f"attach: pool: expected a pool of this model, found {name!r}, which the model lacks"
        )
    return module


def _forward(kind: type[nn.Module], pool: AdapterPool) -> Any:
    @functools.wraps(kind.forward)  # transformers reads the signature
    def forward(self: Any, *args: Any, adapter_names: Names = None, **kwargs: Any) -> Any:
        run = self.__dict__.get(_OWN_FORWARD) or functools.partial(kind.forward, self)
        if adapter_names is None:
            return run(*args, **kwargs)
        with adapters(adapter_names, pool=pool):
            return run(*args, **kwargs)

    return forward


def _hooks(pool: AdapterPool) -> dict[str, Any]:
    """Methods that an attached model overrides. They find their model through ``self``, in a copy
    too."""
    handle = pool_handle(pool)

    def generate(self: Any, *args: Any, adapter_names: Names = None, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            if adapter_names is not None:
                stack.enter_context(adapters(adapter_names, pool=pool))
            stack.enter_context(generation_scope())
            return type(self).generate(self, *args, **kwargs)

    def _expand_inputs_for_generation(
        self: Any, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> Any:
        expanded = type(self)._expand_inputs_for_generation(self, expand_size, *args, **kwargs)
        repeat_rows(handle, expand_size)
        return expanded

    return {h.__name__: h for h in (generate, _expand_inputs_for_generation)}

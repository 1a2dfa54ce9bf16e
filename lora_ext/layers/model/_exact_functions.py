"""Pointwise functions of an exact model, with results that do not depend on element positions.

A pointwise function, such as SiLU, maps each element separately. torch computes it with vector
instructions, but uses other instructions for the last elements of each thread. The last bits
therefore depend on the batch and on the number of threads. :func:`replace_functions` runs one
forward to find the modules that call such functions. In these modules,
:func:`lora_ext.ops.pointwise` then computes the functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext import ops
from lora_ext.rows import PoolLayer, of_call, pool_of

from ._forwards import Forward

#: Attribute that marks every module of an exact model. Copies of the model have the attribute, too,
#: so they are also exact.
MARK = "_lora_ext_exact"

_OURS = frozenset("cos gelu rsqrt sigmoid silu sin softplus tanh".split())

# Ops that give bitwise equal results with and without vector instructions: each step rounds once.
_SAFE = frozenset(
    "abs add bitwise_and bitwise_not bitwise_or ceil clamp clamp_max clamp_min clone copy div fill "
    "floor hardtanh leaky_relu logical_and logical_not logical_or masked_fill maximum minimum mul "
    "nan_to_num neg reciprocal relu round rsqrt rsub sign sqrt sub threshold trunc where _to_copy "
    "zero".split()
)

_PRODUCTS = frozenset(
    "addbmm addmm addmv baddbmm bmm convolution dot linear matmul mm mv "
    "_scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu".split()
)


class _Unknown(ValueError):
    """Error for a torch op with results that may change with the batch or an element's position."""

    def __init__(self, found: str, where: str = "model"):
        expected = "ops with results that do not depend on the batch"
        super().__init__(f"exact: {where}: expected {expected}, found {found}")
        self.found = found


class _Functions(TorchDispatchMode):
    """Dispatch mode that computes pointwise functions with ``ops.pointwise``.

    The mode runs below autograd, so the gradients are still those of torch.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place = _name_of(func)
        function = _function_of(name, args, kwargs)
        if function is None:
            return func(*args, **kwargs)
        y = ops.pointwise(args[0], function)
        return args[0].copy_(y) if in_place else y


class _Probe(_Functions):
    """Dispatch mode that collects the modules that call pointwise functions."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.entered = [("", model)]
        self.found: dict[int, nn.Module] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        where, module = self.entered[-1]
        if has_adapters(module):
            return func(*args, **(kwargs or {}))
        name, _ = _name_of(func)
        try:
            y = super().__torch_dispatch__(func, types, args, kwargs)
            if _function_of(name, args, kwargs or {}) is not None:
                self.found[id(module)] = module
            else:
                _check_op(func, name, args, kwargs or {}, y)
        except _Unknown as error:
            raise _Unknown(error.found, f"model: {where!r}" if where else "model") from None
        return y


def has_adapters(module: nn.Module) -> bool:
    """Return whether a module is an adapter layer of this package. Such layers are exact."""
    ours = type(module).__module__.startswith("lora_ext.")
    return ours and (isinstance(module, PoolLayer) or hasattr(module, "base_layer"))


def _name_of(func: Any) -> tuple[str, bool]:
    """Return the name of an aten op without a trailing underscore, and whether it had one.

    The name is empty for other ops.
    """
    if func.namespace != "aten":
        return "", False
    name: str = func.overloadpacket.__name__
    plain = name.removesuffix("_")
    return plain, plain != name


def _function_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return the function of ``ops.pointwise`` that an op of torch computes, or None."""
    if name not in _OURS or not args[0].is_floating_point():
        return None
    if args[0].dtype not in (torch.float32, torch.bfloat16):
        raise _Unknown(f"{name} of {args[0].dtype}")
    if "out" in kwargs:
        raise _Unknown(f"{name} with out=")
    # torch's float32 rsqrt rounds a root and then a quotient, so it needs no replacement.
    if name == "rsqrt" and args[0].dtype == torch.float32:
        return None
    if name == "gelu" and kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    if name == "softplus" and (*args[1:], *kwargs.values()) not in ((), (1,), (1, 20)):
        found = (*args[1:], *kwargs.values())
        raise _Unknown(f"softplus with beta and threshold {found} instead of (1, 20)")
    return name


def _check_op(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
    """Raise ValueError if an op is torch's product, or a pointwise function not in ``_SAFE``."""
    if name in _PRODUCTS:
        # A matrix product with one term per sum, as in rotary embeddings, is only rounded once.
        if name not in ("bmm", "mm") or args[0].shape[-1] != 1:
            raise _Unknown(f"{func}, a product computed by torch")
    elif not isinstance(y, Tensor) or not y.is_floating_point():
        return
    elif name == "pow":
        if isinstance(args[1], Tensor) or args[1] not in (1, 2, 3):
            raise _Unknown(f"{func} with an exponent other than 1, 2 and 3")
    elif kwargs.get("alpha", 1) != 1:
        raise _Unknown(f"{func} with alpha={kwargs['alpha']}")
    elif name and torch.Tag.pointwise in func.tags and name not in _SAFE:
        raise _Unknown(str(func))


class _Positionless(Forward):
    """Replaced forward of a module that calls pointwise functions and is in an exact model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        if MARK not in module.__dict__:  # the model was restored, but a wrapper still calls this
            return self.own(*args, **kwargs)
        with _Functions():
            return self.own(*args, **kwargs)


def replace_functions(model: nn.Module) -> None:
    """Make the modules of an exact model compute pointwise functions with ``ops.pointwise``.

    Raises:
        ValueError: If a module calls an op whose result may change with the batch. The message
            names the module and the op.
    """
    probe, ids = _Probe(model), torch.zeros(1, 2, dtype=torch.int64)
    pool: Any = pool_of(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if pool is not None:
            stack.enter_context(of_call(None, pool=pool))
        stack.enter_context(_entered(model, probe))
        stack.enter_context(probe)
        model(ids)
    unused: Any = None  # _Positionless calls the module's own forward
    for module in probe.found.values():
        _Positionless.put_before(module, unused)


def restore_functions(model: nn.Module) -> None:
    """Undo :func:`replace_functions`."""
    for module in model.modules():
        _Positionless.remove(module, lambda _: True)


@contextmanager
def _entered(model: nn.Module, probe: _Probe) -> Iterator[None]:
    """Record the stack of running modules in ``probe.entered`` during a ``with`` block."""
    handles: list[Any] = []
    parts: set[nn.Module] = set()  # parts of adapter layers, where a hook would disable fused ops
    for name, module in model.named_modules():
        if has_adapters(module):
            parts.update(module.children())
        if module in parts or isinstance(module, nn.Linear):
            parts.update(module.children())
            continue

        def enter(m: nn.Module, _: Any, name: str = name) -> None:
            probe.entered.append((name, m))

        def leave(*_: Any) -> None:
            probe.entered.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Linear layers whose weight is stored only in 8 or 4 bits: ``pack_linears(keep=False)``."""

from __future__ import annotations

import copy
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lora_ext import ops
from lora_ext._checks import require
from lora_ext._torch import AUTOCASTS, compiles, linear, spaced

from ._packed_weight import Format

Layer = TypeVar("Layer", bound=nn.Module)

#: Largest number of rows that :func:`lora_ext.ops.packed_linear` multiplies on CUDA.
MAX_CUDA_ROWS = 64


def copied_layer(layer: Layer, memo: dict[int, Any]) -> Layer:
    """Return a deep copy of a layer without calling the layer's ``__reduce_ex__``."""
    twin = type(layer).__new__(type(layer))
    memo[id(layer)] = twin
    twin.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return twin


class PackedOnlyLinear(nn.Linear):
    """``nn.Linear`` with a packed weight only: the plain weight was freed.

    The weight cannot be trained, and the layer cannot be saved. Under ``torch.compile``, autocast
    and other transformations of the forward, a product uses a dequantised copy of the weight.

    In the comments, ``T`` is the number of rows, ``I`` of input and ``O`` of output features.
    """

    packed: Tensor
    form: Format
    dtype: torch.dtype  # of the weight and of adapters
    _plain: weakref.ref[Tensor]  # plain weight, which exists only if another module also has it

    def drop_weight(self, form: Format, packed: Tensor) -> None:
        """Replace the weight by its packed copy."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.form, self.packed, self.dtype = form, packed, weight.dtype
        self._plain = weakref.ref(weight)

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``x W^T + b (..., O)`` for the input x."""
        bias, tied = self.bias, self._plain()
        if tied is not None and self.training and torch.is_grad_enabled():
            found = "one tied to a weight that trains; freeze that weight, or pack with keep=True"
            require(not tied.requires_grad, "pack_linears", "weight", "a frozen weight", found)
        plain = input.device == self.packed.device and takes(input)
        plain &= bias is None or bias.dtype == input.dtype
        if compiles() or type(input) is not Tensor or not plain or watched(input):
            return linear(input, self.dequantised().to(input.dtype), bias)
        x2d = input.reshape(-1, self.in_features)  # (T, I)
        product: Any = PackedProduct.apply if torch.is_grad_enabled() else packed_product
        y = product(x2d, self.packed, bias, self.out_features, self.form.int8)  # (T, O)
        return y.view(*input.shape[:-1], self.out_features)

    def dequantised(self) -> Tensor:
        """Return the weight ``(O, I)`` as a new tensor."""
        out, wide = self.out_features, self.in_features
        return ops.unpack_weight(self.packed, out, wide, dtype=self.dtype)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Dequantised weight ``(O, I)``, a copy that raises RuntimeError if it is written."""
        return self.dequantised().as_subclass(_ReadOnly)

    def write_weight(self, weight: Tensor) -> None:
        """Pack a new weight ``(O, I)``, for example after a merge."""
        self.packed = self.form.pack(weight.detach().to(self.dtype))

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> PackedOnlyLinear:
        here = self.packed.device
        moved = fn(torch.empty(0, dtype=self.dtype, device=here))
        found = f"{moved.device}; pack with keep=True to move the model"
        stays = moved.device == here
        require(stays, "pack_linears", "keep=False", f"the device {here}", found, RuntimeError)
        self.dtype = moved.dtype
        return super()._apply(fn, *args, **kwargs)  # pyright: ignore[reportReturnType]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise _not_saved("state_dict", f"{prefix}weight")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise RuntimeError: the layer cannot be pickled."""
        raise _not_saved("pickle", "weight")

    __deepcopy__ = copied_layer  # the default would call `__reduce_ex__`


def _not_saved(where: str, key: str) -> RuntimeError:
    expected, found = "a plain weight", "a weight that was packed with keep=False"
    return RuntimeError(f"{where}: {key}: expected {expected}, found {found}; pack with keep=True")


class _ReadOnly(Tensor):
    """Values of a packed weight. A write would not change the layer, so it raises RuntimeError."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = func.__name__
        written = name in ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__")
        written |= name.endswith("_") and name[-2] != "_" and name != "requires_grad_"
        if written and isinstance(args[0], cls):
            remedy = "merge with lora_ext's layers, or pack with keep=True"
            found = f"a weight that was packed with keep=False; {remedy}"
            raise RuntimeError(f"{name}: weight: expected a plain weight, found {found}")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class PackedProduct(torch.autograd.Function):
    """Packed product. Gradients use ``weight``, or the dequantised weight if ``weight`` is None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, bias: Any, out: int, int8: bool, weight: Any = None
    ) -> Tensor:
        ctx.sizes = (out, x.shape[1]) if weight is None else None
        train = weight is not None and ctx.needs_input_grad[5]
        ctx.save_for_backward(x if train else None, packed if weight is None else weight)
        return packed_product(x, packed, bias, out, int8)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight) = grads, ctx.saved_tensors
        dx, _, dbias, *_ = needs = ctx.needs_input_grad
        if dx and ctx.sizes is not None:
            weight = ops.unpack_weight(weight, *ctx.sizes, dtype=dy.dtype)
        dweight = None if x is None else dy.t() @ x
        each = spaced(dy) @ weight if dx else None, None, dy.sum(0) if dbias else None
        return (*each, None, None, dweight)[: len(needs)]


def takes(x: Tensor) -> bool:
    """Return whether ``ops.packed_linear`` supports the dtype and device of ``x``."""
    return x.dtype in (torch.float32, torch.bfloat16) or (x.dtype == torch.float16 and x.is_cuda)


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, int8: bool) -> Tensor:
    """Compute ``ops.packed_linear`` for any number of rows ``x (T, I)``.

    If there are more rows than the op supports on CUDA, torch uses a dequantised copy.
    """
    if x.shape[0] <= MAX_CUDA_ROWS or not limits_rows(x):  # len(x) takes three times as long
        return ops.packed_linear(x, packed, bias, out, int8)
    return linear(x, ops.unpack_weight(packed, out, x.shape[1], dtype=x.dtype), bias)


def limits_rows(x: Tensor) -> bool:
    """Return whether the op supports only ``MAX_CUDA_ROWS`` rows, because ``x`` is on CUDA."""
    return x.is_cuda


def _autocasts(kind: str) -> bool:
    return kind in AUTOCASTS and torch.is_autocast_enabled(kind)


def watched(x: Tensor) -> bool:
    """Return whether autocast for ``x``, tracing or a transform of torch is active."""
    return (
        (torch._C._is_any_autocast_enabled() and _autocasts(x.device.type))
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )

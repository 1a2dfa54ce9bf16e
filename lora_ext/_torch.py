"""State of torch during a call (autocast, compilation), and ops that are written in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

AUTOCASTS = ("cpu", "cuda")  # torch.autocast raises for other devices such as meta.
_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)

TILE_COLUMNS = 32  # columns of one AMX tile of 16-bit numbers


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """Return a context manager that disables autocast for the type of ``device``."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCASTS else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts ``x`` in a linear layer; None without a cast."""
    kind = x.device.type
    if kind not in AUTOCASTS or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind) if x.dtype in _AUTOCAST_FROM else None


def compiles() -> bool:
    """Return whether the calling code is being compiled or exported.

    ``torch.compiler.is_compiling`` is not used because it returns True in every thread while one
    thread compiles.
    """
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode in a ``with`` block; restore each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def parameter(module: nn.Module, name: str, *default: Any) -> Any:
    """Return ``getattr(module, name, *default)``; find parameters in a third of getattr's time."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name, *default)


def zero_gradients(y: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return a view of ``y`` that gives each parameter a gradient of zeros in the backward pass.

    Data-parallel training waits for a gradient of every parameter. The values of the parameters are
    not read.
    """
    return _ZeroGradients.apply(y, *parameters)  # pyright: ignore[reportReturnType]


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        # Only shapes, dtypes and devices are saved: an optimizer may change the tensors before the
        # backward, and autograd would raise for a saved tensor that has changed.
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return *grads, *(torch.zeros(s, dtype=t, device=d) for s, t, d in ctx.like)


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError if a tensor has a tangent, including one of ``torch.func.jvp``.

    No op of lora_ext has a forward-mode derivative. If an op has its backward in Python and no
    tensor requires a gradient, torch calls the op below autograd and would silently drop the
    tangent. Ops with a backward in C++ check for tangents themselves.
    """
    if compiles():
        return
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(f"{op} has no forward-mode derivative")


# -------------------------------------------------------------------------------------------------
# Products in which a NaN affects only the row that contains it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply ``F.linear`` with :func:`spaced` operands in the forward and the backward pass."""
    return product_of_rows(lambda rows: F.linear(rows, weight, bias), x, autocast_dtype(x))


def product_of_rows(
    product: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute ``product(x)`` with :func:`spaced` operands in the forward and the backward.

    Spaced rows are flattened to two dimensions, because torch adds the bias of an input with more
    dimensions in a second pass, which rounds once more.

    Args:
        product: function of ``T`` rows ``(T, I)``, such as a linear layer with ``I`` input
            features.
        x: input ``(..., I)``.
        dtype: dtype to which autocast would cast ``x``, or None; see :func:`spaced`.
    """
    left = spaced(x, dtype)
    if left is x or x.dim() <= 2:
        return with_spaced_gradient(product(left))
    return with_spaced_gradient(product(left.flatten(0, -2))).unflatten(0, x.shape[:-1])


def spaced(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``x (..., K)``, copied with at least 32 zeros in memory after each row if necessary.

    On CPUs with AMX, torch's product of 16-bit matrices reads every row of its left operand up to a
    multiple of 32 columns and multiplies the numbers after the row by zero. A NaN or inf at the
    start of the next row therefore makes the result of this row NaN. This function returns a copy
    if ``x`` is on the CPU, ``K`` is not a multiple of 32 and the dtype has 16 bits. Otherwise it
    returns ``x``. ``csrc/ops/gemm.cpp`` implements the same for ops in C++.

    Args:
        x: left operand of a product of two matrices; ``K`` is the summed dimension.
        dtype: dtype to which autocast would cast ``x``, or None if autocast is off. ``x`` is cast
            to it before the zeros are added, since a later cast would remove them.
    """
    if not _needs_space(x, dtype):
        return x
    x = x if dtype is None else x.to(dtype)
    return _spaced_op(x) if compiles() else _space(x)


def with_spaced_gradient(y: Tensor) -> Tensor:
    """Register a hook that applies :func:`spaced` to the gradient of ``y (..., O)``; return ``y``.

    ``y`` is the result of a product. Its gradient is the left operand of the product that computes
    the gradient of the input. In a compiled graph the gradient is not spaced.
    """
    if y.requires_grad and _needs_space(y) and not compiles():
        y.register_hook(spaced)
    return y


def _needs_space(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    halves = (x.dtype if dtype is None else dtype) in (torch.float16, torch.bfloat16)
    return halves and x.is_cpu and x.shape[-1] % TILE_COLUMNS != 0


def _space(x: Tensor) -> Tensor:
    width = x.shape[-1]
    return F.pad(x, (0, 2 * TILE_COLUMNS - width % TILE_COLUMNS))[..., :width]


# -------------------------------------------------------------------------------------------------
# Ops in Python

_library = torch.library.Library("lora_ext", "FRAGMENT")

#: Tags of an op that reads other state in addition to its arguments, such as the adapters of the
#: current ``with`` block. A CUDA graph must not contain the op, since a replay would not read the
#: state again.
READS_MORE = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)


def traced(
    schema: str,
    fake: Callable[..., Any],
    backward: tuple[Callable[..., Any], Callable[..., None] | None] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that registers a function as an op, which the compiler does not trace.

    Args:
        schema: name, arguments and results of the op, as in
            ``"experts_mm(Tensor x, Tensor ends) -> Tensor"``.
        fake: fake kernel, a function of the same arguments. Its result has the right shapes, dtypes
            and device; its values are not used.
        backward: pair of ``backward(ctx, *gradients)`` and ``setup_context`` (or None), as for
            :func:`torch.library.register_autograd`; None for an op without a gradient.
        tags: :data:`READS_MORE`, or empty.
    """
    name = schema.partition("(")[0]

    def define(function: Callable[..., Any]) -> Any:
        _library.define(schema, tags=tags)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_ext::{name}", fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                f"lora_ext::{name}", backward[0], setup_context=backward[1], lib=_library
            )
        return getattr(torch.ops.lora_ext, name)

    return define


# In a compiled graph, `_space` is an op: the compiler would remove zeros that no later op reads.
_spaced_op = traced(
    "spaced(Tensor x) -> Tensor",
    fake=_space,
    backward=(lambda _ctx, dy: dy, None),
)(_space)

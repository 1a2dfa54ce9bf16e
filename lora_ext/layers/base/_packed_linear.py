"""Packed copies of base weights for products of few rows, as in decoding and verification.

The time of a product of 1 to 32 rows is bounded by reading the weight from memory, but torch's
product is slower than that: see ``docs/packed.md``. A second copy of the weight, in the order in
which the product reads it, brings the time near the memory bound.

    pack_linears(model)        # every linear layer, in place; the model may have adapters or none
    model.generate(...)        # outside gradients; everything else is as before
    unpack_linears(model)      # restores the modules

``lora_ext.attach(model, pool, pack_base=True)`` does the same for a model with a pool's adapters.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

from lora_ext import ops
from lora_ext._checks import number, require
from lora_ext._memory import free_bytes
from lora_ext._torch import compiles, linear, spaced

from ._modules import base_modules
from ._packed_weight import PackedWeight, why_not_packed

Model = TypeVar("Model", bound=nn.Module)

#: Most rows of a packed product; torch computes larger products.
MOST_ROWS = 32

# Compiler of the torch.compile that calls this code. It is also set while torch.compile runs a
# frame eagerly after a failed trace, because other frames of the model are compiled.
_compiler: Any = getattr(eval_frame, "get_eval_frame_callback", lambda: None)

#: Attribute of a packed layer that holds its :class:`PackedWeight`.
_STATE = "_packed_weight"


class PackedLinear(nn.Linear):
    """``nn.Linear`` with a second, packed copy of its weight for evaluation on the CPU.

    :func:`pack_linears` changes an ``nn.Linear`` into this class: the object and its parameters
    remain the same. :func:`unpack_linears` undoes it. The copy is compared with the weight, and
    made again if the weight has changed.
    """

    #: True if every product, of any number of rows and with gradients, uses the packed copy.
    exact = False

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``x W^T + b (..., O)`` of ``input (..., I)``, packed if possible."""
        y = self.packed_product(input)
        return linear(input, self.weight, self.bias) if y is None else y

    def packed_copy(self, x: Tensor) -> Tensor | None:
        """Return the packed copy that an exact layer multiplies ``x`` with.

        Returns:
            The copy; None if the layer is not exact or ``x`` is empty.

        Raises:
            RuntimeError: If the copy cannot be used, so that the result would not be exact.
        """
        if not self.exact:
            return None
        weight: Tensor = self.weight
        eager = not compiles() and _compiler() is None and type(x) in (Tensor, nn.Parameter)
        traced = not eager or _watched()
        if traced or not x.is_cpu or x.dtype != weight.dtype:
            found = f"one of {x.dtype} on {x.device}"
            if traced:
                found = "torch.compile, autocast, or another transformation of the forward"
            raise _not_exact(f"an input of {weight.dtype} on the CPU, run eagerly, found {found}")
        if x.numel() == 0:
            return None
        packed = self.__dict__[_STATE].copy_made_now(weight)
        if packed is None:
            raise _not_exact(why_not_packed(weight) or "a weight that no other thread changes")
        return packed

    def packed_product(self, x: Tensor) -> Tensor | None:
        """Compute the product of ``x (..., I)`` with the packed copy.

        Returns:
            The product; None if the plain product has to be used: in training, in a traced graph,
            or for other dtypes.

        Raises:
            RuntimeError: See :meth:`packed_copy`.
        """
        if self.exact:
            packed = self.packed_copy(x)
            if packed is None:
                return None
            x2d = x.reshape(-1, self.in_features)  # (T, I)
            apply: Any = _Exact.apply
            y = apply(x2d, self.weight, self.bias, packed)  # (T, O)
            return y.view(*x.shape[:-1], self.out_features)
        if compiles() or type(x) is not Tensor or self.training or _watched():
            return None
        weight, bias, wide = self.weight, self.bias, self.in_features
        rows = x.numel() // wide if wide else 0
        if not 0 < rows <= MOST_ROWS or x.dtype != weight.dtype:
            return None
        shape = x.shape
        if not x.is_cpu or shape[-1] != wide:
            return None
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return None
        packed = self.__dict__[_STATE].copy_of(weight)
        if packed is None:
            return None
        if len(shape) == 2:
            return ops.packed_linear(x, packed, bias, self.out_features)  # (T, O)
        x2d = x.view(rows, wide) if x.is_contiguous() else x.reshape(rows, wide)  # (T, I)
        y = ops.packed_linear(x2d, packed, bias, self.out_features)  # (T, O)
        return y.view(*shape[:-1], self.out_features)

    def train(self, mode: bool = True) -> PackedLinear:
        """Set training or evaluation mode; training mode frees the copy."""
        if mode:
            self.__dict__[_STATE].drop()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        """Free the copy before ``to`` and similar calls, as products on other devices never do."""
        self.__dict__[_STATE].drop()
        return super()._apply(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """Return a packed layer, which makes its copy of the weight when it is first used."""
        # The default deepcopy would call __reduce_ex__ below, which makes a plain layer.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the state of a plain ``nn.Linear``, which is unpickled without this package."""
        if type(self) is not PackedLinear:  # torch has changed the class to parametrize it
            return super().__reduce_ex__(protocol)
        state = {k: value for k, value in self.__dict__.items() if k not in (_STATE, "exact")}
        return copyreg._reconstructor, (nn.Linear, object, None), state  # pyright: ignore


def _not_exact(expected_and_found: str) -> RuntimeError:
    remedy = "call lora_ext.exact(model, enabled=False) first"
    return RuntimeError(f"exact: layer: expected {expected_and_found}; {remedy}")


class _Exact(torch.autograd.Function):
    """Packed product with the gradients of the plain product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return ops.packed_linear(x, packed, bias, weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dx, dweight, dbias, _ = ctx.needs_input_grad
        return (
            spaced(dy) @ weight if dx else None,
            dy.t() @ x if dweight else None,
            dy.sum(0) if dbias else None,
            None,
        )


def pack_linears(model: Model, names: Iterable[str] | None = None) -> Model:
    """Make packed copies of the weights of linear layers, for products of at most 32 rows.

    Changes any model in place, with adapters or without: its ``nn.Linear`` layers, including base
    layers of :class:`LoraLinear`, of PEFT and of an attached model, but not adapters' factors. The
    layers remain the same objects, with the same parameters, names, hooks, state dicts and pickled
    files. :func:`unpack_linears` undoes it.

    A copy is used for products without gradient, in evaluation mode, in the weight's own dtype,
    outside ``torch.compile``; torch computes all others. It needs as many bytes as the weight; tied
    weights share one copy. It is made here, and made again at the second product after a change of
    the weight. A change is detected by the weight's identity, address, dtype, shape and version,
    and by a sample of its values from every few rows and columns, which change if an adapter is
    merged through ``weight.data``, as in PEFT. A change of single rows, columns or values through
    ``weight.data`` or ``weight.numpy()`` may be missed: unpack first.

    Args:
        model: in evaluation mode; it may be a layer itself.
        names: names of the modules to pack, as in ``model.named_modules()``; None for all that are
            exactly ``nn.Linear``, except adapters' factors. Subclasses with their own forward are
            not changed.

    Returns:
        ``model``.

    Raises:
        ValueError: If a module is missing, in training mode, not on the CPU, not of float32 or
            bfloat16 (quantised, for example), made in inference mode, or has its own forward.
        RuntimeError: If a module is packed already. After any error the model is unchanged.
    """
    chosen = linears = dict(linears_of(model))
    if names is not None:
        chosen = {}
        for name in names:
            expected = "the name of a linear layer of the model"
            require(name in linears, "pack_linears", "names", expected, repr(name))
            chosen[name] = linears[name]
    require(chosen, "pack_linears", "model", "a model with linear layers", "none")
    for name, module in chosen.items():
        _check(name, module)
    shared: dict[int, PackedWeight] = {}
    for module in chosen.values():
        packed = shared.setdefault(id(module.weight), PackedWeight())
        module.__class__ = PackedLinear
        module.__dict__[_STATE] = packed
        packed.copy_made_now(module.weight)
    return model


def unpack_linears(model: Model) -> Model:
    """Undo :func:`pack_linears` in all of ``model``, and return ``model``.

    Raises:
        RuntimeError: If nothing is packed, or a packed layer was parametrized, which changes its
            class. The model is then unchanged.
    """
    packed = packed_layers(model, "unpack_linears")
    require(packed, "unpack_linears", "model", "one with packed layers", "none", RuntimeError)
    unpack(packed)
    return model


def packed_layers(model: nn.Module, where: str) -> list[PackedLinear]:
    """Return all packed layers of a model, for :func:`unpack`.

    Raises RuntimeError, with a message that begins with ``where``, if a layer is exact or
    parametrized.
    """
    packed = {name: m for name, m in linears_of(model) if isinstance(m, PackedLinear)}
    remedy = "call torch.nn.utils.parametrize.remove_parametrizations first"
    for name, module in packed.items():
        found = "an exact model; call lora_ext.exact(model, enabled=False) first"
        require(not module.exact, where, "model", "a model that is not exact", found, RuntimeError)
        plain, found = type(module) is PackedLinear, f"a {type(module).__name__}; {remedy}"
        expected = "a layer without parametrizations"
        require(plain, f"{where}: model", repr(name), expected, found, RuntimeError)
    return list(packed.values())


def unpack(layers: Iterable[PackedLinear]) -> None:
    """Change packed layers back to ``nn.Linear``."""
    for module in layers:
        del module.__dict__[_STATE]
        module.__dict__.pop("exact", None)
        module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]


class Packing(NamedTuple):
    """Result of :func:`packing`; ``str()`` gives one line for users."""

    bytes: int  # size of the copy
    free: int  # free memory in bytes
    reason: str | None  # why the base should not be packed, or None

    @property
    def fits(self) -> bool:
        """True if the base should be packed."""
        return self.reason is None

    def __str__(self) -> str:
        size = f"{self.bytes / 1e9:.2f} GB of the {self.free / 1e9:.2f} GB that are free"
        if self.reason is None:
            return f"the base is packed for decoding, which takes {size}"
        return f"the base is not packed for decoding: {self.reason}"


def packing(model: nn.Module, share: float = 0.25) -> Packing:
    """Check whether :func:`pack_linears` is possible for a model and fits into memory.

    Nothing is packed.

    Args:
        model: a model that is not packed.
        share: most part of the free memory that the copy may use; above 0, at most 1.

    Raises:
        ValueError: If ``share`` is out of range.
    """
    number("packing", "share", share, above=0, maximum=1)
    weights = {id(m.weight): m.weight for _, m in linears_of(model)}
    wanted = sum(
        -(-w.shape[0] // 32) * 32 * w.shape[1] * w.element_size() for w in weights.values()
    )
    free = free_bytes("cpu") or 0
    refusals = [why_not_packed(w) for w in weights.values()]
    refused = next((each for each in refusals if each is not None), None)
    reason = None
    if not weights:
        reason = "it has no plain linear layer"
    elif refused is not None:
        reason = f"it wants {refused}"
    elif wanted > share * free:
        most = f"{share:.0%} of the {free / 1e9:.2f} GB that are free"
        reason = f"the copy's {wanted / 1e9:.2f} GB are more than {most}"
    return Packing(wanted, free, reason)


def packed_bytes(model: nn.Module) -> int:
    """Return the size in bytes of the packed copies of all layers of ``model``."""
    states = {m.__dict__[_STATE] for _, m in linears_of(model) if isinstance(m, PackedLinear)}
    return sum(state.nbytes for state in states)


def linears_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the plain and packed linear layers of a model by name, except adapters' factors."""
    for name, base in base_modules(model):
        if type(base) is nn.Linear or isinstance(base, PackedLinear):
            yield name, base


def _check(name: str, module: nn.Linear) -> None:
    where, what = "pack_linears: model", repr(name)
    plain, expected = type(module) is not PackedLinear, "a layer that is not packed"
    found = "one that is packed already; call unpack_linears(model) first"
    require(plain, where, what, expected, found, RuntimeError)
    found = "training; call model.eval() first"
    require(not module.training, where, what, "evaluation mode", found)
    own, found = "forward" in module.__dict__, "a replaced forward (accelerate's offloading?)"
    require(not own, where, what, "nn.Linear's forward", found)
    refusal = why_not_packed(module.weight)
    if refusal is not None:
        raise ValueError(f"{where}: {what}: expected {refusal}")


def _watched() -> bool:
    """Return whether autocast, tracing or a transform of torch is active."""
    return (
        torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )

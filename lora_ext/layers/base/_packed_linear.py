"""Packed copies of base weights for products of few rows, as in decoding.

The time of a product of 1 to 32 rows is at least the time to read the weight from memory. torch's
product is slower than this bound: see ``docs/packed.md``. A packed copy stores the values of the
weight in the order in which the product reads them. The time of a product with it is close to the
bound.

    pack_linears(model)        # all linear layers, in place; the model may have adapters
    model.generate(...)        # uses the copies, since it computes no gradients
    unpack_linears(model)      # restores the modules

``lora_ext.attach(model, pool, pack_base=True)`` does the same for a model that uses the adapters of
a pool.
"""

from __future__ import annotations

import copy
import copyreg
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

from lora_ext import ops
from lora_ext._checks import number, require
from lora_ext._memory import free_bytes
from lora_ext._torch import compiles, linear, spaced

from ._modules import base_modules, linear_size
from ._packed_weight import PackedWeight, why_not_packed

Model = TypeVar("Model", bound=nn.Module)

#: Maximum number of rows of a packed product; torch computes larger products.
MOST_ROWS = 32

# Returns the compiler if torch.compile runs this code, otherwise None. The compiler is also set if
# torch.compile runs a frame eagerly after a failed trace, because it compiles other frames of the
# model.
_compiler: Any = getattr(eval_frame, "get_eval_frame_callback", lambda: None)

#: Attribute of a packed layer for its :class:`PackedWeight`.
_STATE = "_packed_weight"


class PackedLinear(nn.Linear):
    """``nn.Linear`` with a second, packed copy of its weight for evaluation on the CPU.

    :func:`pack_linears` sets the class of an ``nn.Linear`` to this class; the object and its
    parameters remain the same. :func:`unpack_linears` undoes this. Before each use of the copy, the
    weight is checked, and the copy is renewed if the weight has changed. Letters: ``T`` rows, ``I``
    input and ``O`` output features.
    """

    #: True if all products use the packed copy, with any number of rows and with gradients.
    exact = False

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``x W^T + b (..., O)`` for the input x, with the packed copy if possible."""
        y = self.packed_product(input)
        return linear(input, self.weight, self.bias) if y is None else y

    def packed_copy(self, x: Tensor) -> Tensor | None:
        """Return the packed copy with which an exact layer multiplies ``x``.

        Returns:
            The copy, or None if the layer is not exact or ``x`` is empty.

        Raises:
            RuntimeError: If an exact layer cannot use the copy.
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
            raise _not_exact(why_not_packed(weight) or "a constant weight, found one that changes")
        return packed

    def packed_product(self, x: Tensor) -> Tensor | None:
        """Compute the product of ``x (..., I)`` with the packed copy.

        Returns:
            The product, or None if the plain product has to be used, for example in training, in a
            traced graph, or for an input of another dtype.

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
        """Free the copy, since ``to`` may move the layer to a device that never frees it."""
        self.__dict__[_STATE].drop()
        return super()._apply(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """Copy the layer as a packed layer, which packs its weight when products use it."""
        # The default deepcopy would call __reduce_ex__ below, which creates a plain layer.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the state of a plain ``nn.Linear``, which can be loaded without this package."""
        if type(self) is not PackedLinear:  # torch changes the class to parametrize a layer
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

    Changes the ``nn.Linear`` layers of a model in place. These include the base layers of
    :class:`LoraLinear`, of PEFT's layers and of layers with a pool's adapters, but not the factors
    of adapters. The layers remain the same objects, with the same parameters, names, hooks, state
    dicts and pickled files. :func:`unpack_linears` undoes the change.

    A copy is used for products without gradients, in evaluation mode, outside ``torch.compile``,
    with inputs in the dtype of the weight. torch computes all other products. A copy needs as much
    memory as the weight; tied weights share one copy. This function makes the copies. After a
    weight has changed, the second product renews its copy.

    A change is detected by the identity, address, dtype, shape and version of the weight, and by a
    sample of its values from every few rows and columns. These values change if an adapter is
    merged through ``weight.data``, as in PEFT. If you change only some rows, columns or values
    through ``weight.data`` or ``weight.numpy()``, call :func:`unpack_linears` first, because such a
    change may not be detected.

    Args:
        model: model in evaluation mode, or a linear layer. Its quantised layers are not packed,
            which a UserWarning reports.
        names: names of the modules to pack, as in ``model.named_modules()``. None packs all modules
            of class ``nn.Linear`` except the factors of adapters. Instances of subclasses are not
            changed.

    Returns:
        ``model``.

    Raises:
        ValueError: If a name is not that of a linear layer, the model has no plain linear layer, or
            a layer is in training mode, is not on the CPU, is not in float32 or bfloat16 (for
            example, quantised), was created in inference mode, or has a replaced forward.
        RuntimeError: If a layer is packed already.

    After any error the model is unchanged.
    """
    chosen = linears = dict(linears_of(model))
    if names is not None:
        chosen = {}
        for name in names:
            expected = "the name of a linear layer of the model"
            require(name in linears, "pack_linears", "names", expected, repr(name))
            chosen[name] = linears[name]
    left = {} if names is not None else _quantised(model)
    found = f"only {_some(left)}" if left else f"none in {type(model).__name__}"
    require(chosen, "pack_linears", "model", "plain linear layers", found)
    for name, module in chosen.items():
        _check(name, module)
    if left:
        warnings.warn(
            f"pack_linears: model: expected plain linear layers, found {_some(left)}, which are "
            f"not packed; packed: {len(chosen)}, for example {next(iter(chosen))!r}",
            stacklevel=2,
        )
    shared: dict[int, PackedWeight] = {}
    for module in chosen.values():
        packed = shared.setdefault(id(module.weight), PackedWeight())
        module.__class__ = PackedLinear
        module.__dict__[_STATE] = packed
        packed.copy_made_now(module.weight)
    return model


def unpack_linears(model: Model) -> Model:
    """Undo :func:`pack_linears` for all layers of ``model``, and return ``model``.

    Raises:
        RuntimeError: If no layer is packed, a layer is exact, or a packed layer has been
            parametrized, which changes its class. The model is then unchanged.
    """
    packed = packed_layers(model, "unpack_linears")
    require(packed, "unpack_linears", "model", "packed layers", "none", RuntimeError)
    unpack(packed)
    return model


def packed_layers(model: nn.Module, where: str) -> list[PackedLinear]:
    """Return all packed layers of a model, as arguments of :func:`unpack`.

    Raises RuntimeError if a layer is exact or parametrized; the message starts with ``where``.
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
    """Result of :func:`packing`. ``str()`` returns one line for users."""

    bytes: int  # size of all packed copies
    free: int  # free memory in bytes
    reason: str | None  # reason why the model should not be packed, or None

    @property
    def fits(self) -> bool:
        """True if the model should be packed."""
        return self.reason is None

    def __str__(self) -> str:
        size = f"{self.bytes / 1e9:.2f} GB of the {self.free / 1e9:.2f} GB that are free"
        if self.reason is None:
            return f"the base model is packed for decoding, which takes {size}"
        return f"the base model is not packed for decoding: {self.reason}"


def packing(model: nn.Module, share: float = 0.25) -> Packing:
    """Check whether :func:`pack_linears` supports a model and its copies fit into memory.

    The function does not pack the model.

    Args:
        model: model that is not packed.
        share: maximum share of the free memory that the copies may use, above 0 and at most 1.

    Raises:
        ValueError: If ``share`` is out of range.
    """
    number("packing", "share", share, above=0, maximum=1)
    weights = {id(m.weight): m.weight for _, m in linears_of(model) if hasattr(m, "weight")}
    left = _quantised(model)
    wanted = sum(
        -(-w.shape[0] // 32) * 32 * w.shape[1] * w.element_size() for w in weights.values()
    )
    free = free_bytes("cpu") or 0
    refusals = [why_not_packed(w) for w in weights.values()]
    refused = next((each for each in refusals if each is not None), None)
    reason = None
    if left:
        reason = f"expected plain linear layers, found {_some(left)}"
    elif not weights:
        reason = "it has no plain linear layer"
    elif refused is not None:
        reason = f"expected {refused}"
    elif wanted > share * free:
        most = f"{share:.0%} of the {free / 1e9:.2f} GB that are free"
        reason = f"the copies need {wanted / 1e9:.2f} GB, more than {most}"
    return Packing(wanted, free, reason)


def packed_bytes(model: nn.Module) -> int:
    """Return the size in bytes of the packed copies of all layers of ``model``."""
    states = {m.__dict__[_STATE] for _, m in linears_of(model) if isinstance(m, PackedLinear)}
    return sum(state.nbytes for state in states)


def _quantised(model: nn.Module) -> dict[str, nn.Module]:
    """Return the base layers without a plain floating-point weight, except ``nn.Linear``."""
    found = {n: m for n, m in base_modules(model) if type(m) is not nn.Linear and linear_size(m)}
    weights = {name: getattr(base, "weight", None) for name, base in found.items()}
    plain = {n for n, w in weights.items() if type(w) is nn.Parameter and w.is_floating_point()}
    return {name: base for name, base in found.items() if name not in plain}


def _some(layers: dict[str, nn.Module]) -> str:
    name, layer = next(iter(layers.items()))
    return f"{len(layers)} quantised layers such as {name!r}, a {type(layer).__name__}"


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

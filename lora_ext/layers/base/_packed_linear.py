"""Packed copies of base weights for products of few rows, as in decoding.

The time of a product of 1 to 32 rows is at least the time to read the weight from memory. torch's
product is slower than this bound: see ``docs/packed.md``. A packed copy stores the values of the
weight in the order in which the product reads them. The time of a product with a packed copy is
close to the bound.

    pack_linears(model)        # all linear layers, in place; the model may have adapters
    model.generate(...)        # uses the copies, since it computes no gradients
    unpack_linears(model)      # restores the modules

``lora_ext.attach(model, pool, pack_base=True)`` does the same for a model that uses the adapters of
a pool. With ``bits=8`` or ``bits=4`` the copies are rounded, so that products read fewer bytes.
"""

from __future__ import annotations

import copyreg
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad

from lora_ext import ops
from lora_ext._checks import choice, number, require, require_flags
from lora_ext._memory import free_bytes
from lora_ext._torch import compiles, linear, parameter

from ._gguf import gguf_blocks
from ._modules import base_modules, linear_size
from ._packed_only import PackedOnlyLinear, PackedProduct, copied_layer, packed_product, watched
from ._packed_weight import Format, PackedWeight, why_not_packed

Model = TypeVar("Model", bound=nn.Module)

#: Maximum number of rows of a packed product; torch computes larger products.
MOST_ROWS = 32

# Returns the compiler if torch.compile runs this code, otherwise None. The compiler is also set if
# a frame runs eagerly after a failed trace, because torch.compile then compiles other frames of the
# model.
_compiler: Any = getattr(eval_frame, "get_eval_frame_callback", lambda: None)

#: Attribute of a model for the result of a measurement, see ``_packing_choice.py``.
CHOICE = "_lora_ext_packing_choice"
#: Attribute of a packed layer for its :class:`PackedWeight`.
_STATE = "_packed_weight"


class PackedLinear(nn.Linear):
    """``nn.Linear`` with a second, packed copy of its weight for evaluation.

    :func:`pack_linears` sets the class of an ``nn.Linear`` to this class; the object and its
    parameters remain the same. :func:`unpack_linears` undoes this change. Before each use of the
    copy, the weight is checked, and the copy is renewed if the weight has changed. Letters: ``T``
    rows, ``I`` input and ``O`` output features.
    """

    #: True if all products use the packed copy, with any number of rows and with gradients. If
    #: False, copies of 8 or 4 bits are still used for any number of rows, but not with gradients.
    exact = False

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``x W^T + b (..., O)`` for the input x, with the packed copy if possible."""
        y = self.packed_product(input)
        return linear(input, self.weight, self.bias) if y is None else y

    def packed_copy(self, x: Tensor) -> Tensor | None:
        """Return the packed copy by which an exact layer multiplies ``x``.

        Returns:
            The copy, or None if the layer is not exact or ``x`` is empty.

        Raises:
            RuntimeError: If an exact layer cannot use the copy.
        """
        if not self.exact:
            return None
        weight: Tensor = self.weight
        eager = not compiles() and _compiler() is None and type(x) in (Tensor, nn.Parameter)
        traced = not eager or watched(x)
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
        """Compute ``x W^T + bias`` for ``x (..., I)``, with the packed copy of the weight ``W``.

        Returns:
            The result ``(..., O)``, or None if the caller must use the plain weight. An exact layer
            returns None only for an empty input. Other layers also return None in training, in a
            traced graph, or for an input of another dtype, for example.

        Raises:
            RuntimeError: If an exact layer cannot use the copy.
        """
        if self.exact:
            packed = self.packed_copy(x)
            if packed is None:
                return None
            x2d = x.reshape(-1, x.shape[-1])  # (T, I)
            apply: Any = PackedProduct.apply
            y = apply(x2d, packed, self.bias, self.weight.shape[0], False, self.weight)  # (T, O)
            return y.view(*x.shape[:-1], y.shape[-1])
        operands = None if compiles() else self.packed_operands(x)
        if operands is None:
            return None
        shape = x.shape
        if len(shape) == 2:
            return packed_product(x, *operands)  # (T, O)
        x2d = x.view(-1, shape[-1]) if x.is_contiguous() else x.reshape(-1, shape[-1])  # (T, I)
        return packed_product(x2d, *operands).view(*shape[:-1], self.out_features)

    def packed_operands(
        self, x: Tensor, counts: bool = True
    ) -> tuple[Tensor, Tensor | None, int, bool] | None:
        """Return the arguments of :func:`ops.packed_linear` for an eager product with ``x``.

        Returns None if the layer is exact, or the plain product has to be used. See
        :meth:`PackedWeight.copy_of` for ``counts``.
        """
        if type(x) is not Tensor or self.training or self.exact or forward_ad._current_level >= 0:
            return None
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        state: PackedWeight = self.__dict__[_STATE]
        form = state.form
        if not ops.is_plain_product(x, weight, bias, self.out_features):
            return None
        if form.bits is None and x.numel() > MOST_ROWS * self.in_features:
            return None
        packed = state.copy_of(weight, counts) if form.bits is None else state.copy_made_now(weight)
        return None if packed is None else (packed, bias, self.out_features, form.int8)

    def train(self, mode: bool = True) -> PackedLinear:
        """Set training or evaluation mode. Training mode frees the copy."""
        if mode:
            self.__dict__[_STATE].drop()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        """Free the copy, since ``to`` may move the layer to a device where nothing frees it."""
        self.__dict__[_STATE].drop()
        return super()._apply(*args, **kwargs)

    # A deep copy is a packed layer, which packs its weight at its first products. The default
    # deepcopy would call __reduce_ex__ below, which creates a plain layer.
    __deepcopy__ = copied_layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the state of a plain ``nn.Linear``, which can be loaded without this package."""
        if type(self) is not PackedLinear:  # torch changes the class to parametrize a layer
            return super().__reduce_ex__(protocol)
        state = {k: value for k, value in self.__dict__.items() if k not in (_STATE, "exact")}
        return copyreg._reconstructor, (nn.Linear, object, None), state  # pyright: ignore


def _not_exact(expected_and_found: str) -> RuntimeError:
    remedy = "call lora_ext.exact(model, enabled=False) first"
    return RuntimeError(f"exact: layer: expected {expected_and_found}; {remedy}")


def pack_linears(
    model: Model,
    names: Iterable[str] | None = None,
    *,
    bits: int | None = None,
    group: int = 64,
    minimum: bool = False,
    activations: str = "float",
    keep: bool = True,
    gguf: str | os.PathLike[str] | None = None,
) -> Model:
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
    change might not be detected.

    With ``bits``, the copies contain rounded weights: see :func:`lora_ext.ops.pack_weight`. They
    are used for any number of rows, so that a prompt and its answer are computed with the same
    weights. Training uses the plain weights. Such layers may be on CUDA, where torch multiplies
    more than 64 rows by a dequantised weight, and changes through ``weight.data`` are not detected.

    Args:
        model: model in evaluation mode, or a linear layer. Its quantised layers are not packed,
            which a UserWarning reports.
        names: names of the modules to pack, as in ``model.named_modules()``. None packs all modules
            of class ``nn.Linear`` except the factors of adapters. Instances of subclasses are not
            changed.
        bits: 8 or 4, or None for copies in the dtype of the weights.
        group: input features per scale: 32, 64 or 128. It must divide those of every layer.
        minimum: whether groups of 4-bit weights also have a minimum.
        activations: "float", or "int8" to round each row of the inputs to 8 bits (on the CPU).
        keep: whether to keep the plain weights. If False, all products use the packed weights, also
            in training. Merging an adapter packs the merged weight. The layers cannot be moved to
            another device, and saving or pickling them raises RuntimeError.
        gguf: path of a GGUF file of this model, whose blocks of type Q8_0, Q4_0 and Q4_1 are packed
            as they are. Other linear layers are left unpacked.

    Returns:
        ``model``.

    Raises:
        ValueError: If a name is not that of a linear layer, the model has no plain linear layer, or
            a layer is in training mode, is not on the CPU (with ``bits``: CPU or CUDA), is not in
            float32 or bfloat16 (on CUDA also float16), was created in inference mode, or has a
            replaced forward. With ``bits``, if a value is not finite or above 65504, or the group
            does not divide the input features.
        RuntimeError: If a layer is packed already.

    After any error the model is unchanged.
    """
    form = _format(bits, group, minimum, activations, keep, gguf is not None)
    linears, expected = dict(linears_of(model)), "the name of a linear layer of the model"
    left = {} if names is not None else _quantised(model)
    names = linears if names is None else list(names)
    for name in names:
        require(name in linears, "pack_linears", "names", expected, repr(name))
    blocks = {} if gguf is None else gguf_blocks(gguf, linears)
    chosen = {name: linears[name] for name in names if gguf is None or name in blocks}
    found = f"only {_some(left)}" if left else f"none in {type(model).__name__}"
    require(chosen, "pack_linears", "model", "plain linear layers", found)
    for name, module in chosen.items():
        _check(name, module, blocks[name][0].bits if blocks else bits, form.int8)
    states: dict[int, PackedWeight] = {}
    for name, module in chosen.items():
        if id(module.weight) not in states:
            states[id(module.weight)] = _packed(name, module.weight, form, blocks.get(name))
    if left:
        warnings.warn(
            f"pack_linears: model: expected plain linear layers, found {_some(left)}, which are "
            f"not packed; packed: {len(chosen)}, for example {next(iter(chosen))!r}",
            stacklevel=2,
        )
    for module in chosen.values():
        weight, state = module.weight, states[id(module.weight)]
        if keep:
            module.__class__ = PackedLinear
            module.__dict__[_STATE] = state
        else:
            module.__class__ = PackedOnlyLinear
            only: Any = module
            only.drop_weight(state.form, state.copy_of(weight))
    model.__dict__.pop(CHOICE, None)  # of an earlier measurement
    return model


def _packed(
    name: str, weight: Tensor, form: Format, given: tuple[Format, Tensor] | None
) -> PackedWeight:
    """Pack a weight, or use the copy that is given."""
    state = PackedWeight(form if given is None else given[0]._replace(int8=form.int8))
    if given is not None:
        state.hold(weight, given[1].to(weight.device))
        return state
    try:
        state.copy_made_now(weight)
    except ValueError as error:
        raise ValueError(f"pack_linears: {name or 'model'}: {error}") from error
    return state


def _format(
    bits: int | None, group: int, minimum: bool, activations: str, keep: bool, gguf: bool
) -> Format:
    """Check the arguments of :func:`pack_linears`, and return the format of the copies."""
    where = "pack_linears"
    require_flags(where, minimum=minimum, keep=keep)
    require(bits in (None, 8, 4), where, "bits", "None, 8 or 4", repr(bits))
    require(group in (32, 64, 128), where, "group", "32, 64 or 128", repr(group))
    choice(where, "activations", activations, ("float", "int8"))
    require(not minimum or bits == 4, where, "minimum", f"False if bits is {bits}", minimum)
    require(bits is None or not gguf, where, "bits", "None if gguf is set", bits)
    rounded, only = bits is not None or gguf, "if bits is None"
    require(rounded or keep, where, "keep", f"True {only}", keep)
    require(rounded or activations == "float", where, "activations", f"'float' {only}", activations)
    return Format(bits, group, minimum, activations == "int8")


def unpack_linears(model: Model) -> Model:
    """Undo :func:`pack_linears` for all layers of ``model``, and return ``model``.

    Raises:
        RuntimeError: If no layer is packed, a layer is exact, or a packed layer has been
            parametrized, which changes its class. The model is then unchanged.
    """
    packed = packed_layers(model, "unpack_linears")
    require(packed, "unpack_linears", "model", "packed layers", "none", RuntimeError)
    unpack(packed)
    model.__dict__.pop(CHOICE, None)
    return model


def packed_layers(model: nn.Module, where: str) -> list[PackedLinear]:
    """Return all packed layers of a model, as arguments of :func:`unpack`.

    Raises RuntimeError if a layer is exact or parametrized; the message starts with ``where``.
    """
    found = "layers packed with keep=False, which have no plain weight"
    only = any(isinstance(m, PackedOnlyLinear) for _, m in linears_of(model))
    require(not only, where, "keep", "layers packed with keep=True", found)
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


class _Packing(NamedTuple):
    bytes: int  # size of all packed copies
    free: int  # free memory in bytes
    reason: str | None  # reason why the model should not be packed, or None


class Packing(_Packing):
    """Result of :func:`packing`. ``str()`` returns one line for users."""

    #: How the model is packed, and the measured times that led to it; None if it is not packed.
    now: str | None = None

    @property
    def fits(self) -> bool:
        """True if the model should be packed."""
        return self.reason is None

    def __str__(self) -> str:
        if self.now is not None:
            return f"the base model is {self.now}"
        size = f"{self.bytes / 1e9:.2f} GB of the {self.free / 1e9:.2f} GB that are free"
        if self.reason is None:
            return f"the base model is packed for decoding, which takes {size}"
        return f"the base model is not packed for decoding: {self.reason}"


def packing(model: nn.Module, share: float = 0.25, *, bits: int | None = None) -> Packing:
    """Check whether :func:`pack_linears` supports a model and its copies fit into memory.

    The function does not pack the model. ``str()`` of the result describes how the model is packed
    or, for an unpacked model, the choice of ``attach(pack_base=None)``.

    Args:
        model: model that may be packed.
        share: maximum share of the free memory that the copies may use, above 0 and at most 1.
        bits: see :func:`pack_linears`.

    Raises:
        ValueError: If ``share`` is out of range.
    """
    number("packing", "share", share, above=0, maximum=1)
    layers, left = [m for _, m in linears_of(model)], _quantised(model)
    plain = [m for m in layers if not isinstance(m, PackedOnlyLinear) and hasattr(m, "weight")]
    weights = {id(m.weight): m.weight for m in plain}
    wanted = sum(
        -(-w.shape[0] // 32) * 32 * w.shape[1] * (8 * w.element_size() if bits is None else bits)
        for w in weights.values()
    )
    wanted //= 8
    free = free_bytes(next(iter(weights.values())).device if weights else "cpu") or 0
    refused = next(filter(None, (why_not_packed(w, bits) for w in weights.values())), None)
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
    result = Packing(wanted, free, reason)
    forms = sorted({str(form) for m in layers if (form := packed_form(m)) is not None})
    size = f"{packed_bytes(model) / 1e9:.2f} GB"
    now = f"packed {' or '.join(forms)}, {size}" if forms else None
    result.now = model.__dict__.get(CHOICE, now)
    return result


def packed_bytes(model: nn.Module) -> int:
    """Return the size in bytes of the packed copies of all layers of ``model``."""
    layers = [m for _, m in linears_of(model)]
    held = {m.__dict__[_STATE] for m in layers if isinstance(m, PackedLinear)}
    only = {id(m.packed): m.packed for m in layers if isinstance(m, PackedOnlyLinear)}
    return sum(each.nbytes for each in (*held, *only.values()))


def packed_form(module: nn.Module) -> Format | None:
    """Return the format of a layer's packed weight; None if the layer is not packed."""
    if isinstance(module, PackedOnlyLinear):
        return module.form
    return module.__dict__[_STATE].form if isinstance(module, PackedLinear) else None


def _quantised(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the base layers other than ``nn.Linear`` without a plain float weight."""
    own = nn.Linear, PackedOnlyLinear
    found = {n: m for n, m in base_modules(model) if type(m) not in own and linear_size(m)}
    weights = {name: getattr(base, "weight", None) for name, base in found.items()}
    plain = {n for n, w in weights.items() if type(w) is nn.Parameter and w.is_floating_point()}
    return {name: base for name, base in found.items() if name not in plain}


def _some(layers: dict[str, nn.Module]) -> str:
    name, layer = next(iter(layers.items()))
    return f"{len(layers)} quantised layers such as {name!r}, a {type(layer).__name__}"


def linears_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the plain and packed linear layers of a model by name, except adapters' factors."""
    for name, base in base_modules(model):
        if type(base) is nn.Linear or isinstance(base, (PackedLinear, PackedOnlyLinear)):
            yield name, base


def _check(name: str, module: nn.Linear, bits: int | None, int8: bool) -> None:
    where, what = "pack_linears: model", repr(name)
    plain = type(module) not in (PackedLinear, PackedOnlyLinear)
    expected = "a layer that is not packed"
    found = "one that is packed already; call unpack_linears(model) first"
    require(plain, where, what, expected, found, RuntimeError)
    found = "training; call model.eval() first"
    require(not module.training, where, what, "evaluation mode", found)
    own, found = "forward" in module.__dict__, "a replaced forward (accelerate's offloading?)"
    require(not own, where, what, "nn.Linear's forward", found)
    expected, cuda = "'float' for weights on CUDA", module.weight.is_cuda
    require(not (int8 and cuda), "pack_linears", "activations", expected, "'int8'")
    refusal = why_not_packed(module.weight, bits)
    if refusal is not None:
        raise ValueError(f"{where}: {what}: expected {refusal}")

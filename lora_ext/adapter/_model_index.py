"""Index of the modules of a base model that adapters may change, and a check of saved base weights.

PEFT saves the whole weight of an adapted or resized embedding or output head. All adapters of a
pool share one base model, so such a weight is accepted only if it equals the weight of the model.
If it differs, the adapter was trained with another embedding or head than the base model has.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.layers import (
    READS_WEIGHTS,
    LoraLayer,
    bypassed,
    head_names,
    linear_sizes,
    matches_suffix,
    projections,
)
from lora_ext.rows import PoolLayer

from ._peft_tensors import TensorSource, base_name

_CHUNK = 1 << 24  # number of elements that are compared at once

PAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# Module classes that PEFT can adapt but this package cannot. Adapters for them are rejected.
_UNSUPPORTED = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)

# The linear layers of routed experts receive rows in a different order from that of the batch, so
# the assignment of adapters to rows does not apply to them.
ROUTED = "routed experts"


@dataclass(frozen=True)
class LinearSpec:
    """Description of a module, or of a parameter of routed experts, that can have an adapter."""

    name: str
    in_features: int  # for an embedding, the number of tokens
    out_features: int
    dtype: torch.dtype
    device: torch.device
    kernel: tuple[int, ...] = ()  # kernel size of a convolution
    groups: int = 1  # groups of a convolution
    plain: bool = False  # whether the class is exactly nn.Linear or nn.Embedding
    experts: int = 1  # for a parameter with one matrix per expert, the number of experts
    embedding: bool = False
    float8: bool = False  # whether a pool stores pages as float8_e4m3fn; vectors have `dtype`
    #: Names of all modules that an adapter changes, in the order of the model.
    order: tuple[str, ...] = ()


class UnknownSize(NotImplementedError):
    """Error that is raised if a module's size is needed and is not in the adapter's file."""


class _Unknown:
    """Placeholder for an unknown size. It equals every size; results of arithmetic are unknown."""

    def __init__(self, what: str):
        self.what = what

    def __repr__(self) -> str:
        return self.what

    def _same(self, *_: Any) -> _Unknown:
        return self

    __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = _same

    def __eq__(self, _: object) -> bool:
        return True

    __lt__ = __gt__ = __le__ = __ge__ = __eq__

    def __index__(self) -> int:
        raise UnknownSize(
            f"{self.what} of the module: the adapter's file does not contain it; load the adapter "
            "into a pool of the model, or merge it with adapters of the same modules"
        )

    __len__ = __iter__ = __index__

    def __getattr__(self, _: str) -> Any:
        operator.index(self)


def unknown_spec(name: str, size: tuple[int, int] | None = None) -> LinearSpec:
    """Return the description of a module from its name and, if they are known, its sizes."""
    unknown: Any = (_Unknown("in_features"), _Unknown("out_features"))
    order: Any = _Unknown("order")
    cpu = torch.device("cpu")
    inputs, outputs = size or unknown
    return LinearSpec(name, inputs, outputs, torch.float32, cpu, order=order)


@dataclass(frozen=True)
class ModelIndex:
    """Index of a model's modules, for reading adapters. The index has no strong reference to the
    model."""

    weights: BaseWeights
    output_head: str | None = None  # name of the output head, which PEFT's "all-linear" excludes
    #: Name of the classifier. For SEQ_CLS, "all-linear" excludes it if there is no output head.
    classifier: str | None = None
    linear: dict[str, LinearSpec] = field(default_factory=dict)
    embedding: dict[str, LinearSpec] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)  # name -> class name
    shared: bool = True  # whether many adapters share the model and must not change its weights
    experts: dict[str, LinearSpec] = field(default_factory=dict)  # by parameter name
    #: For each experts module, the names of all its weight matrices, even if they are not adapted.
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Class names of the modules that are not base layers, by name.
    others: dict[str, str] = field(default_factory=dict)
    #: For each module that is never called, the name of the class that reads its weight.
    bypassed: dict[str, str] = field(default_factory=dict)
    #: Number of tokens in the vocabulary; None if unknown.
    vocabulary: int | None = None
    #: Name of the input embedding; None if unknown.
    input_embedding: str | None = None
    #: Name of an output head that shares the weight of the input embedding.
    tied_head: str | None = None

    @cached_property
    def modules(self) -> dict[str, LinearSpec]:
        """All modules that can have an adapter."""
        return self.linear | self.embedding

    @cached_property
    def specs(self) -> dict[str, LinearSpec]:
        """Modules that can have an adapter, and parameters of experts that can, by name."""
        return self.modules | self.experts

    @classmethod
    def build(
        cls,
        model: nn.Module,
        targets: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelIndex:
        """Create an index of the modules in a model that can have an adapter.

        These are transformers' ``Conv1D``, all modules with ``in_features`` and ``out_features``,
        and ``nn.Embedding``. Subclasses of ``nn.Embedding`` are excluded, since they may scale or
        shift their output.

        Args:
            targets: modules to include: a regular expression for whole names, or a list of names
                and suffixes. None for all modules.
            dtype: dtype of the pool's pages. Default is the dtype of the base weight. If the weight
                is quantised, it is the dtype of the model's activations, that is, of its first
                parameter in one of :data:`PAGE_DTYPES`, or torch's default dtype.
            device: device of the pool's pages. Default is the device on which the module computes:
                the execution device of accelerate's hooks, or the device of the weight.

        Raises:
            TypeError: If ``model`` is not a module.
            ValueError: If a module already has adapters, if no module matches, or if a weight is on
                ``meta`` and no hook loads it.
        """
        known = (None, *PAGE_DTYPES)
        expected = f"one of {PAGE_DTYPES} or torch.float8_e4m3fn"
        require(dtype in known, "AdapterPool", "dtype", expected, dtype)
        check_base("AdapterPool", model)
        targets = targets if targets is None or isinstance(targets, str) else tuple(targets)

        heads, modules = head_names(model), dict(model.named_modules())
        index = cls(BaseWeights(model), *heads, **_input_embedding(model, heads[0]))
        floats = (p.dtype for p in model.parameters() if p.dtype in PAGE_DTYPES)
        of_activations = next(floats, torch.get_default_dtype())

        def stored(weight: object, name: str) -> tuple[torch.dtype, torch.device]:
            """Return the dtype and device of the pages for module ``name`` with this weight."""
            place, found = weight, of_activations
            if not isinstance(place, Tensor):  # a quantised layer, whose tensors have other names
                own = modules[name].parameters(), modules[name].buffers(), model.parameters()
                place = next(itertools.chain(*own), torch.empty(0))
            elif place.dtype in PAGE_DTYPES:
                found = place.dtype
            where = torch.device(device) if device else _device_of(name, place, modules)
            return dtype or found, where

        layers = linear_sizes(modules)
        for name, module in modules.items():
            parent = modules.get(name.rpartition(".")[0])
            if name in layers:
                owner = type(parent).__name__ if isinstance(parent, READS_WEIGHTS) else None
                owner = owner or (ROUTED if in_routed_experts(name) else None)
                if owner is not None:
                    index.unsupported[name] = f"{type(module).__name__} of {owner}"
                    continue
            found, size = index.linear, layers.get(name)
            if type(module) is nn.Embedding and module.max_norm is None:
                found, size = index.embedding, (module.num_embeddings, module.embedding_dim)
            if size is None:
                if isinstance(module, _UNSUPPORTED):
                    index.unsupported[name] = type(module).__name__
                index.others[name] = type(module).__name__
                for parameter, sizes in projections(module).items() if name else ():
                    full = f"{name}.{parameter}"
                    index.parameters[name] = (*index.parameters.get(name, ()), full)
                    if _wanted(full, targets):
                        weight: Tensor = getattr(module, parameter)
                        index.experts[full] = LinearSpec(
                            full, *sizes, *stored(weight, name), experts=len(weight)
                        )
                continue
            if not _wanted(name, targets):
                continue
            stores = stored(getattr(module, "weight", None), name)
            own = name, *size, *stores, (), 1, type(module) in (nn.Linear, nn.Embedding)
            found[name] = LinearSpec(*own, embedding=found is index.embedding)
            if parent is not None and name.rpartition(".")[2] in bypassed(parent):
                index.bypassed[name] = type(parent).__name__
        expected = "at least one Linear, Conv1D or Embedding module matching targets="
        require(index.specs, "AdapterPool", "model", f"{expected}{targets!r}", "none")
        return index


def _input_embedding(model: Any, head: str | None) -> dict[str, Any]:
    """Return the fields ``vocabulary``, ``input_embedding`` and ``tied_head`` of a transformers
    model's index. The last two are omitted if other modules share the weight too, such as the
    embedding of a decoder."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no transformers model, or one without tokens
        return {}
    found = {"vocabulary": getattr(embedding, "num_embeddings", None)}
    weight = getattr(embedding, "weight", None)
    modules = model.named_modules(remove_duplicate=False) if weight is not None else ()
    names = [name for name, module in modules if getattr(module, "weight", None) is weight]
    tied = head if head in names else None
    others = [name for name in names if name != tied]
    if len(others) == 1:
        found |= {"input_embedding": others[0], "tied_head": tied}
    return found


def _wanted(name: str, targets: str | tuple[str, ...] | None) -> bool:
    """Return whether ``targets`` match a module name."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    return targets is None or matches_suffix(name, targets)


def in_routed_experts(name: str) -> bool:
    """Return whether a module belongs to one of many routed experts. The router and
    ``shared_experts``, which process every token, do not."""
    _, experts, below = f".{name}".partition(".experts.")
    return bool(experts) and "router" not in below.split(".")


def check_base(where: str, model: object) -> None:
    """Raise unless ``model`` is a module without adapters. The message contains a remedy."""
    if not isinstance(model, nn.Module):
        found = repr(model) if model is None or isinstance(model, str) else type(model).__name__
        remedy = "load the base model first, e.g. with AutoModelForCausalLM"
        expected = "expected a torch.nn.Module"
        raise TypeError(f"{where}: model: {expected}, found {found:.200}; {remedy}")
    for name, module in model.named_modules():
        if isinstance(module, PoolLayer):
            remedy = "detach the model first"
        elif isinstance(module, LoraLayer):
            remedy = "pass the model before its layers are wrapped, or another copy of it"
        elif any(base.__module__.startswith("peft.") for base in type(module).__mro__):
            remedy = "save its adapters and pass model.unload(), the model without them"
        else:
            continue
        # The qualified name is shown, since layers of from_peft have the same class names as
        # PEFT's.
        found = type(module).__qualname__ + (f" at {name!r}" if name else "")
        expected = "a base model without adapter layers"
        raise ValueError(f"{where}: model: expected {expected}, found {found}; {remedy}")


def _device_of(name: str, weight: Tensor, modules: Mapping[str, nn.Module]) -> torch.device:
    """Return the device on which a module computes.

    accelerate may offload weights to ``meta`` or the CPU. If the module or a module around it has a
    hook of accelerate, the device is the ``execution_device`` of the nearest one. Otherwise, it is
    the device of the weight.
    """
    path = name.split(".") if name else []
    for length in range(len(path), -1, -1):  # the nearest hook first
        hook = getattr(modules[".".join(path[:length])], "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    found = f"{name}'s weight on meta; pass device=, or load the model's weights first"
    require(not weight.is_meta, "AdapterPool", "device", "a device for the pages", found)
    return weight.device


class BaseWeights:
    """Names and shapes of a model's parameters and floating-point buffers.

    The model is referenced weakly. After it is deleted, its weights can no longer be compared.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._shapes = {base_name(name): tuple(t.shape) for name, t in _tensors(model)}

    def __contains__(self, name: str) -> bool:
        """Return whether the model has a weight with this :func:`base_name`."""
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the weights."""
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a weight had when the index was built."""
        return self._shapes[name]

    def check_header(self, tensors: TensorSource, key: str, name: str) -> None:
        """Raise unless the tensor ``key`` has the shape of the model's weight ``name``. The tensor
        is not read."""
        info, shape = tensors.infos[key], self._shapes[name]
        remedy = "resize the model (resize_token_embeddings) before you create the pool"
        expected, found = f"{shape} as in the base model", f"{info.shape}; {remedy}"
        require(info.shape == shape, f"{tensors.where}: {key}", "shape", expected, found)

    def check(self, tensors: TensorSource, key: str, name: str) -> None:
        """Raise unless the tensor ``key``, converted to the dtype of the model's weight ``name``,
        equals this weight."""
        where = f"{tensors.where}: {key}"
        own = self._values(where, name)
        dtype = tensors.infos[key].dtype
        fits = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        fits = fits and own.dtype.is_floating_point
        require(fits, where, "dtype", f"{own.dtype} as in the base model", dtype)
        if own.shape != tensors.infos[key].shape:  # the model was resized after the pool was made
            self._shapes[name] = tuple(own.shape)
            self.check_header(tensors, key, name)
        if not _equal(tensors.read(key), own.detach()):
            raise ValueError(
                f"{where}: expected the values of the base model's weight, found different values; "
                "all adapters share this weight: if all may use yours, copy it to the model first"
            )

    def _values(self, where: str, name: str) -> Tensor:
        model = self._model()
        if model is None:
            expected = "expected the pool's base model to compare this weight with"
            raise ValueError(f"{where}: {expected}, found a deleted model; keep a reference to it")
        for full, tensor in _tensors(model):
            if base_name(full) == name:
                if not tensor.is_meta:
                    return tensor
                offloaded = offloaded_values(model, full)
                if offloaded is not None:
                    return offloaded
        expected = f"expected values of {name} in the base model, to compare this weight with"
        raise ValueError(f"{where}: {expected}, found none (is it on meta?)")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of parameters and floating-point buffers.

    A shared tensor is yielded under each of its names.
    """
    buffers = model.named_buffers(remove_duplicate=False)
    return itertools.chain(
        model.named_parameters(remove_duplicate=False),
        ((name, buffer) for name, buffer in buffers if buffer.is_floating_point()),
    )


def offloaded_values(model: nn.Module, name: str) -> Tensor | None:
    """Return the values of a weight that accelerate has offloaded; None for other weights."""
    owner, _, parameter = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        values = getattr(each, "weights_map", None)
        if values is not None:
            with contextlib.suppress(KeyError):
                return values[parameter]
    return None


def check_header(
    tensors: TensorSource,
    key: str,
    shape: tuple[int | None, ...],
    of: str = "",
    more: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Raise unless a tensor has a supported dtype and the given shape. The tensor is not read.

    In the message, ``of`` is appended to the expected shape, and ``more`` to the found shape. An
    integer ``dtype`` stands for all integer dtypes.
    """
    info, where = tensors.infos[key], f"{tensors.where}: {key}"
    known = "float16, bfloat16, float32 or float64" if dtype is None else "an integer dtype"
    known_dtypes = PAGE_DTYPES if dtype is None else INTEGER_DTYPES
    require(info.dtype in known_dtypes, where, "dtype", known, info.dtype)
    same = len(info.shape) == len(shape) and all(
        size is None or size == found for size, found in zip(shape, info.shape, strict=True)
    )
    require(same, where, "shape", f"{shape}{of}", f"{info.shape}{more}")


def _equal(found: Tensor, own: Tensor) -> bool:
    """Return whether ``found``, rounded to the dtype of ``own``, equals ``own``. The comparison is
    in chunks, to save memory."""
    rows = max(1, _CHUNK // max(1, own[:1].numel())) if own.dim() else 1
    pairs = zip(torch.atleast_1d(found).split(rows), torch.atleast_1d(own).split(rows), strict=True)
    return all(torch.equal(part.to(wanted.device, wanted.dtype), wanted) for part, wanted in pairs)

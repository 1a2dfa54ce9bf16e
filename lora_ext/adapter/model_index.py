"""Which modules of a base model an adapter may touch, and their sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from lora_ext.layers import (
    READS_WEIGHTS,
    LoraLayer,
    bypassed,
    head_names,
    linear_size,
    matches_suffix,
    projections,
)
from lora_ext.rows import PoolLayer

from .base_weights import BaseWeights

PAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# PEFT has LoRA layers for these too; an adapter that targets one is refused by name, not skipped.
_UNSUPPORTED = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)

# A routed expert sees rows in an order of its own, so that no row of it has a known adapter.
ROUTED = "routed experts"


@dataclass(frozen=True)
class LinearSpec:
    """One module that can carry an adapter."""

    name: str
    in_features: int  # of an embedding: how many tokens it knows
    out_features: int
    dtype: torch.dtype
    device: torch.device
    kernel: tuple[int, ...] = ()  # of a convolution, whose factors are kernels
    groups: int = 1
    plain: bool = False  # nn.Linear or nn.Embedding itself: its weight is all that it is
    experts: int = 1  # of a parameter that holds one such matrix for each expert


@dataclass(frozen=True)
class ModelIndex:
    """The part of a model that reading an adapter needs; it does not keep the model alive."""

    linear: dict[str, LinearSpec]
    embedding: dict[str, LinearSpec]
    unsupported: dict[str, str]  # name -> class name
    output_head: str | None  # PEFT's "all-linear" leaves it out
    classifier: str | None  # left out as well when the task is SEQ_CLS and there is no output head
    weights: BaseWeights
    shared: bool = True  # by many adapters: what changes the model itself is refused
    experts: dict[str, LinearSpec] = field(default_factory=dict)  # by the parameter's name
    #: The expert matrices of each experts module, in its order, whether adapters may touch them.
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Modules that nobody calls, as their weights are read, and the class that reads them.
    bypassed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def modules(self) -> dict[str, LinearSpec]:
        """All modules that can carry an adapter."""
        return self.linear | self.embedding

    @cached_property
    def specs(self) -> dict[str, LinearSpec]:
        """All that can carry an adapter: modules, and parameters of experts."""
        return self.modules | self.experts

    @classmethod
    def build(
        cls,
        model: nn.Module,
        targets: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelIndex:
        """Walk ``model.named_modules()``.

        Args:
            model: ``nn.Linear``, its subclasses, transformers' ``Conv1D`` and ``nn.Embedding`` (no
                subclass: it may scale or shift) are found in it.
            targets: a regular expression for whole names, or names and suffixes; None is all.
            dtype: of the pages; default is the base weight's, or torch's default dtype where the
                base weight is stored in another format (quantised).
            device: of the pages; default is where the module computes: its weight's, or the
                execution device of accelerate's hooks.

        Raises:
            TypeError: no module. ValueError: a module that carries adapters, or has none that may;
                a weight on ``meta`` that nobody brings elsewhere.
        """
        if dtype is not None and dtype not in PAGE_DTYPES:
            raise ValueError(f"AdapterPool: dtype: expected one of {PAGE_DTYPES}, found {dtype}")
        _check_model(model)
        names = None if targets is None or isinstance(targets, str) else tuple(targets)

        def wanted(name: str) -> bool:
            if isinstance(targets, str):
                return bool(re.fullmatch(targets, name))
            return names is None or matches_suffix(name, names)

        def stored(weight: Tensor, name: str) -> tuple[torch.dtype, torch.device]:
            own = weight.dtype if weight.dtype in PAGE_DTYPES else torch.get_default_dtype()
            place = torch.device(device) if device else _device_of(name, weight, modules)
            return dtype or own, place

        linear: dict[str, LinearSpec] = {}
        embedding: dict[str, LinearSpec] = {}
        unsupported: dict[str, str] = {}
        experts: dict[str, LinearSpec] = {}
        parameters: dict[str, tuple[str, ...]] = {}
        skipped: dict[str, str] = {}
        modules = dict(model.named_modules())
        for name, module in modules.items():
            parent = modules.get(name.rpartition(".")[0])
            if isinstance(module, nn.Linear) and isinstance(parent, READS_WEIGHTS):
                unsupported[name] = f"{type(module).__name__} of {type(parent).__name__}"
                continue
            if isinstance(module, nn.Linear) and in_routed_experts(name):
                unsupported[name] = f"{type(module).__name__} of {ROUTED}"
                continue
            found, size = linear, linear_size(module)
            if type(module) is nn.Embedding and module.max_norm is None:
                found, size = embedding, (module.num_embeddings, module.embedding_dim)
            if size is None:
                if isinstance(module, _UNSUPPORTED):
                    unsupported[name] = type(module).__name__
                for parameter, sizes in projections(module).items() if name else ():
                    full = f"{name}.{parameter}"
                    parameters[name] = (*parameters.get(name, ()), full)
                    if wanted(full):
                        weight: Tensor = getattr(module, parameter)
                        experts[full] = LinearSpec(
                            full, *sizes, *stored(weight, name), experts=len(weight)
                        )
                continue
            if not wanted(name):
                continue
            weight = cast(Tensor, module.weight)
            plain = type(module) in (nn.Linear, nn.Embedding)
            found[name] = LinearSpec(name, *size, *stored(weight, name), plain=plain)
            if parent is not None and name.rpartition(".")[2] in bypassed(parent):
                skipped[name] = type(parent).__name__
        if not linear and not embedding and not experts:
            raise ValueError(
                "AdapterPool: model: expected at least one Linear, Conv1D or Embedding module "
                f"matching targets={targets!r}, found none"
            )
        return cls(
            linear,
            embedding,
            unsupported,
            *head_names(model),
            BaseWeights(model),
            experts=experts,
            parameters=parameters,
            bypassed=skipped,
        )


def in_routed_experts(name: str) -> bool:
    """Whether the module of this name is one expert of many. Its router is not, nor are experts
    that every token goes through (``shared_experts``)."""
    _, experts, below = f".{name}".partition(".experts.")
    return bool(experts) and "router" not in below.split(".")


def _check_model(model: object) -> None:
    """Refuse what is no model, or carries adapters already; the error says what helps."""
    if not isinstance(model, nn.Module):
        found = repr(model) if model is None or isinstance(model, str) else type(model).__name__
        raise TypeError(
            f"AdapterPool: model: expected a torch.nn.Module, found {found:.200}; load the base "
            "model first, with AutoModelForCausalLM.from_pretrained for one"
        )
    for name, module in model.named_modules():
        if isinstance(module, PoolLayer):
            remedy = "detach the model first"
        elif isinstance(module, LoraLayer):
            remedy = "make the pool before layers are wrapped, or of another copy of the model"
        elif any(base.__module__.startswith("peft.") for base in type(module).__mro__):
            remedy = "save its adapters and pass model.unload(), the model without them"
        else:
            continue
        # The layers of from_peft are called what PEFT's are called.
        found = type(module).__qualname__ + (f" at {name!r}" if name else "")
        raise ValueError(
            "AdapterPool: model: expected a base model without adapter layers, "
            f"found {found}; {remedy}"
        )


def _device_of(name: str, weight: Tensor, modules: dict[str, nn.Module]) -> torch.device:
    """Where the module computes.

    accelerate leaves the weight of an offloaded module on ``meta`` or on the CPU, and brings it to
    the ``execution_device`` of a hook on the module, or on one around it. Elsewhere it is where the
    weight lies.
    """
    path = name.split(".") if name else []
    for length in range(len(path), -1, -1):  # the nearest hook first
        hook = getattr(modules[".".join(path[:length])], "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    if weight.is_meta:
        raise ValueError(
            f"AdapterPool: device: expected a device for the pages, found {name}'s weight on meta; "
            "pass device=, or load the model's weights first"
        )
    return weight.device

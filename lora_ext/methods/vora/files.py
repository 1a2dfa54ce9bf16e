"""State dicts and files of VoRA's trained tensors, with our, the authors' and PEFT's names."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext.adapter import AdapterConfig, Factors, LoraAdapter, alpha_of, base_name, parse_key
from lora_ext.layers import block_index

from ._placement import KEY, applied, apply, language_model, remove
from .config import VoraConfig
from .layers import UnmergeableRouteError, VoraLinear

Model = TypeVar("Model", bound=nn.Module)

# Patterns of names in the authors' checkpoints, and the names that replace them here.
_RELEASED = {
    re.compile(r"^llm\."): "",
    re.compile(r"^vision_embedding\."): "vision.",
    re.compile(r"^aux_vision\.aux_layer_(\d+)\."): r"heads.\1.",
}
_TEACHER = "aux_vision.aux_model."  # the frozen teacher, which the authors also save


class _Loaded(NamedTuple):
    missing_keys: list[str]
    unexpected_keys: list[str]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors: factors, and the embedding and heads of a ``VoraForCausalLM``.

    Args:
        model: model that was passed to :func:`apply`, or the :class:`VoraForCausalLM` around it.

    Returns:
        ``<module>.lora_A.weight`` and ``<module>.lora_B.weight`` by the module's name in the
        language model, ``<module>.bias`` if :func:`load_state_dict` has loaded an extra bias,
        ``vision.*`` and ``heads.*``. All but the extra biases share the memory of the model.

    Raises:
        RuntimeError: If the model has no VoRA layers, or the layers are merged.
    """
    layers = applied("state_dict", model).layers
    found = {key: tensor.detach() for key, tensor in _expected(model, layers).items()}
    for name, layer in layers.items():
        if layer.extra_bias is not None:
            found[f"{name}.bias"] = layer.extra_bias
    return found


def load_state_dict(
    model: nn.Module,
    sd: Mapping[str, Tensor],
    strict: bool = True,
    allow_extra_bias: bool = False,
    load_base: bool = False,
) -> _Loaded:
    """Load tensors from :func:`state_dict` or from a checkpoint of the authors.

    In the authors' checkpoints, names of the language model have the prefix ``llm.``. The
    checkpoints also contain the weights of the language model and of the teacher, and biases for
    layers that have no bias in the language model.

    Args:
        model: as for :func:`state_dict`.
        sd: tensors by name; their values are converted to the dtypes and devices of the model's
            tensors.
        strict: whether to raise for missing or unexpected keys; if False, such keys are ignored
            and returned.
        allow_extra_bias: whether to load biases for layers whose base layer has none. Such an extra
            bias is added to the output of every token that the adapter applies to. Layers that
            already have an extra bias always load it.
        load_base: whether to load the weights of the language model, too.

    Returns:
        The missing and unexpected keys.

    Raises:
        ValueError: If a key is missing, unexpected or present twice; if an extra bias is not
            allowed, or is given for a layer with scale 0; or if a tensor has the wrong shape, a
            dtype that is not floating-point, or no values.
        RuntimeError: As for :func:`state_dict`, or if a layer is merged by
            :meth:`VoraLinear.merge`.

    The model is unchanged after an error.

    Source: the names of the repository Hon-Wong/VoRA.
    """
    where, state = "vora.load_state_dict", applied("load_state_dict", model)
    state.require_apart("load_state_dict")
    layers = state.layers
    wanted = _expected(model, layers)
    language = language_model(model)
    every = (language.named_parameters, language.named_buffers)
    tensors = (pair for named in every for pair in named(remove_duplicate=False))
    base = {base_name(name): tensor for name, tensor in tensors if parse_key(name) is None}
    copies: dict[str, tuple[Tensor, Tensor]] = {}  # by name: source, destination
    biases: dict[str, tuple[VoraLinear, Tensor]] = {}
    has_bias = [f"{name}.bias" for name, layer in layers.items() if layer.has_extra_bias]
    unexpected: list[str] = []
    for key, value in sd.items():
        name = key
        for pattern, ours in _RELEASED.items():
            name = pattern.sub(ours, name)
        owner = layers.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        once = name not in copies and name not in biases
        require(once, where, key, f"one tensor for {name}", "a second tensor")
        if name in wanted:
            copies[name] = _fitting(key, value, wanted[name]), wanted[name]
        elif name in base:
            if load_base:
                copies[name] = _fitting(key, value, base[name]), base[name]
        elif key.startswith(_TEACHER):
            continue
        elif owner is not None and (allow_extra_bias or name in has_bias):
            biases[name] = owner, _fitting(key, value, owner.B.new_empty(owner.out_features))
        else:
            if owner is not None and strict:
                found = "a bias; allow_extra_bias=True loads it, strict=False ignores it"
                raise ValueError(
                    f"{where}: {key}: expected no bias, since the layer has none, found {found}"
                )
            unexpected.append(key)
    for name, (owner, _) in biases.items():
        require(owner.scale != 0, where, name, "no bias if the scale is 0", "a bias")
    missing = [key for key in (*wanted, *has_bias) if key not in copies and key not in biases]
    for keys, expected, found in (
        (missing, "a tensor", "none"),
        (unexpected, "only tensors of the model", "a tensor of another name"),
    ):
        if strict and keys:
            more = f", as for {len(keys) - 1} more keys" if len(keys) > 1 else ""
            found = f"{found}{more} (strict=False ignores such keys)"
            raise ValueError(f"{where}: {keys[0]}: expected {expected}, found {found}")
    with torch.no_grad():
        for value, place in copies.values():
            place.copy_(value)
        for layer, value in biases.values():
            layer.set_extra_bias(value)
    return _Loaded(missing, unexpected)


def _expected(model: nn.Module, layers: Mapping[str, VoraLinear]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        found |= {f"{name}.lora_A.weight": layer.A, f"{name}.lora_B.weight": layer.B}
    if language_model(model) is not model:
        own = model.named_parameters()
        found |= {name: p for name, p in own if name.startswith(("vision.", "heads."))}
    return found


def _fitting(key: str, value: Any, place: Tensor) -> Tensor:
    """Return ``value``; raise ValueError unless it can be copied to ``place`` up to rounding."""
    where = "vora.load_state_dict"
    shape = tuple(place.shape)
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    require(found == shape, where, key, f"a tensor of shape {shape}", found)
    real = place.is_floating_point()
    fits = value.is_floating_point() == real and not value.is_complex()
    require(fits, where, key, "a floating-point dtype" if real else place.dtype, value.dtype)
    found = "a meta tensor" if value.is_meta else value.layout
    require(found == torch.strided, where, key, "a dense tensor", found)
    return value


# -------------------------------------------------------------------------------------------------
# PEFT's files


def to_peft(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters as a LoRA adapter that PEFT can load into the language model.

    ``lora_alpha`` is ``rank * scale``, and ``layers_to_transform`` lists the first ``n_blocks``
    blocks. Extra biases become PEFT's ``lora_bias``. The embedding and the heads are not written;
    use :func:`state_dict` for them.

    Args:
        model: as for :func:`state_dict`.
        folder: folder of the files, created if it does not exist.

    Raises:
        UnmergeableRouteError: If the route is "vision", which PEFT does not support.
        RuntimeError: As for :func:`state_dict`.
        OSError: If the adapter cannot be written.
    """
    state = applied("to_peft", model)
    config = state.config
    _check_route("to_peft", config)
    alpha = alpha_of(float(config.scale), config.rank, rslora=False)
    scale = alpha / config.rank  # PEFT's value, which may differ from config.scale by rounding
    biased = any(layer.has_extra_bias for layer in state.layers.values())
    factors: dict[str, Factors] = {}
    for name, layer in state.layers.items():
        bias = layer.extra_bias
        if biased:  # In PEFT all layers have a scaled bias, or none has one.
            bias = layer.B.new_zeros(layer.out_features) if bias is None else bias / scale
        factors[name] = Factors(layer.A.detach(), layer.B.detach(), scale, bias)
    peft = AdapterConfig(
        where="vora.to_peft",
        r=config.rank,
        lora_alpha=alpha,
        target_modules=config.target_modules,
        layers_to_transform=tuple(range(config.n_blocks)),
        lora_bias=biased,
        fan_in_fan_out=all(layer.fan_in_fan_out for layer in state.layers.values()),
    )
    names = [name for name, _ in language_model(model).named_modules()]
    if peft.targeted(names, ()) != set(factors):  # PEFT would match other modules too.
        ranks, scales = dict.fromkeys(factors, config.rank), dict.fromkeys(factors, scale)
        peft = peft.fitted(ranks, scales, names)
    LoraAdapter(peft, factors).save(folder)


def from_peft(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Load a LoRA adapter in PEFT's format, as written by :func:`to_peft`, into VoRA's layers.

    Args:
        model: model as for :func:`state_dict`, or a language model without VoRA layers. In the
            second case, :func:`apply` adds layers that match the adapter, with the default values
            of all other settings.
        folder: folder of ``adapter_config.json`` and ``adapter_model.safetensors``; the files may
            be from an untrusted source.

    Returns:
        ``model``.

    Raises:
        ValueError: If the folder contains no such adapter, or its modules, ranks or scales do not
            match VoRA or the model.
        UnmergeableRouteError: If the model has route "vision".
        RuntimeError: If the adapters of the model are merged.

    The model is unchanged after an error.
    """
    adapter = LoraAdapter.load(folder)
    language = language_model(model)
    new = KEY not in language.__dict__
    if new:
        indices = [i for name in adapter.modules if (i := block_index(name)) is not None]
        found = list(adapter.modules)[:4]
        require(indices, "vora.from_peft", "folder", "modules in numbered blocks", found)
        names = dict.fromkeys(name.rpartition(".")[2] for name in adapter.modules)
        first = next(iter(adapter.modules.values()))
        config = VoraConfig(
            n_blocks=max(indices) + 1,
            rank=first.a.shape[0],
            scale=float(first.scaling),
            target_modules=tuple(names),
        )
        apply(language, config)
    try:
        state = applied("from_peft", model)
        _check_route("from_peft", state.config)
        state.require_apart("from_peft")
        where = "vora.from_peft"
        kinds = state.config.target_modules
        expected = f"modules in the first {state.config.n_blocks} blocks that match {kinds}"
        for name in adapter.modules:
            require(name in state.layers, where, name, expected, "another module")
        for name, layer in state.layers.items():
            require(name in adapter.modules, where, name, "factors in the folder", "none")
            factors = adapter.modules[name]
            at = f"{where}: {name}"
            require(factors.sums, where, name, "plain LoRA", adapter.config.kind.rescales)
            for factor, given, own in (("A", factors.a, layer.A), ("B", factors.b, layer.B)):
                found, shape = tuple(given.shape), tuple(own.shape)
                require(found == shape, at, f"lora_{factor}", f"shape {shape}", found)
            fits = math.isclose(factors.scaling, layer.scale, rel_tol=1e-12)
            require(fits, at, "scale", layer.scale, factors.scaling)
    except BaseException:
        if new:
            remove(language)
        raise
    with torch.no_grad():
        for name, layer in state.layers.items():
            factors = adapter.modules[name]
            layer.A.copy_(factors.a)
            layer.B.copy_(factors.b)
            bias = factors.bias  # PEFT writes zeros for a layer without a bias.
            if bias is not None:
                bias = bias * factors.scaling if bool(bias.any()) and layer.scale != 0 else None
            layer.set_extra_bias(bias)
    return model


def _check_route(where: str, config: VoraConfig) -> None:
    fits = config.route != "vision"
    found = "'vision'; PEFT's layers adapt every token"
    require(fits, f"vora.{where}", "route", "'all'", found, UnmergeableRouteError)

"""What is trained, as tensors under names: our own, the authors', PEFT's."""

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

# Names in the authors' checkpoints, and ours.
_RELEASED = {
    re.compile(r"^llm\."): "",
    re.compile(r"^vision_embedding\."): "vision.",
    re.compile(r"^aux_vision\.aux_layer_(\d+)\."): r"heads.\1.",
}
_TEACHER = "aux_vision.aux_model."  # which they save as well, though it is frozen


class _Loaded(NamedTuple):
    """The keys that ``load_state_dict(strict=False)`` let pass."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What is trained: the factors, and of a :class:`VoraForCausalLM` the embedding and the heads.

    Args:
        model: what was given to :func:`apply`, or the :class:`VoraForCausalLM` around it.

    Returns:
        ``<module>.lora_A.weight``, ``<module>.lora_B.weight`` by the module's name in the language
        model, ``<module>.bias`` where :func:`load_state_dict` honoured an extra one, ``vision.*``
        and ``heads.*``. They share the memory of the model.

    Raises:
        RuntimeError: a model without VoRA's layers, or where they are merged.
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
    """Read what :func:`state_dict` gave, or a checkpoint of the authors'.

    Theirs has the prefix ``llm.``, the weights of the language model beside the factors, those of
    the teacher, and biases on layers that have none in the language model.

    Args:
        model: as for :func:`state_dict`.
        sd: the tensors; they are copied, in the dtype and to the device of the model's.
        strict: False lets missing and unexpected keys pass, and returns them.
        allow_extra_bias: give layers a bias whose base layer has none, where ``sd`` has one. It is
            added to every token that the adapter serves. A layer that has one already takes it.
        load_base: load the weights of the language model too. They are ignored otherwise.

    Returns:
        The keys that were let pass.

    Raises:
        ValueError: a key that is missing, unexpected or there twice, an extra bias that is not
            allowed or that a scale of 0 would lose, a tensor of another shape, of no floating
            numbers or without values, naming the key. RuntimeError: as :func:`state_dict`, or
            layers that are merged by hand. The model is then as it was.

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
    copies: dict[str, tuple[Tensor, Tensor]] = {}  # from, to
    biases: dict[str, tuple[VoraLinear, Tensor]] = {}
    has_bias = [f"{name}.bias" for name, layer in layers.items() if layer.has_extra_bias]
    unexpected: list[str] = []
    for key, value in sd.items():
        name = key
        for pattern, ours in _RELEASED.items():
            name = pattern.sub(ours, name)
        owner = layers.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        once = name not in copies and name not in biases
        require(once, where, key, f"one tensor for {name}", "a second")
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
                found = "one; allow_extra_bias=True honours it, strict=False leaves it out"
                raise ValueError(
                    f"{where}: {key}: expected no bias, as the layer has none, found {found}"
                )
            unexpected.append(key)
    for name, (owner, _) in biases.items():
        require(owner.scale != 0, where, name, "no bias where the scale is 0", "one")
    missing = [key for key in (*wanted, *has_bias) if key not in copies and key not in biases]
    for keys, expected, found in (
        (missing, "a tensor", "none"),
        (unexpected, "only tensors that the model has a place for", "this one"),
    ):
        if strict and keys:
            more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
            found = f"{found}{more} (strict=False lets that pass)"
            raise ValueError(f"{where}: {keys[0]}: expected {expected}, found {found}")
    with torch.no_grad():
        for value, place in copies.values():
            place.copy_(value)
        for layer, value in biases.values():
            layer.set_extra_bias(value)
    return _Loaded(missing, unexpected)


def _expected(model: nn.Module, layers: Mapping[str, VoraLinear]) -> dict[str, Tensor]:
    """The parameters that are trained, by our names."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        found |= {f"{name}.lora_A.weight": layer.A, f"{name}.lora_B.weight": layer.B}
    if language_model(model) is not model:
        own = model.named_parameters()
        found |= {name: p for name, p in own if name.startswith(("vision.", "heads."))}
    return found


def _fitting(key: str, value: Any, place: Tensor) -> Tensor:
    """``value``, if it can be copied to ``place`` and be what it was, but for rounding."""
    where = "vora.load_state_dict"
    shape = tuple(place.shape)
    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    require(found == shape, where, key, f"a tensor of shape {shape}", found)
    real = place.is_floating_point()
    fits = value.is_floating_point() == real and not value.is_complex()
    require(fits, where, key, "floating numbers" if real else place.dtype, value.dtype)
    found = "one without values" if value.is_meta else value.layout
    require(found == torch.strided, where, key, "a dense tensor", found)
    return value


# -------------------------------------------------------------------------------------------------
# PEFT's files


def to_peft(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters as a LoRA adapter that PEFT loads onto the language model.

    ``lora_alpha`` is ``rank * scale``, ``layers_to_transform`` the first ``n_blocks`` blocks. Extra
    biases become PEFT's ``lora_bias``. Embedding and heads are not PEFT's: :func:`state_dict`.

    Args:
        model: as for :func:`state_dict`. folder: made if it is not there.

    Raises:
        UnmergeableRouteError: route "vision", which PEFT's layers do not have. RuntimeError: as
            :func:`state_dict`. OSError: it cannot be written.
    """
    state = applied("to_peft", model)
    config = state.config
    _check_route("to_peft", config)
    alpha = alpha_of(float(config.scale), config.rank, rslora=False)
    scale = alpha / config.rank  # as PEFT computes it: no alpha gives 0.1 at rank 3 to the last bit
    biased = any(layer.has_extra_bias for layer in state.layers.values())
    factors: dict[str, Factors] = {}
    for name, layer in state.layers.items():
        bias = layer.extra_bias
        if biased:  # PEFT has one everywhere or nowhere, and scales it
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
    if peft.targeted(names, ()) != set(factors):  # by the ends of names PEFT would find others
        ranks, scales = dict.fromkeys(factors, config.rank), dict.fromkeys(factors, scale)
        peft = peft.fitted(ranks, scales, names)
    LoraAdapter(peft, factors).save(folder)


def from_peft(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Read a LoRA adapter of PEFT's, as :func:`to_peft` writes it, into VoRA's layers.

    Args:
        model: as for :func:`state_dict`; or a language model without such layers, which gets them
            as the adapter has them (other fields of its configuration are defaults).
        folder: of ``adapter_config.json`` and ``adapter_model.safetensors``; not trusted.

    Returns:
        ``model``.

    Raises:
        ValueError: no such adapter; modules, ranks or scales that are not VoRA's, or not those of
            the model, naming them. UnmergeableRouteError: a model of route "vision".
            RuntimeError: merged already. The model is then as it was.
    """
    adapter = LoraAdapter.load(folder)
    language = language_model(model)
    new = KEY not in language.__dict__
    if new:
        indices = [i for name in adapter.modules if (i := block_index(name)) is not None]
        found = list(adapter.modules)[:4]
        require(indices, "vora.from_peft", "folder", "an adapter of modules in blocks", found)
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
            require(name in state.layers, where, name, expected, "another")
        for name, layer in state.layers.items():
            require(name in adapter.modules, where, name, "factors", "none in the folder")
            factors = adapter.modules[name]
            at = f"{where}: {name}"
            plain = factors.magnitude is None
            require(plain, where, name, "plain LoRA", "the magnitude of DoRA")
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
            bias = factors.bias  # PEFT has zeros where one layer has a bias and this one none
            if bias is not None:
                bias = bias * factors.scaling if bool(bias.any()) and layer.scale != 0 else None
            layer.set_extra_bias(bias)
    return model


def _check_route(where: str, config: VoraConfig) -> None:
    fits = config.route != "vision"
    found = "'vision': PEFT's layers serve every token"
    require(fits, f"vora.{where}", "route", "'all'", found, UnmergeableRouteError)

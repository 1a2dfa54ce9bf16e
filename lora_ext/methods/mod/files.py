"""Functions that save, load and count the parameters of MoD (mixture-of-depths ensembles).

A folder contains ``mod_config.json`` and ``mod.safetensors``. Its content is not trusted: names,
shapes and dtypes are compared with the configuration before memory is allocated.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._files import SafetensorsFile, TensorInfo, read_config, save_parts
from lora_ext.layers import adapted_layers, adapter_parameters, adapters_of

from ._model import NAME, applied, apply, remove
from .config import ModConfig

Model = TypeVar("Model", bound=nn.Module)

CONFIG, TENSORS = f"{NAME}_config.json", f"{NAME}.safetensors"
_MAX_CONFIG_BYTES = 1 << 20


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of MoD in a model by name, as tensors that share the model's memory.

    Returns:
        ``mod.norms.<e>.*`` for layer e of the ensemble, ``mod.router``, ``mod.bias`` and, if the
        model's own final norm is trained, ``mod.final_norm.*``.

    Raises:
        RuntimeError: If the model has no MoD.
    """
    return {name: p.detach() for name, p in _mod_parameters(model, "state_dict").items()}


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a :func:`state_dict` into a model that has MoD with the same settings.

    Args:
        model: model to which :func:`apply` has added MoD.
        state: every parameter of MoD by name, and nothing else. Values are converted to the dtypes
            and devices of the parameters.

    Raises:
        RuntimeError: If the model has no MoD.
        ValueError: If a key is missing or unexpected, or a tensor has the wrong shape or a dtype
            that is not floating-point. The message names the key, and the model is unchanged.
    """
    own = _mod_parameters(model, "load_state_dict")
    _compare("load_state_dict: state", own, state)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the parameters and the configuration of MoD into a folder, for :func:`load`.

    Raises:
        RuntimeError: If the model has no MoD.
        OSError: If a file cannot be written; in this case no file is changed.
    """
    _, ensemble = applied(model, "save")
    save_parts(folder, NAME, ensemble.config, state_dict(model))


def load(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Apply MoD to a model, with the configuration and the parameters that :func:`save` wrote for a
    model of the same shape.

    Returns:
        ``model``.

    Raises:
        RuntimeError: As for :func:`apply`.
        TypeError: As for :func:`apply`.
        NotImplementedError: As for :func:`apply`.
        ValueError: If the folder does not contain MoD for this model, or as for :func:`apply`. The
            message names the file and the key.

    The model is unchanged after an error.
    """
    folder = Path(folder)
    config, _ = read_config(folder / CONFIG, ModConfig, _MAX_CONFIG_BYTES)
    with contextlib.closing(SafetensorsFile(folder / TENSORS)) as file:
        apply(model, config)
        try:
            own = _mod_parameters(model, "load")
            _compare(file.where, own, file.infos)
            load_state_dict(model, {name: file.read(name) for name in own})
        except BaseException:
            remove(model)
            raise
    return model


def _mod_parameters(model: nn.Module, where: str) -> dict[str, nn.Parameter]:
    """Return the parameters of MoD in a model by name, not detached. Error messages start with
    ``where``."""
    _, ensemble = applied(model, where)
    mixer, config = ensemble.mixer, ensemble.config
    found = {f"{NAME}.{name}": p for name, p in mixer.named_parameters()}
    if config.share_final_norm and config.train_final_norm:
        own = mixer.final_norm.named_parameters()
        found |= {f"{NAME}.final_norm.{name}": p for name, p in own}
    return found


def _compare(
    where: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor] | Mapping[str, TensorInfo]
) -> None:
    for name in sorted(own.keys() | found.keys()):
        wanted = tuple(own[name].shape) if name in own else "no such key"
        shape = tuple(found[name].shape) if name in found else "none"
        require(wanted == shape, where, f"{name:.200}", wanted, shape)
        dtype = found[name].dtype
        fits = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        require(fits, where, f"{name:.200}", "a floating-point dtype", f"{dtype!s:.80}")


def trainable_report(model: nn.Module) -> dict[str, Any]:
    """Count the trained parameters of a model with MoD.

    Returns:
        Dictionary with the numbers of trained parameters of adapters (``lora``), of the mixture
        with its final norm (``mod``), of the output layer with tied embeddings (``head``), and of
        the rest of the model (``other``); their sum ``total``; the number of all parameters of the
        model (``all``); and ``ratio``, total / all.

    Raises:
        RuntimeError: If the model has no MoD.
    """
    lm, _ = applied(model, "trainable_report")
    trained = {p: p.numel() for p in model.parameters() if p.requires_grad}
    layers = adapted_layers(model).values()
    adapters = [adapter_parameters(m, name) for m in layers for name in adapters_of(m)]
    groups = {
        "lora": itertools.chain(*adapters),
        "mod": _mod_parameters(model, "trainable_report").values(),
        "head": lm.get_output_embeddings().parameters(),
    }
    counts = {name: sum(trained.pop(p, 0) for p in found) for name, found in groups.items()}
    counts["other"] = sum(trained.values())
    total, everything = sum(counts.values()), sum(p.numel() for p in model.parameters())
    return {**counts, "total": total, "all": everything, "ratio": total / everything}

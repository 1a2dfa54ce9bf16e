"""The base model's own weights, for adapter files that hold some of them.

Beside an adapted or resized embedding or output head, PEFT saves that module's weight. All adapters
of a pool share one base model. So such a weight is right where it is the model's own; where it is
not, the adapter was trained with another head than the one it would be served with.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._files import TensorInfo

from .peft_keys import base_name
from .tensor_files import TensorSource

_CHUNK = 1 << 24  # elements that are compared at once


class BaseWeights:
    """Names and shapes of a model's parameters and floating buffers, and a weak reference to it.

    Args:
        model: may die; its weights can then no longer be compared.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._shapes = {base_name(name): tuple(t.shape) for name, t in _tensors(model)}

    def __contains__(self, name: str) -> bool:
        """Whether the model has a weight of that :func:`base_name`."""
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the model's weight of that name, when the index was made."""
        return self._shapes[name]

    def check_header(self, tensors: TensorSource, key: str, name: str) -> None:
        """Refuse a weight that has not the size of the model's, before it is read.

        Raises:
            ValueError: naming file, key, expected and found.
        """
        info, shape = tensors.infos[key], self._shapes[name]
        if info.shape != shape:
            raise ValueError(
                f"{tensors.where}: {key}: shape: expected {shape} as in the base model, found "
                f"{info.shape}; give the base model this weight (resize_token_embeddings, then "
                "copy it) before the pool is made"
            )

    def check(self, tensors: TensorSource, key: str, name: str) -> None:
        """Refuse a weight that would change a bit of the model if it were loaded into it.

        Args:
            tensors: where the weight is. key: its name there.
            name: its :func:`base_name`, which the model has.

        Raises:
            ValueError: naming file, key, expected and found.
        """
        where = f"{tensors.where}: {key}"
        own = self._values(where, name)
        _check_dtype(where, tensors.infos[key], own.dtype)
        if own.shape != tensors.infos[key].shape:  # the model was changed after the pool was made
            self._shapes[name] = tuple(own.shape)
            self.check_header(tensors, key, name)
        if not _equal(tensors.read(key), own.detach()):
            raise ValueError(
                f"{where}: expected the base model's own values, found others: the adapter was "
                "trained beside this weight, and all adapters share the base model; copy it into "
                "the model first if it is to be everybody's"
            )

    def _values(self, where: str, name: str) -> Tensor:
        model = self._model()
        if model is None:
            raise ValueError(
                f"{where}: expected the model that the pool was made for, to compare this weight "
                "with its own; the model is gone: keep it, or make a pool for the one that is used"
            )
        for full, tensor in _tensors(model):
            if base_name(full) == name:
                if not tensor.is_meta:
                    return tensor
                offloaded = offloaded_values(model, full)
                if offloaded is not None:
                    return offloaded
        raise ValueError(
            f"{where}: expected {name} of the base model to compare this weight with; "
            "it has no values there (it is on meta, or was taken away)"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Also those that share memory: a tied head has a name of its own."""
    buffers = model.named_buffers(remove_duplicate=False)
    return itertools.chain(
        model.named_parameters(remove_duplicate=False),
        ((name, buffer) for name, buffer in buffers if buffer.is_floating_point()),
    )


def offloaded_values(model: nn.Module, name: str) -> Tensor | None:
    """The values that accelerate keeps elsewhere while a module does not run."""
    owner, _, parameter = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        values = getattr(each, "weights_map", None)
        if values is not None:
            with contextlib.suppress(KeyError):
                return values[parameter]
    return None


def _check_dtype(where: str, info: TensorInfo, expected: torch.dtype) -> None:
    floating = isinstance(info.dtype, torch.dtype) and info.dtype.is_floating_point
    fits = floating and expected.is_floating_point
    require(fits, where, "dtype", f"{expected} as in the base model", info.dtype)


def _equal(found: Tensor, own: Tensor) -> bool:
    """Whether ``found``, rounded to the dtype of ``own``, has its values; a few rows at a time."""
    rows = max(1, _CHUNK // max(1, own[:1].numel())) if own.dim() else 1
    pairs = zip(torch.atleast_1d(found).split(rows), torch.atleast_1d(own).split(rows), strict=True)
    return all(torch.equal(part.to(wanted.device, wanted.dtype), wanted) for part, wanted in pairs)

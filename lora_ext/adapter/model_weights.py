"""Weights of a whole model by module name, each read only on request.

Two models can therefore be compared layer by layer with only two weights in memory. Files are
untrusted: the shapes and dtypes of all shards (the files of a model) are read before any weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._files import MAX_HEADER_BYTES, SafetensorsFile, TensorInfo, read_json
from lora_ext.layers import is_adapted

from ._model_index import PAGE_DTYPES, offloaded_values
from ._peft_tensors import PREFIX, StateDict, TensorSource, base_name, directory_names

#: A folder of safetensors shards or one such file, weights by name, or a live model.
ModelSource = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Prefixes that module names have if a model was saved with another class, or wrapped.
_PREFIXES = (
    PREFIX,
    "module.",
    "model.",
    "transformer.",
    "language_model.",
    "gpt_neox.",
    "backbone.",
)
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# Names of the packed weight in files of quantised models, instead of "weight".
_PACKED = ("qweight", "weight_packed")
_REMEDY = "dequantise the model first (transformers: model.dequantize())"


class ModelWeights:
    """Reader of weights by module name. Close it, or use it in a ``with`` block.

    Weights are matched by name, never by order. ``model.layers.0.mlp.up_proj`` matches the module
    with exactly this name or, without such a module, the one whose name differs only in parts that
    model classes, PEFT, ``torch.compile`` and the wrappers of ``torch.distributed`` add
    (``base_model.model.``, ``model.``, ``module.``, ``_orig_mod.``, ``.base_layer`` ...).

    Args:
        source: path of a folder of safetensors files, with or without
            ``model.safetensors.index.json``; path of one safetensors file; mapping of tensors with
            names ``<module>.weight``; or model, with or without layers of PEFT or of this package.
        where: prefix of error messages, which names the caller and its argument.

    Raises:
        TypeError: If ``source`` has the wrong type.
        ValueError: If the folder does not exist or has no safetensors files, or if a file or the
            index is damaged.
    """

    def __init__(self, source: ModelSource, where: str):
        self.where = where
        self._tensors = _open(source, where)
        self._by_plain_name: dict[str, list[str]] = {}
        for key in self._tensors.infos:
            if key.endswith(".weight"):
                name = _plain(key.removesuffix(".weight"))
                self._by_plain_name.setdefault(name, []).append(key)

    def __enter__(self) -> ModelWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, if there are any."""
        self._tensors.close()

    def keys(self, modules: Iterable[str]) -> dict[str, str]:
        """Return the key of each module's weight, for :meth:`shape` and :meth:`read`.

        Raises:
            KeyError: If a module has no weight. The message lists up to five such modules.
            ValueError: If two weights match one module.
            TypeError: If a weight is quantised.
        """
        found: dict[str, str] = {}
        missing: list[str] = []
        for module in modules:
            exact = f"{module}.weight"
            if exact in self._tensors.infos:
                found[module] = exact
                continue
            keys = self._by_plain_name.get(_plain(module), [])
            expected = "a single weight with this name"
            require(len(keys) <= 1, self.where, module, expected, ", ".join(keys[:4]))
            if keys:
                found[module] = keys[0]
            else:
                missing.append(module)
        if missing:
            self._refuse_packed(missing)
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            folder = "" if self._tensors.where == self.where else f" in {self._tensors.where}"
            names, expected = f"{', '.join(missing[:5])}{more}", "a weight for each adapted module"
            raise KeyError(f"{self.where}: expected {expected}, found none{folder} for {names}")
        expected = "a weight in float16, bfloat16, float32 or float64"
        for key in found.values():
            dtype = self._tensors.infos[key].dtype
            known = dtype in PAGE_DTYPES
            require(known, self.where, key, expected, f"{dtype}; {_REMEDY}", TypeError)
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a weight without reading it; ``key`` is a value from :meth:`keys`."""
        return self._tensors.infos[key].shape

    def is_transposed(self, key: str) -> bool:
        """Return whether a weight is stored as ``(I, O)``, inputs first, as in transformers'
        ``Conv1D``. For files and mappings, which do not contain this information, return False."""
        return key in getattr(self._tensors, "transposed", ())

    def read(self, key: str) -> Tensor:
        """Return a weight, detached from its autograd graph; ``key`` is a value from :meth:`keys`.

        A weight from a model or mapping shares its memory. A weight from a file is a new tensor on
        the CPU.
        """
        return self._tensors.read(key)

    def _refuse_packed(self, modules: Iterable[str]) -> None:
        """Raise if one of these modules, which have no ``weight``, has a quantised weight under
        another name."""
        packed = {
            _plain(key.removesuffix(f".{end}")): key
            for key in self._tensors.infos
            for end in _PACKED
            if key.endswith(f".{end}")
        }
        for module in modules:
            key = packed.get(_plain(module))
            found = f"{key} of a quantised model; {_REMEDY}"
            require(key is None, self.where, module, "a floating-point weight", found, TypeError)


def _plain(name: str) -> str:
    """Return a module name without the parts that wrappers and model classes add."""
    name = base_name(f"{name}.").removesuffix(".")  # the dot lets a final ".base_layer" match
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    before = None
    while name != before:
        before = name
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
    return name


def _open(source: Any, where: str) -> TensorSource:
    if isinstance(source, nn.Module):
        return _Live(source, where)
    if isinstance(source, Mapping):
        return StateDict(source, where)
    if isinstance(source, str | os.PathLike):
        return _Shards(Path(source))
    expected = "expected a folder of safetensors, weights by name or a model"
    raise TypeError(f"{where}: {expected}, found {type(source).__name__}")


class _Live:
    """The weights of a model in memory, including those that accelerate offloads."""

    def __init__(self, model: nn.Module, where: str):
        self.where = where
        self._model = model
        self.infos: dict[str, TensorInfo] = {}
        self.transposed: set[str] = set()
        for name, module in model.named_modules(remove_duplicate=False):
            if is_adapted(module):  # the loop visits its base layer separately
                continue
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor):
                dtype = "a quantised dtype" if weight.is_quantized else weight.dtype
                self.infos[f"{name}.weight"] = TensorInfo(tuple(weight.shape), dtype)
                if isinstance(getattr(module, "nf", None), int):  # Conv1D
                    self.transposed.add(f"{name}.weight")
            elif callable(weight) or any(hasattr(module, packed) for packed in _PACKED):
                self.infos[f"{name}.weight"] = TensorInfo((), type(module).__name__)

    def read(self, key: str) -> Tensor:
        name = key.removesuffix(".weight")
        module: Any = self._model.get_submodule(name)
        if name.endswith(".base_layer"):
            layer = self._model.get_submodule(name.removesuffix(".base_layer"))
            merged = list(getattr(layer, "merged_adapters", ()))
            found = f"{merged} merged into it; unmerge them first"
            require(not merged, self.where, name, "a weight without adapters", found)
        weight: Tensor = module.weight
        values = offloaded_values(self._model, key) if weight.is_meta else weight
        if values is None:
            found = "found a weight on meta; load the model's weights first"
            raise ValueError(f"{self.where}: {key}: expected values, {found}")
        return values.detach()

    def close(self) -> None:
        pass


class _Shards:
    """Safetensors files of one model. Headers are read at the start, tensors only on request."""

    def __init__(self, path: Path):
        self.where = str(path)
        files, placed = _listed(path)
        self._files: list[SafetensorsFile] = []
        self._owner: dict[str, SafetensorsFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        try:
            for file in files:
                self._add(file, placed)
            for key, name in (placed or {}).items():
                if key not in self.infos:
                    expected = f"expected {key!r:.200} in {name}, as in the index"
                    raise ValueError(f"{path / _INDEX}: {expected}, found no such tensor")
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, placed: Mapping[str, str] | None) -> None:
        shard = SafetensorsFile(path)
        self._files.append(shard)
        for key, info in shard.infos.items():
            if placed is not None and placed.get(key) != path.name:
                continue
            if key in self.infos:
                found = f"found it in {Path(self._owner[key].where).name} and {path.name}"
                raise ValueError(f"{self.where}: {key:.200}: expected it in one file, {found}")
            self.infos[key], self._owner[key] = info, shard

    def read(self, key: str) -> Tensor:
        return self._owner[key].read(key)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _listed(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files of a model and, if there is an index, the file of each tensor.

    As in transformers, ``model.safetensors`` is used if it exists, else the files in the index. Our
    choice: without both, all safetensors files of the folder are used.
    """
    expected = "expected a folder of safetensors files"
    try:
        names = directory_names(path, expected)
    except NotADirectoryError:
        return [path], None
    if _SINGLE in names:
        return [path / _SINGLE], None
    if _INDEX in names:
        placed = _read_index(path / _INDEX)
        return [path / name for name in sorted(set(placed.values()))], placed
    shards = sorted(
        name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")
    )
    if shards:
        return [path / name for name in shards], None
    found = "none"
    if any(name.startswith("adapter_model.") for name in names):
        found = "an adapter; pass the folder of the model that it was trained on"
    elif any(name.endswith(".bin") for name in names):
        found = "a .bin file; save the model with save_pretrained, which writes safetensors"
    raise ValueError(f"{path}: {expected}, found {found}")


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor according to an index; raise unless all files are in the
    folder of the index."""
    raw = read_json(path, MAX_HEADER_BYTES)
    placed = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{path}: weight_map: expected a dict of filenames, found {placed!r:.100}")
    for key, name in placed.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and "\0" not in name
        fits = plain and Path(name).name == name and "\\" not in name
        expected = "the name of a safetensors file in the same folder"
        require(fits, f"{path}: weight_map", f"{key:.200}", expected, f"{name!r:.200}")
    return placed

"""PEFT's tensors: what their names say, and their values out of a safetensors file, a ``.bin`` file
or a state dict, none of them trusted: shapes and dtypes are known before any tensor is read."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext._files import SafetensorsFile, TensorInfo, open_regular

PREFIX = "base_model.model."
MAGNITUDE = "magnitude_vector"

# Files carry no adapter name; the state dict of a live PEFT model does (`lora_A.default.weight`).
# The magnitude of DoRA is a bare parameter in files and in older models, a module in newer ones;
# the factors of an embedding are bare everywhere.
_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?:"
    r"(?P<factor>[AB])(?:\.(?P<owner>[^.]+))?\.(?P<kind>weight|bias)"
    r"|(?P<bare>embedding_[AB])(?:\.(?P<owner_of_bare>[^.]+))?"
    r"|(?P<magnitude>magnitude_vector)(?:\.(?!weight$)(?P<owner_of_magnitude>[^.]+))?(?:\.weight)?)",
    re.DOTALL,
)

# The published code has bare parameters, in a module of their own beside the base layer.
_PUBLISHED = re.compile(r"(?P<module>.+?)(?:\.lora_layer)?\.lora_(?P<factor>[AB])", re.DOTALL)
_FACTORS = {"A.weight": "A", "embedding_A": "A", "B.weight": "B", "embedding_B": "B"}
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")


class Key(NamedTuple):
    """What the name of a tensor says."""

    module: str  # in the base model
    role: str  # A.weight, B.weight, B.bias, embedding_A, embedding_B or magnitude_vector
    adapter: str | None  # None in files

    @property
    def in_file(self) -> str:
        """The name that PEFT writes."""
        return f"{PREFIX}{self.module}.lora_{self.role}"


def parse_key(name: str) -> Key | None:
    """Read the name of a LoRA tensor, in a file or in a model; None: it names something else."""
    match = _KEY.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        return None
    role = match["magnitude"] or match["bare"] or f"{match['factor']}.{match['kind']}"
    owner = match["owner"] or match["owner_of_bare"] or match["owner_of_magnitude"]
    return Key(match["module"], role, owner)


def wrapped_names(parameters: Mapping[str, Sequence[str]], targeted: Set[str]) -> dict[str, str]:
    """Expert parameters, given by their modules, by the name under which PEFT keeps their factors.

    A module with two adapted parameters is wrapped twice, in the order in which it has them: the
    last one's factors are found under the module's own name, those before it one ``base_layer``
    deeper each.
    """
    return {
        module + ".base_layer" * depth: name
        for module, names in parameters.items()
        for depth, name in enumerate(n for n in reversed(names) if n in targeted)
    }


def base_name(name: str) -> str:
    """The name that a weight has in the base model, whether or not PEFT has wrapped its module."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def natural_order(name: str) -> list[str | int]:
    """Sorts names of modules as they follow one another: layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def roles_of(embedding: bool) -> dict[str, str]:
    """The roles of A (r, I), B (O, r), the bias and DoRA's magnitude, by the names of the fields of
    :class:`lora_ext.adapter.Factors`."""
    a, b = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
    return {"a": a, "b": b, "bias": "B.bias", "magnitude": MAGNITUDE}


def factor_keys(
    where: str, keys: Iterable[str], adapter_name: str | None = None
) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B of each module, if ``adapter_name`` is given without those of
    other adapters; raise a KeyError for a factor without the other."""
    halves: dict[str, dict[str, str]] = {}
    for key in keys:
        read = _read_key(key)
        if read is not None:
            module, factor, adapter = read
            if adapter_name is None or adapter in (None, adapter_name):
                halves.setdefault(module, {})[factor] = key
    for module, half in halves.items():
        if len(half) < 2:
            ((factor, key),) = half.items()
            found = f"{key} without its lora_{'B' if factor == 'A' else 'A'}"
            raise KeyError(f"{where}: {module}: expected lora_A and lora_B, found {found}")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _read_key(key: str) -> tuple[str, str, str | None] | None:
    """Module, factor (A or B) and adapter that a name says; None: it names something else."""
    parsed = parse_key(key)
    if parsed is not None:
        factor = _FACTORS.get(parsed.role)
        return None if factor is None else (parsed.module, factor, parsed.adapter)
    match = _PUBLISHED.fullmatch(key.removeprefix(PREFIX))
    return None if match is None else (match["module"], match["factor"], None)


class TensorSource(Protocol):
    """Keys with shapes, and the tensors one at a time."""

    where: str
    infos: dict[str, TensorInfo]

    def read(self, key: str) -> Tensor:
        """The tensor, on the CPU or wherever the state dict has it."""
        ...

    def close(self) -> None:
        """Close the file, if there is one."""
        ...


def adapter_directory(source: str | os.PathLike[str]) -> Path:
    """Return ``source`` as a path; raise unless it is a directory with an adapter."""
    expected = "expected a directory with adapter_config.json"
    if not isinstance(source, str | os.PathLike):
        found = type(source).__name__
        raise TypeError(f"adapter: {expected}, or (config, state dict), found {found}")
    path = Path(source)
    try:
        names = directory_names(path, expected)
    except NotADirectoryError:
        raise ValueError(f"{path}: {expected}, found a file; name its directory") from None
    if "adapter_config.json" not in names:
        inner = sorted(n for n in names if os.path.lexists(path / n / "adapter_config.json"))
        found = f"one with adapters in {', '.join(inner[:4])}" if inner else "one without"
        raise ValueError(f"{path}: {expected}, found {found}")
    return path


def directory_names(path: Path, expected: str) -> set[str]:
    """Return the names in a directory.

    Raises:
        ValueError: it cannot be opened, or looks like a name on the Hub; ``expected`` is part of
            the message. NotADirectoryError: it is a file.
    """
    try:
        return set(os.listdir(path))
    except NotADirectoryError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        found = getattr(error, "strerror", None) or error
        if _HUB_NAME.fullmatch(str(path)):
            remedy = f"huggingface_hub.snapshot_download({str(path)!r}) returns a directory"
            found = f"{found}; nothing is downloaded here: {remedy}"
        raise ValueError(f"{path}: cannot be opened: {expected}, found {found}") from None


def open_tensors(directory: Path) -> TensorSource:
    """``adapter_model.safetensors`` if it is there, else ``adapter_model.bin``."""
    path = directory / "adapter_model.safetensors"
    if os.path.lexists(path):
        return SafetensorsFile(path)
    pickled = directory / "adapter_model.bin"
    if os.path.lexists(pickled):
        return _read_bin(pickled)
    raise ValueError(f"{directory}: expected adapter_model.safetensors or .bin, found neither")


class StateDict:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Any], where: str):
        self.where = where
        self._tensors = tensors
        self.infos = {}
        for key, value in tensors.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                found = f"{key!r:.100}: {type(value).__name__}"
                raise ValueError(f"{where}: expected names with tensors, found {found}")
            dense = value.layout == torch.strided and not value.is_meta
            found = "one on meta, without values" if value.is_meta else value.layout
            require(dense, where, key, "a dense tensor", found)
            self.infos[key] = TensorInfo(tuple(value.shape), value.dtype)

    def read(self, key: str) -> Tensor:
        """The tensor without its graph."""
        tensor: Tensor = self._tensors[key]
        return tensor.detach() if tensor.requires_grad else tensor

    def close(self) -> None:
        """Return at once: there is no file."""


def _refusal(error: str) -> str:
    """What torch.load found, without its words: they tell how to load the file all the same."""
    asked = re.search(r"GLOBAL ([\w.]{1,200})", error)
    if asked is None:
        return "expected tensors as torch.save writes them, found a damaged file, or other objects"
    return (
        f"expected tensors alone, found a pickle that asks for {asked[1]}; it is not loaded, as a "
        "pickle can run code: ask whoever made it for adapter_model.safetensors"
    )


def _read_bin(path: Path) -> StateDict:
    """A zip of ``torch.save``, its entries stored and no larger than the file; ``weights_only``."""
    where = str(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile raises many kinds on a damaged directory
            raise ValueError(f"{where}: expected a zip written by torch.save: {error}") from None
        stored = all(e.compress_type == zipfile.ZIP_STORED for e in entries)
        stored = stored and sum(e.file_size for e in entries) <= size
        require(stored, where, "zip", "stored zip entries", "compressed or oversize ones")
        file.seek(0)
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever the bytes provoke
            raise ValueError(f"{where}: {_refusal(str(error))}") from None
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{where}: expected a dict of tensors, found {type(tensors).__name__}")
    source = StateDict(tensors, where)
    # Views may share a storage; a small one may stand on a storage of any promised size.
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()
    }
    require(sum(storages.values()) <= size, where, "tensors", f"at most {size} bytes", "more")
    return source

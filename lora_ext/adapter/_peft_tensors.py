"""Parsing of the names of PEFT's tensors, and reading of the tensors.

Sources are safetensors files, ``.bin`` files and state dicts. They are untrusted: all shapes and
dtypes are known before any tensor is read, except for ``.bin`` files.
"""

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

# Names in the state dict of a PEFT model contain the adapter's name (`lora_A.default.weight`), but
# names in files do not. The magnitude vector is a bare parameter in files and in older versions of
# PEFT, and a module with a `weight` in newer ones. The factors of an embedding are always bare
# parameters.
_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?:"
    r"(?P<factor>[AB])(?:\.(?P<owner>[^.]+))?\.(?P<kind>weight|bias)"
    r"|(?P<bare>embedding_[AB])(?:\.(?P<owner_of_bare>[^.]+))?"
    r"|(?P<magnitude>magnitude_vector)(?:\.(?!weight$)(?P<owner_of_magnitude>[^.]+))?(?:\.weight)?)",
    re.DOTALL,
)

# The code published with "Planning vs Reasoning" (arXiv 2412.00029) stores the factors as bare
# parameters of a separate module next to the base layer.
_PUBLISHED = re.compile(r"(?P<module>.+?)(?:\.lora_layer)?\.lora_(?P<factor>[AB])", re.DOTALL)
_FACTORS = {"A.weight": "A", "embedding_A": "A", "B.weight": "B", "embedding_B": "B"}
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")


class Key(NamedTuple):
    """The parsed name of an adapter's tensor."""

    module: str  # name of the module in the base model; empty for a tensor that modules share
    role: str  # stem without `lora_`, such as A.weight, B.bias, embedding_A or magnitude_vector
    adapter: str | None = None  # None in files

    @property
    def stem(self) -> str:
        """Name of the tensor without its module, see :class:`lora_ext.kinds.Kind`."""
        return f"lora_{self.role}"

    @property
    def in_file(self) -> str:
        """Name of the tensor in PEFT's files."""
        return f"{PREFIX}{self.module}.{self.stem}"


def parse_key(name: str) -> Key | None:
    """Parse the name of a LoRA tensor in a file or model; return None for any other name."""
    match = _KEY.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        return None
    role = match["magnitude"] or match["bare"] or f"{match['factor']}.{match['kind']}"
    owner = match["owner"] or match["owner_of_bare"] or match["owner_of_magnitude"]
    return Key(match["module"], role, owner)


def wrapped_names(parameters: Mapping[str, Sequence[str]], targeted: Set[str]) -> dict[str, str]:
    """Return the targeted expert parameters by the module name under which PEFT saves the factors.

    PEFT wraps a module once for each adapted parameter, in their order. The factors of the last
    parameter are saved under the module's name, and the factors of each earlier parameter under
    a name with one more ``.base_layer``.
    """
    return {
        module + ".base_layer" * depth: name
        for module, names in parameters.items()
        for depth, name in enumerate(n for n in reversed(names) if n in targeted)
    }


def base_name(name: str) -> str:
    """Return the name of a weight in the base model, without the parts that PEFT adds."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def natural_order(name: str) -> list[str | int]:
    """Return a sort key for module names that puts layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def factor_keys(
    where: str, keys: Iterable[str], adapter_name: str | None = None
) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B for each module; raise KeyError if a module lacks one of them.

    If ``adapter_name`` is not None, keys with another adapter's name are skipped.
    """
    halves: dict[str, dict[str, str]] = {}
    for key in keys:
        published, parsed = _PUBLISHED.fullmatch(key.removeprefix(PREFIX)), parse_key(key)
        if parsed is None and published is not None:
            parsed = Key(published["module"], f"{published['factor']}.weight")
        factor = None if parsed is None else _FACTORS.get(parsed.role)
        if parsed and factor and (adapter_name is None or parsed.adapter in (None, adapter_name)):
            halves.setdefault(parsed.module, {})[factor] = key
    for module, half in halves.items():
        if len(half) < 2:
            ((factor, key),) = half.items()
            found = f"{key} without its lora_{'B' if factor == 'A' else 'A'}"
            raise KeyError(f"{where}: {module}: expected lora_A and lora_B, found {found}")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


class TensorSource(Protocol):
    """Interface of a source of tensors: ``infos`` has the shapes and dtypes by key, and tensors are
    read one at a time."""

    where: str
    infos: dict[str, TensorInfo]

    def read(self, key: str) -> Tensor:
        """Return the tensor with the name ``key``.

        A tensor from a file is on the CPU. A tensor from a state dict stays on its device.
        """
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
        raise ValueError(f"{path}: {expected}, found a file; pass its directory") from None
    if "adapter_config.json" not in names:
        inner = sorted(n for n in names if os.path.lexists(path / n / "adapter_config.json"))
        found = f"one with adapters in {', '.join(inner[:4])}" if inner else "one without this file"
        raise ValueError(f"{path}: {expected}, found {found}")
    return path


def directory_names(path: Path, expected: str) -> set[str]:
    """Return the names of the files in a directory.

    Raises:
        ValueError: If the directory cannot be opened. The message contains ``expected``, and a
            remedy if the path looks like a name on the Hub.
        NotADirectoryError: If the path is a file.
    """
    try:
        return set(os.listdir(path))
    except NotADirectoryError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        found = getattr(error, "strerror", None) or error
        if _HUB_NAME.fullmatch(str(path)):
            remedy = f"pass the result of huggingface_hub.snapshot_download({str(path)!r})"
            found = f"{found}; nothing is downloaded here: {remedy}"
        raise ValueError(f"{path}: cannot be opened: {expected}, found {found}") from None


def open_tensors(directory: Path) -> TensorSource:
    """Open ``adapter_model.safetensors`` if it exists, else ``adapter_model.bin``."""
    path = directory / "adapter_model.safetensors"
    if os.path.lexists(path):
        return SafetensorsFile(path)
    pickled = directory / "adapter_model.bin"
    if os.path.lexists(pickled):
        return _read_bin(pickled)
    raise ValueError(f"{directory}: expected adapter_model.safetensors or .bin, found neither")


class StateDict:
    """A :class:`TensorSource` of tensors in memory."""

    def __init__(self, tensors: Mapping[str, Any], where: str):
        self.where = where
        self._tensors = tensors
        self.infos = {}
        for key, value in tensors.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                found = f"{key!r:.100}: {type(value).__name__}"
                raise ValueError(f"{where}: expected a dict of tensors by name, found {found}")
            dense = value.layout == torch.strided and not value.is_meta
            found = "a tensor on meta" if value.is_meta else value.layout
            require(dense, where, key, "a dense tensor with values", found)
            self.infos[key] = TensorInfo(tuple(value.shape), value.dtype)

    def read(self, key: str) -> Tensor:
        """Return the tensor with the name ``key``, detached from its autograd graph."""
        tensor: Tensor = self._tensors[key]
        return tensor.detach() if tensor.requires_grad else tensor

    def close(self) -> None:
        """Do nothing, since there is no file."""


def _refusal(error: str) -> str:
    """Return an error message for a failure of torch.load, without torch's advice to load the file
    with ``weights_only=False``."""
    asked = re.search(r"GLOBAL ([\w.]{1,200})", error)
    if asked is None:
        return "expected tensors as torch.save writes them, found a damaged file or other objects"
    return (
        f"expected only tensors, found a pickle that imports {asked[1]}; it is not loaded, since a "
        "pickle can run code: ask its author for adapter_model.safetensors"
    )


def _read_bin(path: Path) -> StateDict:
    """Read a file that ``torch.save`` wrote, with ``weights_only=True``. The entries of the zip
    archive must be uncompressed and must not claim more bytes than the file has."""
    where = str(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except Exception as error:  # zipfile may raise anything for a damaged zip file
            raise ValueError(f"{where}: expected a zip file, found a broken one: {error}") from None
        compressed = sum(e.compress_type != zipfile.ZIP_STORED for e in entries)
        total = sum(e.file_size for e in entries)
        found = f"{compressed} compressed entries and {total} bytes in a file of {size}"
        stored = compressed == 0 and total <= size
        require(stored, where, "zip", f"uncompressed entries of at most {size} bytes", found)
        file.seek(0)
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler can raise any exception
            raise ValueError(f"{where}: {_refusal(str(error))}") from None
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{where}: expected a dict of tensors, found {type(tensors).__name__}")
    source = StateDict(tensors, where)
    # Sum the bytes of storages and not of tensors: views may share a storage, and a small view may
    # have a storage of any claimed size.
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()
    }
    total = sum(storages.values())
    require(total <= size, where, "tensors", f"at most the file's {size} bytes", f"{total} bytes")
    return source

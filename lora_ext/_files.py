"""Safe reading of untrusted files (regular files, JSON, safetensors) and atomic writing.

Shapes and dtypes are known before any tensor is read, so a caller can reject a file without
allocating memory for it. A safetensors file is read through one descriptor and is never mapped: a
file that shrinks in the meantime raises an exception, whereas a mapping would cause SIGBUS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import stat
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_ext._checks import require

Config = TypeVar("Config")
_VERSION = 1  # version of the format that `save_parts` writes

MAX_HEADER_BYTES = 16 << 20  # enough for 100 000 tensors, with about 130 bytes of header each

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor, from a file's header. An unsupported dtype is a string."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file; raise ValueError for a directory, pipe or device.

    ``path`` may be a symbolic link, as in the cache of the Hugging Face Hub. With O_NONBLOCK,
    opening a pipe does not block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ValueError(f"{path}: cannot be opened: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: expected a regular file, found a directory, pipe or device")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, limit: int) -> Any:
    """Read a JSON file; raise ValueError if it has more than ``limit`` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes, found {os.path.getsize(path)}")
    return parse_json(data, str(path))


def parse_json(data: bytes | bytearray, where: str) -> Any:
    """Parse JSON; raise ValueError for NaN, infinity, duplicate keys or too many nested levels."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise ValueError(f"duplicate key {twice!r:.200}")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{where}: expected JSON, found too many nested levels") from None
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON: {error!s:.300}") from None


class SafetensorsFile:
    """An open safetensors file. Its header has been checked for sizes, overlaps and gaps.

    Attributes:
        where: path of the file.
        infos: shape and dtype of each tensor by its key.
        metadata: entries of the header's ``__metadata__``.
    """

    def __init__(self, path: Path):
        self.where = str(path)
        self._file = open_regular(path)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        where, size = self.where, os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        if len(head) < 8:
            raise ValueError(f"{where}: expected an 8-byte header length, found {size} bytes")
        (length,) = struct.unpack("<Q", head)
        most = min(MAX_HEADER_BYTES, size - 8)
        require(length <= most, where, "header length", f"at most {most}", length)
        self._data = 8 + length
        header = parse_json(self._exactly(length), f"{where}: header")
        # A header may have many megabytes, so it is formatted only if an error is raised.
        if not isinstance(header, dict):
            raise ValueError(f"{where}: header: expected an object, found {header!r:.80}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
            raise ValueError(f"{where}: __metadata__: expected strings, found {metadata!r:.80}")
        self.metadata: dict[str, str] = metadata
        self.infos = {}
        self._spans: dict[str, tuple[int, int]] = {}
        for key, entry in header.items():
            self.infos[key], self._spans[key] = self._read_entry(key, entry)
        end = 0
        for key, span in sorted(self._spans.items(), key=lambda item: item[1]):
            expected = f"{end} as the start (tensors must neither overlap nor leave gaps)"
            require(span[0] == end, f"{where}: {key:.200}", "data_offsets", expected, span[0])
            end = span[1]
        if end != size - self._data:
            raise ValueError(f"{where}: expected {end} bytes of tensors, found {size - self._data}")

    def _read_entry(self, key: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
        where = f"{self.where}: {key:.200}"
        fields = {"dtype", "shape", "data_offsets"}
        if not isinstance(entry, dict) or entry.keys() != fields:
            expected = "dtype, shape, data_offsets"
            raise ValueError(f"{where}: entry: expected {expected}, found {entry!r:.200}")
        shape, offsets, name = entry["shape"], entry["data_offsets"], entry["dtype"]
        for field, value in (("shape", shape), ("data_offsets", offsets)):
            few = isinstance(value, list) and len(value) <= 8
            if not few or not all(type(n) is int and 0 <= n < 2**48 for n in value):
                raise ValueError(f"{where}: {field}: expected up to 8 sizes, found {value!r:.200}")
        if len(offsets) != 2 or not isinstance(name, str):
            expected = "two data_offsets and a dtype"
            raise ValueError(f"{where}: entry: expected {expected}, found {entry!r:.200}")
        dtype = _DTYPES.get(name)
        if dtype is None:  # This is not an error yet: the caller may skip the key.
            return TensorInfo(tuple(shape), name), (offsets[0], offsets[1])
        nbytes, found = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
        expected = f"{nbytes} bytes for {name} {shape}"
        require(found == nbytes, where, "data_offsets", expected, found)
        return TensorInfo(tuple(shape), dtype), (offsets[0], offsets[1])

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        found = self._file.readinto(data)
        if found != count:
            raise ValueError(f"{self.where}: expected {count} more bytes, found {found}")
        return data

    def read(self, key: str) -> Tensor:
        """Read the tensor ``key`` and return it, on the CPU.

        Raises:
            ValueError: If the tensor's dtype is not supported.
        """
        shape, dtype = self.infos[key]
        if isinstance(dtype, str):
            where = f"{self.where}: {key:.200}: dtype"
            raise ValueError(f"{where}: expected one of {[*_DTYPES]}, found {dtype!r:.80}")
        begin, end = self._spans[key]
        self._file.seek(self._data + begin)
        data = self._exactly(end - begin)
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


# -------------------------------------------------------------------------------------------------
# Configurations with tensors, and atomic writing


def read_config(path: Path, kind: type[Config], limit: int, *more: str) -> tuple[Config, Any]:
    """Read a configuration that :func:`save_parts` wrote, from a file that is not trusted.

    Args:
        path: JSON file.
        kind: Dataclass of the configuration.
        limit: Largest size in bytes.
        more: Further keys of the file.

    Returns:
        The configuration, and the whole content of the file.

    Raises:
        ValueError: If the file has unexpected content.
    """
    data, where, keys = read_json(path, limit), str(path), ("version", "config", *more)
    if not isinstance(data, dict) or data.keys() != set(keys):
        listed = " and ".join(map(repr, keys))
        raise ValueError(f"{path}: expected the keys {listed}, found {data!r:.200}")
    version, config = data["version"], data["config"]
    require(version == _VERSION, where, "version", _VERSION, f"{version!r:.80}")
    require(isinstance(config, dict), where, "config", "a JSON object", f"{config!r:.80}")
    known = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]  (a dataclass)
    for name in config:
        require(name in known, where, "config", f"keys from {known}", f"{name!r:.80}")
    try:
        return kind(**config), data
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error!s:.300}") from None


def save_parts(
    folder: str | os.PathLike[str],
    name: str,
    config: Any,
    tensors: Mapping[str, Tensor],
    **more: Any,
) -> None:
    """Write ``<name>_config.json`` and ``<name>.safetensors`` into a folder, or neither.

    Args:
        folder: Folder, created if it does not exist.
        name: Prefix of the names of the two files.
        config: Configuration, a dataclass.
        tensors: Tensors by name.
        more: Further entries of the JSON file.
    """
    from safetensors.torch import save  # imported late: only this function needs it

    data = {"version": _VERSION, "config": dataclasses.asdict(config), **more}
    kept = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    text = json.dumps(data, indent=1).encode()
    write_files(folder, {f"{name}.safetensors": save(kept), f"{name}_config.json": text})


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write files into a folder so that either all of them appear or nothing changes.

    Every file is written under a temporary name and synced to disk before the first one is renamed.
    A new folder is also created under a temporary name. An exception, such as that of a full disk,
    therefore leaves the existing files intact. A process that is killed while it renames the files
    of an existing folder can leave old files beside new ones.

    Args:
        folder: folder of the files. It is created if it does not exist, and its other files do not
            change.
        files: contents of each file by name. The files are renamed in this order.

    Raises:
        OSError: If a file cannot be written. Nothing has changed in this case.
    """
    path, mark = Path(folder), f".{uuid.uuid4().hex[:12]}.partial"
    if path.is_dir():
        _replace_files(path, files, mark)
        return
    parents = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}{mark}")
    try:
        beside.mkdir()
        for name, data in files.items():
            _write(beside / name, data)
        try:
            beside.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            _replace_files(path, files, mark)  # another process has created the folder
            shutil.rmtree(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in parents:  # The nearest parent is first; `rmdir` fails if it contains files.
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _replace_files(folder: Path, files: Mapping[str, bytes], mark: str) -> None:
    paths = {folder / name: folder / f".{name}{mark}" for name in files}
    before: dict[Path, Path | None] = {}
    try:
        for (path, new), data in zip(paths.items(), files.values(), strict=True):
            _write(new, data)
            before[path] = _back_up(path, new.with_name(f"{new.name}.old"))
        for path, new in paths.items():
            os.replace(new, path)
    except BaseException:
        for path, old in before.items():
            if old is not None:
                os.replace(old, path)
            else:
                path.unlink(missing_ok=True)
        raise
    finally:
        for new in paths.values():
            new.unlink(missing_ok=True)
            new.with_name(f"{new.name}.old").unlink(missing_ok=True)


def _back_up(path: Path, backup: Path) -> Path | None:
    """Store a hard link to the file ``path`` as ``backup``; the link needs no disk space.

    If the file system has no hard links, copy the file. Return None if there is no file.
    """
    if not os.path.lexists(path):
        return None
    try:
        os.link(path, backup, follow_symlinks=False)
    except OSError:  # The file system has no hard links.
        shutil.copy2(path, backup, follow_symlinks=False)
    return backup


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

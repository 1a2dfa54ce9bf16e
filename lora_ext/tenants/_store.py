"""Store of checkpoints: folders with a tenant's adapter, in PEFT's format, and its optimizer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import instance, require
from lora_ext._files import SafetensorsFile
from lora_ext.adapter import LoraAdapter, save_adapter

from ._live import MOMENTS, LiveAdapter, Optimizer

_OPTIMIZER = "optimizer.safetensors"
_MAX_NAME_BYTES = 200  # file systems allow 255 bytes, and a checkpoint's temporary name is longer


class Store:
    """Folder ``root`` of all checkpoints, created if missing. If ``root`` is None, all methods
    raise."""

    def __init__(self, root: str | os.PathLike[str] | None):
        self.root: Path | None = None
        if root is not None:
            instance("Service", "store", root, (str, os.PathLike))
            text = os.fspath(root)
            usable = isinstance(text, str) and text != "" and "\0" not in text
            require(usable, "Service", "store", "a folder, or None", repr(root))
            self.root = Path(text).absolute()
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                found = f"{str(root)!r:.200} ({error.strerror})"
                expected = "expected a folder that can be created"
                raise ValueError(f"Service: store: {expected}, found {found}") from error

    def folder(self, where: str, path: Any, argument: str = "path") -> Path:
        """Return the folder of the checkpoint ``path``; ``argument`` is the name of ``path`` in
        messages.

        Raises:
            ValueError: If there is no store, or the path is outside it.
        """
        if self.root is None:
            raise ValueError(f"{where}: store: expected a folder, found None; use Service(store=)")
        expected = "a path inside the store, relative to it"
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
        usable = isinstance(text, str) and text.strip("/.") != "" and "\0" not in text
        usable = usable and text.encode(errors="ignore").decode() == text  # no lone surrogates
        require(usable, where, argument, expected, f"{path!r:.200}")
        inner = Path(text)
        plain = not inner.is_absolute() and ".." not in inner.parts
        require(plain, where, argument, expected, f"{path!r:.200}")
        long = max(len(part.encode()) for part in inner.parts)
        expected_names = f"names of at most {_MAX_NAME_BYTES} bytes"
        require(long <= _MAX_NAME_BYTES, where, argument, expected_names, long)
        folder = self.root / inner
        # A symbolic link inside the store may point outside.
        inside = folder.resolve().is_relative_to(self.root.resolve())
        require(inside, where, argument, expected, f"{path!r:.200}, a link that points outside")
        return folder

    def save(self, where: str, path: Any, adapter: LiveAdapter) -> None:
        """Write the adapter and its optimizer state atomically."""
        from safetensors.torch import save

        folder = self.folder(where, path)
        config, state = adapter.source()
        tensors = {k: t.detach().cpu().clone() for k, t in adapter.optimizer.tensors().items()}
        save_adapter(folder, config, state, beside={_OPTIMIZER: save(tensors)})

    def read(self, where: str, path: Any) -> tuple[Path, LoraAdapter]:
        """Return a checkpoint's folder and adapter; :meth:`restore` reads its optimizer state.

        Raises:
            ValueError: If the checkpoint is missing or malformed.
        """
        folder = self.folder(where, path)
        require(os.path.isdir(folder), where, "path", "a checkpoint in the store", f"{path!r:.200}")
        return folder, LoraAdapter.load(folder)

    def restore(self, folder: Path, optimizer: Optimizer, with_state: bool) -> None:
        """Restore the state of an optimizer from a checkpoint.

        The optimizer is reset if the checkpoint has no optimizer file, or if ``with_state`` is
        False. If ``with_state`` is False, the float32 copies of 16-bit factors are still read.
        """
        path = folder / _OPTIMIZER
        tensors: dict[str, Tensor] = {}
        if path.exists():
            shapes = optimizer.shapes()
            expected = "the state of an optimizer of this adapter"
            with contextlib.closing(SafetensorsFile(path)) as file:
                for key, info in file.infos.items():
                    fits = info.shape == tuple(shapes.get(key, (-1,)))
                    fits &= info.dtype in (torch.float32, torch.float64)
                    found = f"{info.dtype} {list(info.shape)}"
                    require(fits, str(path), key, expected, found)
                    if with_state or key.endswith(":weight"):
                        tensors[key] = file.read(key)
        for name in tensors:
            for moment in MOMENTS if name.endswith(":step") else ():
                key = name.removesuffix("step") + moment
                require(key in tensors, str(path), key, "a tensor", "none")
        optimizer.restore(tensors)

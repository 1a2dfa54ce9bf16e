"""Loader of the adapters in one folder, for servers; nothing outside the folder is read."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

from lora_ext._checks import require
from lora_ext.rows import UnknownAdapterError

from ._placement import PoolFullError
from ._residence import BASE
from .pool import AdapterPool

_log = logging.getLogger(__name__)
_MAX_NAME_LENGTH = 200  # in characters; most file systems allow names of 255 bytes


class AdapterFolder:
    """Loader of the adapters below one folder. Names and paths may come from untrusted clients.

    Args:
        pool: pool into which the adapters are loaded.
        root: folder with one subfolder per adapter.

    Every method may be called from any thread. A load or unload waits while another thread loads an
    adapter. Error messages contain no paths except the one that the caller passed; the details of
    invalid files are logged.
    """

    def __init__(self, pool: AdapterPool, root: str | os.PathLike[str]):
        self.pool = pool
        self.root = Path(root).resolve(strict=True)
        self._paths: dict[str, Path] = {}  # folder of each loaded adapter, by adapter name
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the sorted names of the folders that contain an ``adapter_config.json``.

        The file itself is not read. Folders with an invalid name, or with a link to a place outside
        the root, are omitted. The names of all adapters in the pool are included.
        """
        found = (file.parent.name for file in self.root.glob("*/adapter_config.json"))
        return sorted({*filter(self._has, found), *self._paths, *self.pool.names})

    def __contains__(self, name: object) -> bool:
        """Return whether :meth:`ready` finds an adapter with this name."""
        return name in self.pool or name in self._paths or self._has(name)

    def load(self, name: str, path: str | os.PathLike[str] | None = None) -> int | None:
        """Load an adapter; if the name is loaded already, replace that adapter for later requests.

        Args:
            name: name of the adapter, which must be valid as a folder name: at most 200 printable
                characters without slashes, and not ``"__base__"``.
            path: path of the adapter's folder, absolute or relative to the root; default is
                ``name``.

        Returns:
            The :meth:`generation <AdapterPool.generation>` of the adapter.

        Raises:
            ValueError: If the name is invalid, the path is outside the root, or
                :meth:`AdapterPool.load` rejects the files.
            FileNotFoundError: If the path is not an existing folder.
            PoolFullError: If pinned adapters leave no room on the device, and the adapter does not
                fit in the host cache either.
        """
        _check_name(name)
        found = self._checked(name if path is None else path)
        with self._lock:
            self._load(name, found)
            return self.pool.generation(name)

    def ready(self, name: str) -> None:
        """Load an adapter if the pool does not have it.

        The path is that of the adapter's last :meth:`load`; default is the folder with its name.

        Raises:
            UnknownAdapterError: If there is no such folder.

        Errors of :meth:`load` are raised, too.
        """
        with self._lock:
            if name in self.pool:
                return
            self.check_exists(name)
            self._load(name, self._paths.get(name) or self._checked(name))

    def check_exists(self, name: str) -> None:
        """Raise UnknownAdapterError unless :meth:`ready` finds an adapter with this name."""
        if name not in self:
            raise UnknownAdapterError(
                f"AdapterFolder: adapter {name!r:.200} is not loaded; {self.root.name!r} has no "
                "folder of that name"
            )

    def unload(self, name: str) -> None:
        """Unload an adapter. Leases of it stay valid.

        Raises:
            UnknownAdapterError: If the adapter is not loaded.
        """
        with self._lock:
            known = self._paths.pop(name, None)
            if known is None or name in self.pool:
                self.pool.unload(name)

    def _load(self, name: str, path: Path) -> None:
        change = self.pool.update if name in self.pool else self.pool.load
        try:
            change(name, path)
        except PoolFullError as error:
            self._read_to_host(name, path, error)
        except (ValueError, NotImplementedError, OSError) as error:
            _log.warning("adapter %r is not loaded: %s", name, error)
            raise ValueError(
                f"AdapterFolder: adapter {name!r}: expected the files of an adapter for this "
                f"model, found invalid files ({type(error).__name__}); the log has the reason"
            ) from error
        self._paths[name] = path

    def _read_to_host(self, name: str, path: Path, error: PoolFullError) -> None:
        """Read an adapter into the host cache, since ``error`` says that the device is full.

        Raises:
            PoolFullError: If the host cache has no room either, or the device is too small.
        """
        if not error.final:
            if name in self.pool:  # earlier leases keep the old weights
                self.pool.unload(name)
            with contextlib.suppress(ValueError):  # raised if larger than the host cache
                self.pool.prefetch({name: path})
                return
        raise error

    def _has(self, name: Any) -> bool:
        try:
            _check_name(name)
            return bool(self._checked(name))
        except (ValueError, FileNotFoundError):
            return False

    def _checked(self, path: str | os.PathLike[str]) -> Path:
        """Return the resolved path of a folder; raise if it or a file in it is outside the root."""
        try:
            found = (self.root / path).resolve()
            inside = self.root in found.parents and all(
                self.root in file.resolve().parents for file in found.glob("*")
            )
            missing = inside and not found.is_dir()
        except (OSError, RuntimeError, ValueError):  # a loop of links, or an invalid path
            found, inside, missing = self.root, False, False
        expected = f"a folder below {self.root.name!r} without links that lead out of it"
        require(inside, "AdapterFolder", "path", expected, f"{str(path)!r:.200}")
        expected, absent = f"a folder below {self.root.name!r}", f"none at {str(path)!r:.200}"
        require(not missing, "AdapterFolder", "path", expected, absent, FileNotFoundError)
        return found


def _check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a valid name of a folder."""
    printable = isinstance(name, str) and name.isprintable() and 0 < len(name) <= _MAX_NAME_LENGTH
    fits = printable and name not in (BASE, "..") and Path(name).name == name
    expected = f"a folder name of at most {_MAX_NAME_LENGTH} printable characters"
    require(fits, "AdapterFolder", "name", f"{expected} and not {BASE!r}", f"{name!r:.200}")

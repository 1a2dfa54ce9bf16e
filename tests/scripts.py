"""Functions that load and run scripts of this repository as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def needs(*names: str) -> pytest.MarkDecorator:
    absent = missing(*names)
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {absent}")


def load_script(monkeypatch: pytest.MonkeyPatch, folder: str, name: str) -> ModuleType:
    """Return ``folder/name.py``, loaded under a unique module name, with its folder in ``sys.path``
    as for a script. Both changes are undone at the end of the test."""
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"{folder}_{name}", module)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / folder)])
    spec.loader.exec_module(module)
    return module


def module_of(path: Path, name: str) -> ModuleType:
    """Return the file as a module of this name. Later calls return the same module, because pickle
    finds its classes by this name."""
    known = sys.modules.get(name)
    if known is None or known.__file__ != str(path):
        spec = importlib.util.spec_from_file_location(name, path)
        known = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(known)
    return known


def tool(name: str) -> ModuleType:
    """Return a module of the folder ``tools``, which is not a package."""
    if str(ROOT / "tools") not in sys.path:  # Tools import each other.
        sys.path.append(str(ROOT / "tools"))
    return module_of(ROOT / f"tools/{name}.py", name)


def run_quickly(monkeypatch: pytest.MonkeyPatch, name: str, out: Path) -> ModuleType:
    example = load_script(monkeypatch, "examples", name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--out", str(out)])
    example.main()
    return example

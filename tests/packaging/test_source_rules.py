"""Rules of the tree that a compiler does not enforce: who may include what, who may import whom."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lora_ext

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = [p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"}]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M)


@pytest.mark.parametrize("room", ["include", "device", "cuda", "cpu", "emu"])
def test_kernels_twins_and_emulator_include_no_torch_header(room):
    bad = {
        str(path.relative_to(ROOT)): header
        for path in SOURCES
        if path.is_relative_to(CSRC / room)
        for header in includes(path)
        if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", header)
    }
    assert not bad


def test_torch_extension_h_is_included_by_the_bindings_alone():
    users = [p.relative_to(CSRC).as_posix() for p in SOURCES if "torch/extension.h" in includes(p)]
    assert users == ["bindings.cpp"]


def test_c10_cuda_is_included_by_stream_h_alone():
    users = {
        p.relative_to(CSRC).as_posix()
        for p in SOURCES
        if any(h.startswith(("c10/cuda", "ATen/cuda")) for h in includes(p))
    }
    assert users <= {"ops/stream.h"}


def test_kernel_files_reach_the_hardware_through_the_device_header_alone():
    wrong = []
    for path in (p for p in SOURCES if p.is_relative_to(CSRC / "cuda")):
        code = re.sub(r"//[^\n]*", "", path.read_text())
        wrong += [f"{path.name}: {w}" for w in (r"\basm\b", "<<<") if re.search(w, code)]
        wrong += [f"{path.name}: {h}" for h in includes(path) if h.startswith("cuda")]
    assert not wrong


# Bottom to top; an import only goes down, or stays in its own room.
FLOORS = [
    ["reference"],
    ["ops"],
    ["nn"],
    ["adapters", "circuits"],
    ["methods"],
    ["interop"],
    ["cli"],
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports, inside functions too."""
    names: set[str] = set()
    package = ("lora_ext", *path.relative_to(ROOT / "lora_ext").parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith("lora_ext.")} & FLOOR.keys()


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_imports_only_go_down(room):
    files = [*(ROOT / "lora_ext" / room).rglob("*.py"), *(ROOT / "lora_ext").glob(f"{room}.py")]
    wrong = []
    for path in files:
        others = rooms_of(imported_modules(path)) - {room}
        wrong += [f"{path.name} imports {other}" for other in others if FLOOR[other] >= FLOOR[room]]
    assert not wrong


def test_a_method_never_imports_another_method():
    wrong = []
    for path in (ROOT / "lora_ext/methods").glob("*/**/*.py"):
        own = path.relative_to(ROOT / "lora_ext/methods").parts[0]
        used = {
            n.split(".")[2] for n in imported_modules(path) if n.startswith("lora_ext.methods.")
        }
        wrong += [f"{path.name} imports {other}" for other in used - {own}]
    assert not wrong


def test_ops_of_the_compiled_module_are_called_by_ops_alone():
    """Another room may call an op that it defines itself, in Python (``torch.library``)."""
    compiled = {name for name in dir(lora_ext._C) if name.startswith("lora_")}
    callers = {
        path.relative_to(ROOT / "lora_ext").parts[0]
        for path in (ROOT / "lora_ext").rglob("*.py")
        if compiled & set(re.findall(r"torch\.ops\.lora_ext\.(\w+)", path.read_text()))
    }
    assert callers <= {"ops"}

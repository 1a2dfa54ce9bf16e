"""Write stubs of the compiled module from the schemas of csrc/ops/table.h; setup.py calls it.

usage: python tools/stubs.py > lora_ext/_C.pyi

pybind11-stubgen would have to import the compiled module, and would not find the types of the
dispatcher's ops.
"""

from __future__ import annotations

import re
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "csrc/ops/table.h"
TYPES = {"Tensor": "Tensor", "int": "int", "float": "float", "bool": "bool", "str": "str"}
TYPES["ScalarType"] = "torch.dtype"
HEAD = '''"""The compiled module; Python uses the same ops through ``torch.ops.lora_ext``."""

import torch
from torch import Tensor

def is_plain_product(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out_features: int, /
) -> bool: ...
def same_bits(t: Tensor, copy: Tensor, /) -> bool: ...
def cpu_isa() -> str: ...
def set_cpu_isa(isa: str, /) -> None: ...
def has_kernels() -> bool: ...
def set_debug(on: bool, /) -> None: ...
'''


def schemas(table: str) -> dict[str, str]:
    """Return the schema of each op, with its parts joined and its macros replaced."""
    shared = dict(re.findall(r'^#define (LX_\w+) ("[^"]*")$', table, re.M))
    rows = re.findall(r'\{\s*("\w+"),\s*((?:"[^"]*"|LX_\w+|\s+)+)\}', table.partition("kOps{")[2])
    found = {}
    for name, parts in rows:
        text = re.sub(r"LX_\w+", lambda macro: shared[macro[0]], parts)
        found[name.strip('"')] = "".join(re.findall(r'"([^"]*)"', text))
    return found


def type_of(text: str) -> str:
    """Return the Python type of a schema type such as ``Tensor(a!)[]``."""
    name = re.match(r"\w+", text)
    assert name is not None, text
    found = f"list[{TYPES[name[0]]}]" if "[]" in text else TYPES[name[0]]
    return f"{found} | None" if text.endswith("?") else found


def stub(name: str, schema: str) -> str:
    """Return the stub of one op; all arguments are positional, as pybind11 stores no names."""
    takes, _, gives = schema[1:].partition(") -> ")
    arguments = [part.partition("=")[0].split() for part in takes.split(", ")]
    listed = ", ".join(f"{argument}: {type_of(kind)}" for kind, argument in arguments)
    results = [type_of(part.split()[0]) for part in gives.strip("()").split(", ") if part]
    result = results[0] if len(results) == 1 else f"tuple[{', '.join(results)}]"
    return f"def {name}({listed}, /) -> {result if results else 'None'}: ...\n"


def stubs() -> str:
    """Return the text of ``lora_ext/_C.pyi``."""
    return HEAD + "".join(stub(*each) for each in schemas(TABLE.read_text()).items())


if __name__ == "__main__":
    print(stubs(), end="")

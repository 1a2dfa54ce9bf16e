"""What `import lora_ext` costs and says, and what the loader says when it cannot import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import torch

import lora_ext
from lora_ext import _loader

PACKAGE = Path(lora_ext.__file__).parent


def python(code: str) -> str:
    """Run code in a new process beside this package; everything that it prints."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_import_is_silent():
    assert python("import lora_ext") == ""


def test_import_takes_under_300_ms_beyond_torch():
    code = (
        "import time, torch; t = time.perf_counter(); import lora_ext; "
        "print(time.perf_counter() - t)"
    )
    assert min(float(python(code)) for _ in range(5)) < 0.3


def test_import_starts_nothing_on_a_gpu():
    assert python("import torch, lora_ext; print(torch.cuda.is_initialized())").strip() == "False"


def test_the_process_holds_one_openmp_library():
    code = (
        "import lora_ext, re, torch\n"
        "torch.ones(100000).exp()\n"
        "print(len(set(re.findall(r'\\S*lib[gi]?omp\\S*', open('/proc/self/maps').read()))))"
    )
    assert int(python(code)) == 1


def test_a_build_for_another_torch_is_explained(monkeypatch):
    monkeypatch.setattr(_loader, "build_info", lambda: {"torch": "2.0.0"})
    words = _loader.explain(ImportError("undefined symbol"))
    assert f"built for torch 2.0.0, found {torch.__version__}" in words and "pip install" in words


def test_a_missing_build_is_explained(monkeypatch):
    monkeypatch.setattr(_loader, "build_info", dict)
    assert "lora_ext is not built: run `pip install" in _loader.explain(ImportError("no module"))


def test_a_broken_build_keeps_the_reason(monkeypatch):
    monkeypatch.setattr(_loader, "build_info", lambda: {"torch": torch.__version__})
    assert "(undefined symbol: f)" in _loader.explain(ImportError("undefined symbol: f"))


def test_the_stubs_name_what_the_module_has():
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    stubs = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert stubs == {name for name in dir(lora_ext._C) if not name.startswith("_")}


def test_doctor_reports_and_passes():
    run = subprocess.run(
        [sys.executable, "-m", "lora_ext.doctor"],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for word in ("torch", "compiler", "cpu kernels", "all good"):
        assert word in run.stdout
    assert re.search(r"cpu\s+ok\s+lora_apply", run.stdout)


def test_doctor_fails_when_an_op_is_wrong():
    code = (
        "import lora_ext, sys; from lora_ext import doctor, ops\n"
        "good = ops.lora_apply\n"
        "ops.lora_apply = lambda *a: good(*a) * 1.001\n"
        "sys.exit(0 if doctor.main() == 1 else 5)"
    )
    assert "FAIL lora_apply" in python(code)

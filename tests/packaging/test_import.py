"""Time and output of `import lora_ext`, the loader's messages for failed imports, and the
doctor."""

import ast
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_ext
from lora_ext import _loader, doctor, ops

PACKAGE = Path(lora_ext.__file__).parent


def python(code: str) -> str:
    """Run code in a new process that can import this package, and return its standard output and
    error output."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.mark.slow
def test_import_is_silent_starts_nothing_and_defers_large_packages():
    """Check everything in one process, because importing torch takes seconds of processor time."""
    code = (
        "import sys, lora_ext\n"
        "assert not {'transformers', 'peft', 'safetensors'} & set(sys.modules)\n"
        "names = ['circuits', 'control', 'federated', 'methods']\n"
        "assert not [n for n in names if f'lora_ext.{n}' in sys.modules]\n"
        "assert set(names) <= set(dir(lora_ext))\n"
        "import re, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "torch.ones(100000).exp()\n"
        "openmp = set(re.findall(r'\\S*lib[gi]?omp\\S*', open('/proc/self/maps').read()))\n"
        "assert len(openmp) == 1, openmp\n"
        "print([getattr(lora_ext, n).__name__ for n in names])"
    )
    expected = [f"lora_ext.{n}" for n in ("circuits", "control", "federated", "methods")]
    assert python(code) == f"{expected}\n"
    with pytest.raises(AttributeError, match="module 'lora_ext' has no attribute 'nothing'"):
        lora_ext.nothing  # noqa: B018  # the access itself raises


@pytest.mark.slow
def test_import_takes_under_300_ms_beyond_torch():
    # Measure processor time, since wall-clock time includes other processes. The garbage collector
    # is off, because its pass over all objects of torch would run during one of the imports. On a
    # busy machine, the same instructions take up to twice as long. The limit is therefore scaled by
    # the time of torch's import, which takes 1.5 s on an idle machine.
    code = (
        "import gc, time; gc.disable(); t = time.process_time(); import torch; "
        "u = time.process_time(); import lora_ext; print(time.process_time() - u, u - t)"
    )
    found = []
    for _ in range(5):
        own, other = map(float, python(code).split())
        if own < 0.3 * max(1, other / 1.5):
            return
        found.append((own, other))
    pytest.fail(f"seconds to import lora_ext and torch: {found}")


def test_build_that_cannot_be_imported_is_explained(monkeypatch):
    monkeypatch.setattr(_loader, "build_info", lambda: {"torch": "2.0.0"})
    words = _loader.explain(ImportError("undefined symbol"))
    assert f"built for torch 2.0.0, found {torch.__version__}" in words and "pip install" in words
    monkeypatch.setattr(_loader, "build_info", dict)
    monkeypatch.setattr(_loader, "hidden", lambda: None)
    words = _loader.explain(ImportError("no module"))
    assert f"lora_ext in {PACKAGE} is not built: run `pip install" in words
    monkeypatch.setattr(_loader, "build_info", lambda: {"torch": torch.__version__})
    assert "(undefined symbol: f)" in _loader.explain(ImportError("undefined symbol: f"))


def test_stubs_have_the_names_of_the_module():
    tree = ast.parse(runpy.run_path(str(PACKAGE.parent / "tools/stubs.py"))["stubs"]())
    stubs = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert stubs == {name for name in dir(lora_ext._C) if not name.startswith("_")}


def doctor_in_a_checkout(folder: Path, *, built: bool) -> subprocess.CompletedProcess[str]:
    """Run ``python -m lora_ext.doctor`` in a copy of this package, with the original on PYTHONPATH,
    and return the completed process."""
    outputs = ("_C*.so", "_emu*.so", "_build_info.py", "__pycache__")
    shutil.copytree(PACKAGE, folder / "lora_ext", ignore=shutil.ignore_patterns(*outputs))
    if built:
        for path in (*PACKAGE.glob("_C*.so"), PACKAGE / "_build_info.py"):
            (folder / "lora_ext" / path.name).symlink_to(path)
    run = (
        "import runpy, sys\n"
        # An editable install would make its compiled module available to the checkout.
        "names = [getattr(finder, '__name__', '') for finder in sys.meta_path]\n"
        "sys.meta_path[:] = [f for f, n in zip(sys.meta_path, names) if 'Editable' not in n]\n"
        "runpy.run_module('lora_ext.doctor', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", run],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_error_names_a_checkout_that_hides_an_installed_package(tmp_path):
    run = doctor_in_a_checkout(tmp_path, built=False)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == (
        f"ImportError: lora_ext in {tmp_path}/lora_ext is not built, and hides the one in "
        f"{PACKAGE}: start Python outside of {tmp_path}, or run `pip install --no-build-isolation "
        "-e .` there."
    )


@pytest.mark.slow
def test_doctor_passes_and_prints_the_paths_it_uses(tmp_path):
    run = doctor_in_a_checkout(tmp_path, built=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(rf"imported from\s+{tmp_path}/lora_ext\n", run.stdout)
    assert re.search(rf"kernels from\s+{tmp_path}/lora_ext/_C", run.stdout)
    note = f"it hides another lora_ext in {PACKAGE}; start Python outside of {tmp_path} to use it"
    assert note in run.stdout
    for word in ("torch", "compiler", "cpu kernels", "all good"):
        assert word in run.stdout
    assert re.search(r"cpu\s+ok\s+lora_apply", run.stdout)


def test_package_outside_the_path_is_found_too(monkeypatch, tmp_path):
    """Check a package found by an import hook, as in an editable install."""

    class Finder:
        @staticmethod
        def find_spec(name, path, target=None):
            return importlib.util.spec_from_file_location(name, tmp_path / name / "__init__.py")

    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [Finder])
    assert _loader.hidden() is None, "expected None before the package exists"
    (tmp_path / "lora_ext").mkdir()
    (tmp_path / "lora_ext" / "__init__.py").touch()
    assert _loader.hidden() == tmp_path / "lora_ext"


def test_doctor_fails_if_an_op_is_wrong(monkeypatch, capsys):
    good = ops.lora_apply
    monkeypatch.setattr(ops, "lora_apply", lambda *a: good(*a) * 1.001)
    assert doctor.main() == 1
    assert "FAIL lora_apply" in capsys.readouterr().out

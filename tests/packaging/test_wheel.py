"""Build an sdist, a wheel from it, and import the wheel in a new environment outside the
checkout."""

import fcntl
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from scripts import ROOT

# Build for the CPU only: the build in the checkout, which the other tests use, has compiled the
# kernels already. The invalid proxies prevent downloads.
NO_NETWORK = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
ENV = {**os.environ, "LORA_EXT_CUDA": "0", "LORA_EXT_EMU": "1", "PIP_NO_INDEX": "1", **NO_NETWORK}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """Return the sdist and the wheel built from it, which all workers of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "dist"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folder.glob("*.whl")):
            run = subprocess.run(command, env=ENV, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_sdist_and_wheel_contain_exactly_the_expected_files(archives):
    names = [name.partition("/")[2] for name in tarfile.open(archives[0]).getnames()]
    listing = ["git", "ls-files", "csrc", "lora_ext", "examples"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    assert tracked.returncode == 0
    missing = set(tracked.stdout.split()) - set(names)
    assert not missing
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= set(names)
    assert not [n for n in names if n.endswith((".so", ".o", ".a", "_build_info.py"))]
    names = zipfile.ZipFile(archives[1]).namelist()
    modules = [name for name in names if name.endswith(".so")]
    assert modules == [f"lora_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    assert {"lora_ext/_build_info.py", "lora_ext/_C.pyi", "lora_ext/py.typed"} <= set(names)
    assert not [n for n in names if not n.startswith("lora_ext")]


def test_wheel_imports_and_computes_outside_the_checkout(archives, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    # The packages of this environment, such as torch, are appended to the path of the new one. Its
    # .pth files, which link to the checkout, are then not processed.
    (site / "zz_outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = tmp_path / "venv/bin/python"
    env = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", archives[1]]
    subprocess.run(install, check=True, env=env, cwd=tmp_path)
    code = "import lora_ext; print(lora_ext.__file__)"
    run = subprocess.run(
        [python, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(site)
    for doctor in (
        [python, "-m", "lora_ext.doctor"],
        [python, "-m", "lora_ext", "doctor"],
        [python.with_name("lora-ext"), "doctor"],
    ):
        run = subprocess.run(doctor, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0 and "all good" in run.stdout, run.stdout + run.stderr

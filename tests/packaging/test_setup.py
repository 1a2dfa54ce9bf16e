"""setup.py: every failed installation prints one sentence with the remedy."""

import importlib
import importlib.util
import io
import stat
import sys
import types
from pathlib import Path

import pytest
from scripts import ROOT, module_of

build = module_of(ROOT / "setup.py", "lora_ext_setup")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("LORA_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CXX", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)


def torch_for(cuda: str | None, version: str = "2.13.0"):
    return types.SimpleNamespace(__version__=version, version=types.SimpleNamespace(cuda=cuda))


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Return a function that makes a fake CUDA toolkit of version ``release``, which accepts gcc up
    to version ``gcc``."""

    def make(release: str = "13.0", gcc: int = 15) -> Path:
        home = tmp_path / "cuda"
        script(
            home / "bin/nvcc",
            'case "$1" in\n'
            f'--version) echo "Cuda compilation tools, release {release}, V{release}.88";;\n'
            f'*) echo "#$ TOP={home}" >&2;;\nesac',
        )
        (home / "include/crt").mkdir(parents=True)
        (home / "include/cuda_runtime.h").touch()
        (home / "include/crt/host_config.h").write_text(f"#if __GNUC__ > {gcc}\n#endif\n")
        monkeypatch.setenv("CUDA_HOME", str(home))
        return home

    return make


def sentence(function, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        function(*args)
    text = str(caught.value)
    assert text.startswith("lora_ext: ") and "\n" not in text
    return text


def test_missing_or_old_torch_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    text = sentence(build.find_torch)
    assert "`pip install torch`" in text and "--no-build-isolation" in text
    monkeypatch.setitem(sys.modules, "torch", torch_for(None, "2.9.1"))
    assert "torch 2.9.1 is too old" in sentence(build.find_torch)


def test_valid_toolkit_is_used_with_a_cuda_torch_or_the_switch(toolkit, monkeypatch):
    home = toolkit("13.0")
    assert build.find_toolkit(torch_for(None), "g++") is None
    assert build.find_toolkit(torch_for("13.0"), "g++").home == home
    monkeypatch.setenv("LORA_EXT_CUDA", "1")
    for cuda in (None, "13.0", "13.2"):
        found = build.find_toolkit(torch_for(cuda), "g++")
        assert found.home == home and found.version == (13, 0)
    monkeypatch.setenv("LORA_EXT_CUDA", "0")
    assert build.find_toolkit(torch_for("13.0"), "g++") is None


def test_missing_nvcc_is_an_error_with_a_cuda_torch_or_the_switch(monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.find_toolkit(torch_for(None), "g++") is None
    text = sentence(build.find_toolkit, torch_for("13.0"), "g++")
    assert "torch is built for CUDA 13.0, but there is no nvcc" in text
    assert "`pip install nvidia-cuda-nvcc==13.0.*" in text and "or set LORA_EXT_CUDA=0" in text
    text = sentence(build.find_toolkit, torch_for("12.8"), "g++")
    assert "install CUDA's toolkit of version 12 and set CUDA_HOME, or set LORA" in text
    monkeypatch.setenv("LORA_EXT_CUDA", "0")
    assert build.find_toolkit(torch_for("13.0"), "g++") is None
    monkeypatch.setenv("LORA_EXT_CUDA", "1")
    assert "LORA_EXT_CUDA=1, but there is no nvcc" in sentence(
        build.find_toolkit, torch_for(None), "g++"
    )


def test_nvcc_of_the_nvidia_wheels_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    nvcc = tmp_path / "nvidia/cu13/bin/nvcc"
    (tmp_path / "nvidia/cu13/include").mkdir(parents=True)
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    monkeypatch.delitem(build.sys.modules, "nvidia", raising=False)
    importlib.invalidate_caches()
    before = build.find_nvcc()
    assert before is None or Path(before) == Path("/usr/local/cuda/bin/nvcc")
    script(nvcc, "true")
    assert build.find_nvcc() == (before or str(nvcc))


def test_invalid_switch_and_a_home_without_nvcc_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert f"CUDA_HOME is {tmp_path}" in sentence(build.find_toolkit, torch_for("13.0"), "g++")
    monkeypatch.setenv("LORA_EXT_CUDA", "yes")
    assert "LORA_EXT_CUDA is 'yes'" in sentence(build.find_toolkit, torch_for(None), "g++")


@pytest.mark.parametrize(
    ("release", "words"),
    [("13.0", "built for CUDA 12.8, but nvcc 13.0"), ("12.4", "nvcc 12.4 is too old")],
)
def test_nvcc_of_another_major_version_or_too_old_is_reported(toolkit, release, words):
    toolkit(release)
    text = sentence(build.find_toolkit, torch_for("12.8"), "g++")
    assert words in text and ("LORA_EXT_CUDA=0" in text or release == "12.4")


def test_gcc_too_new_for_nvcc_is_reported(toolkit, tmp_path, monkeypatch):
    toolkit("13.0", gcc=15)
    new = script(tmp_path / "g++-16", "echo 16")
    text = sentence(build.find_toolkit, torch_for("13.0"), new)
    assert "nvcc 13.0 accepts gcc up to 15" in text and "CUDAHOSTCXX=g++-15" in text
    monkeypatch.setenv("CUDAHOSTCXX", script(tmp_path / "g++-15", "echo 15"))
    assert build.find_toolkit(torch_for("13.0"), new)


@pytest.mark.parametrize("header", ["cuda_runtime.h", "crt/host_config.h"])
def test_missing_cuda_header_is_reported(toolkit, header):
    (toolkit() / "include" / header).unlink()
    assert f"{header} is not in" in sentence(build.find_toolkit, torch_for("13.0"), "g++")


def test_headers_of_python_and_half_precision_are_found_or_reported(tmp_path, monkeypatch):
    folders = build.find_cuda_headers()
    for header in build.EMULATED:
        assert any((Path(folder) / header).exists() for folder in folders)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert "pip install nvidia-cuda-runtime" in sentence(build.find_cuda_headers)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h is not in" in sentence(build.find_python_include)


def test_every_build_uses_the_headers_of_a_complete_toolkit(toolkit, tmp_path, monkeypatch):
    include, others = toolkit() / "include", tmp_path / "wheels"
    monkeypatch.setattr(build, "nvidia_wheels", lambda pattern: [others])
    for folder in (others, include):  # An incomplete toolkit is not used.
        for header in build.EMULATED:
            (folder / header).parent.mkdir(parents=True, exist_ok=True)
            (folder / header).touch()
        assert build.find_cuda_headers() == [str(folder)]


def test_missing_compiler_or_cmake_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in sentence(build.find_cxx)
    monkeypatch.setattr(build.sys, "executable", str(tmp_path / "python"))
    assert "pip install cmake ninja" in sentence(build.find_cmake)
    script(tmp_path / "cmake", "echo cmake version 3.16.3")
    assert "3.24 is needed" in sentence(build.find_cmake)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8.0;9.0a", ["80-real", "90a-real"]),
        ("8.0 9.0+PTX", ["80-real", "90-real", "90-virtual"]),
        (" 10.0f,12.1 ", ["100f-real", "121-real"]),
        ("9.0a;9.0-virtual", ["90a-real", "90-virtual"]),
    ],
)
def test_arch_list_is_parsed_like_in_torch(text, names):
    assert build.architectures(text) == names


def test_arch_list_with_a_word_raises_and_the_default_ends_with_ptx():
    assert "TORCH_CUDA_ARCH_LIST has 'Hopper'" in sentence(build.architectures, "8.0;Hopper")
    with_hopper = ["80-real", "90a-real", "90-virtual"]
    assert build.default_architectures((12, 8)) == with_hopper
    with_blackwell = ["80-real", "90a-real", "100f-real", "120-real", "90-virtual"]
    for version in ((12, 9), (13, 0)):
        assert build.default_architectures(version) == with_blackwell


def test_build_prints_its_steps_and_their_duration():
    times = iter([0.0, 61.0, 62.4, 75.0])
    out, screen = io.StringIO(), io.StringIO()
    progress = build.Progress(out, screen, lambda: next(times))
    lines = ["[1/4] Building CXX object x/csrc/cpu/lora.cpp.o\n", "x.cpp:3: warning: y\n"]
    progress.follow(lines)
    assert out.getvalue() == (
        "[1/4 1:01] Building CXX object x/csrc/cpu/lora.cpp.o\nx.cpp:3: warning: y\n"
    )
    bar = "lora_ext [######..................] 1/4 files 1:02 lora.cpp"
    assert screen.getvalue() == f"\r\x1b[K{bar}"
    progress.say(f"built in {progress.took()} minutes")
    assert out.getvalue().endswith("\nlora_ext: built in 1:15 minutes\n")
    assert screen.getvalue().endswith("\r\x1b[Klora_ext: built in 1:15 minutes\n")


def test_max_jobs_is_honoured(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.jobs() == 7
    monkeypatch.setenv("MAX_JOBS", "many")
    assert "MAX_JOBS is 'many'" in sentence(build.jobs)
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= build.jobs()

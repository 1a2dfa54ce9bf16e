"""Saving is atomic: after a full disk, an error or an interrupt, only the old files exist."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from made_adapters import adapter

from lora_ext._files import write_files
from lora_ext.adapter import LoraAdapter


@contextmanager
def full_disk(limit):
    """Limit the size of every file to ``limit`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("limit", [0, 100, 1000])  # The config or the tensors do not fit.
def test_full_disk_leaves_the_old_files(limit, tmp_path):
    old, new = adapter(0), adapter(1)
    old.save(tmp_path / "there")
    (tmp_path / "there" / "README.md").write_text("kept")
    before = contents(tmp_path / "there")
    with full_disk(limit):
        for name in ("there", "new"):
            with pytest.raises(OSError):
                new.save(tmp_path / name)
    assert contents(tmp_path / "there") == before and LoraAdapter.load(tmp_path / "there") == old
    assert os.listdir(tmp_path) == ["there"], "expected no temporary files"
    new.save(tmp_path / "there")
    assert LoraAdapter.load(tmp_path / "there") == new
    assert (tmp_path / "there" / "README.md").read_text() == "kept"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("function", ["fsync", "replace", "link"])
def test_error_in_any_call_leaves_the_old_files(function, existing, error, tmp_path, monkeypatch):
    # Make the n-th call of the function fail, for every n up to the number of calls in one save.
    folder = tmp_path / "there"
    folder.mkdir()
    if existing:
        adapter(0).save(folder)
    before = contents(folder)
    real, calls = getattr(os, function), []
    for n in range(5):
        calls.clear()

        def fails(*args, n=n, **kwargs):
            calls.append(args)
            if len(calls) == n + 1:
                raise error("fault")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, function, fails)
        try:
            adapter(1).save(folder)
        except error:
            assert contents(folder) == before, (function, n)
            continue
        finally:
            monkeypatch.undo()
        assert LoraAdapter.load(folder) == adapter(1)
        assert sorted(contents(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
        return
    raise AssertionError("expected at most 4 calls per save")


def test_links_are_replaced_and_their_targets_unchanged(tmp_path):
    # The Hub's cache consists of links to shared files.
    adapter(0).save(tmp_path / "blobs")
    before = contents(tmp_path / "blobs")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name in before:
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    assert LoraAdapter.load(folder) == adapter(0)
    adapter(1).save(folder)
    assert LoraAdapter.load(folder) == adapter(1) and contents(tmp_path / "blobs") == before


def test_new_folder_has_all_files_and_default_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    write_files(tmp_path / "deep" / "new", {"a": b"1", "b": b"2"})
    assert contents(tmp_path / "deep" / "new") == {"a": b"1", "b": b"2"}
    mode = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "deep" / "new").stat().st_mode == mode
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_files(tmp_path / "file", {"a": b"1"})
    assert (tmp_path / "file").read_text() == ""


def test_current_folder_can_be_saved_to_and_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(1).save(Path("."))
    assert torch.is_tensor(next(iter(LoraAdapter.load(".").modules.values())).a)


def test_fields_skipped_on_loading_do_not_prevent_saving(tmp_path):
    value = adapter()
    fields = {"from_another_peft": True, "rank_pattern": {"no_such_module": 3}}
    config = {**value.config.to_dict(), **fields}
    loaded = LoraAdapter.load((config, value.state_dict()), strict=False)
    loaded.save(tmp_path)
    assert LoraAdapter.load(tmp_path, strict=False) == value


def test_folder_created_concurrently_is_not_an_error(tmp_path, monkeypatch):
    rename, theirs = Path.rename, adapter(1)

    def late(self, target):
        monkeypatch.undo()
        theirs.save(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    adapter().save(tmp_path / "new")
    assert LoraAdapter.load(tmp_path / "new") == adapter()
    assert os.listdir(tmp_path) == ["new"] and len(os.listdir(tmp_path / "new")) == 2

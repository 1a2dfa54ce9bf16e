"""``lora-ext`` with malicious folders, invalid arguments, too little memory and a full disk."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from cli.commands import assert_refused
from made_adapters import Q, adapter
from safetensors.torch import load_file, save_file
from test_saving import contents, full_disk

from lora_ext import cli
from lora_ext.adapter import LoraAdapter

pytestmark = pytest.mark.filterwarnings("ignore")


def spoiled(folder, how):
    """Make ``folder`` an invalid adapter in the way named by ``how`` and return it."""
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if how == "missing":
        return folder / "nowhere"
    if how == "a file":
        return config
    if how == "half-written":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "not JSON":
        config.write_text("{" * 1000)
    elif how == "another method":
        config.write_text('{"peft_type": "IA3"}')
    elif how == "a header that lies":
        tensors.write_bytes(b"\xff" * 8 + tensors.read_bytes()[8:])
    elif how == "whole numbers":
        save_file({k: t.int() for k, t in load_file(tensors).items()}, tensors)
    elif how == "another rank":
        raw = json.loads(config.read_text())
        config.write_text(json.dumps({**raw, "r": 7, "rank_pattern": {}}))
    elif how == "a pipe":
        tensors.unlink()
        os.mkfifo(tensors)
    return folder


HOW = [
    "missing", "a file", "half-written", "no tensors", "no config", "not JSON", "another method",
    "a header that lies", "whole numbers", "another rank", "a pipe",
]  # fmt: skip


def test_names_from_a_file_cannot_control_the_terminal(run, tmp_path):
    name = "up\x1b[2J\n\u202e\ud800"
    value = adapter(shapes={"up": (6, 5)})
    value = value.with_modules({name.replace("\ud800", ""): value.modules["up"]})
    value.save(tmp_path)
    status, out, _ = run("inspect", tmp_path)
    assert status == 0 and "up\\x1b[2J\\n\\u202e" in out and out.isascii() and "\x1b" not in out
    config = tmp_path / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "target_modules": [name]}))
    status, out, err = run("inspect", tmp_path)
    assert status == 2 and "\\x1b" in err and "\x1b" not in err


@pytest.mark.parametrize("how", HOW)
def test_hostile_folder_prints_one_sentence(how, run, folders, tmp_path):
    good, bad = folders
    bad = spoiled(bad, how)
    out = tmp_path / "out"
    for arguments in (
        ("inspect", bad),
        ("diff", good, bad),
        ("diff", bad, good),
        ("merge", good, bad, "--out", out),
        ("resize", bad, "--rank", 2, "--out", out),
    ):
        assert_refused(run(*arguments), f"lora-ext {arguments[0]}: {tmp_path}")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_unsupported_operation_prints_one_sentence(run, folders, tmp_path):
    one, two = folders
    out = ("--out", tmp_path / "out")
    adapter(use_dora=True).save(tmp_path / "dora")
    adapter(ranks=2).save(tmp_path / "other")
    bad = adapter()
    bad.modules[Q].a[0, 0] = float("nan")
    bad.save(tmp_path / "bad")
    before = sorted(os.listdir(tmp_path))
    for words, arguments in {
        "weights: expected one for each of 2": ("merge", one, two, "--weights", 1, *out),
        "DoRA": ("merge", one, tmp_path / "dora", *out),
        "rank: expected 4": ("merge", one, tmp_path / "other", "--mode", "factors", *out),
        "rank: expected None": ("merge", one, two, "--rank", 3, *out),
        "--rank: expected at least 1, found 0": ("resize", one, "--rank", 0, *out),
        "--rank: expected at most 20": ("resize", one, "--rank", 10**30, *out),
        "expected finite": ("resize", tmp_path / "bad", "--rank", 2, *out),
        "tau": ("inspect", one, "--tau", 2),
    }.items():
        assert_refused(run(*arguments), f"lora-ext {arguments[0]}: ", words)
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / "file").write_text("")
    assert_refused(run("merge", one, two, "--out", tmp_path / "file"), "file: cannot be written: ")
    assert_refused(run("merge", one, two, "--out", tmp_path / "file" / "x"), "cannot be written")


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "x", "y"),
        ("resize", "x", "--rank", 2),
        ("prune", "x", "--base", "b", "--aligned", "a", "--num", 1, "--direction", "smallest"),
    ],
)
def test_empty_folder_name_is_rejected_before_anything_is_read(arguments, run):
    words = f"lora-ext {arguments[0]}: --out: expected a folder, found ''"
    assert_refused(run(*arguments, "--out", ""), words)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("melt", "x"),
        ("merge", "x"),
        ("merge", "x", "y", "--out", "z", "--weights", "half"),
        ("merge", "x", "y", "--out", "z", "--mode", "slerp"),
        ("resize", "x", "--out", "z"),
        ("resize", "x", "--rank", "two", "--out", "z"),
        ("inspect",),
        ("inspect", "x", "--kinds", "nuclear"),
        ("prune", "x", "--base", "b", "--aligned", "a", "--out", "z"),
        ("prune", "x", "--base", "b", "--aligned", "a", "--out", "z", "--num", 1, "--threshold", 1),
        ("diff", "x"),
    ],
)
def test_invalid_arguments_print_one_sentence(arguments, run):
    assert_refused(run(*arguments), "--help)")


def test_too_little_memory_prints_one_sentence(run, tmp_path):
    adapter(ranks=1, shapes={Q: (40_000, 40_000)}).save(tmp_path / "wide")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        found = run("resize", tmp_path / "wide", "--rank", 4000, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert_refused(found, "lora-ext resize: ", "memory")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_full_disk_leaves_existing_files_unchanged(limit, run, folders, tmp_path):
    one, two = folders
    before = contents(two)
    for out in (two, tmp_path / "deep" / "new"):
        for arguments in (("merge", one, two), ("resize", one, "--rank", 3)):
            with full_disk(limit):
                found = run(*arguments, "--out", out)
            assert_refused(found, f"{out}: cannot be written: File too large")
    assert contents(two) == before
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_interruption_leaves_existing_files_unchanged(run, folders, monkeypatch):
    one, two = folders
    before = contents(two)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    status, out, err = run("resize", one, "--rank", 2, "--out", two)
    assert (status, out, err) == (130, "", "lora-ext resize: interrupted\n")
    assert contents(two) == before


def test_internal_error_keeps_its_traceback(monkeypatch, folders):
    def broken(*_, **__):
        raise TypeError("a defect")

    monkeypatch.setattr("lora_ext.cli._reports.compare_adapters", broken)
    with pytest.raises(TypeError):
        cli.main(["diff", *map(str, folders)])


def test_rank_that_no_module_can_use_is_rejected_early(run, folders, tmp_path):
    out = tmp_path / "out"
    # The widths of the layers are 12, 20 and 24, so min(I, O) is at most 20.
    found = run("resize", folders[0], "--rank", 1_000_000, "--out", out)
    assert_refused(found, "--rank: expected at most 20", "1000000", str(folders[0]), "min(I, O)")
    assert_refused(run("resize", folders[0], "--rank", 21, "--out", out), "expected at most 20")
    assert not out.exists()
    status, _, _ = run("resize", folders[0], "--rank", 20, "--out", out)
    assert status == 0, "expected rank 20 for all modules, even the smaller one"
    assert {f.a.shape[0] for f in LoraAdapter.load(out).modules.values()} == {20}


def test_rank_that_is_already_too_large_may_stay_or_decrease(run, tmp_path):
    adapter(ranks=40).save(tmp_path / "large")
    for rank in (40, 30, 20):
        out = tmp_path / str(rank)
        assert run("resize", tmp_path / "large", "--rank", rank, "--out", out)[0] == 0
        assert {f.a.shape[0] for f in LoraAdapter.load(out).modules.values()} == {rank}
    found = run("resize", tmp_path / "large", "--rank", 41, "--out", tmp_path / "out")
    assert_refused(found, "--rank: expected at most 40")


def test_pickle_with_code_is_rejected_with_a_safe_remedy(run, folders):
    (folders[0] / "adapter_model.safetensors").unlink()
    torch.save({"lora_A": _Runs()}, folders[0] / "adapter_model.bin")
    found = run("inspect", folders[0])
    assert_refused(found, "adapter_model.bin", "mkdir", "adapter_model.safetensors")
    for advice in ("weights_only", "torch.load", "add_safe_globals", "trust", "Re-running"):
        assert advice not in found[2], f"found {advice}, which leads to loading the pickle"


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("executed",)

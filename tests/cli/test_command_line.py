"""``lora-ext``, run on adapters that PEFT saved, on hostile folders and on a full disk."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import peft
import pytest
import torch
from made_adapters import Q, adapter, delta
from safetensors.torch import load_file, save_file
from test_saving import contents, full_disk
from test_value import CASES, assert_peft_finds_every_key, llama, peft_model

import lora_ext
from lora_ext import cli
from lora_ext.adapter import LoraAdapter, compare_adapters, merge_adapters, resize_adapter
from lora_ext.adapter.peft_keys import natural_order
from lora_ext.cli import output
from lora_ext.methods import splora
from lora_ext.pool import AdapterPool

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(lora_ext.__file__).parent.parent
COMMANDS = ("doctor", "inspect", "merge", "resize", "prune", "diff")


@pytest.fixture
def run(capsys):
    """Run a command: its status, what it printed, and what it complained of."""

    def run(*arguments):
        try:
            status = cli.main([str(each) for each in arguments])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def run_json(run):
    def run_json(*arguments):
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, "")
        return json.loads(out)

    return run_json


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("one", "two")):
        adapter(seed).save(tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def as_process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "lora_ext", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def assert_refused(found, *words):
    """Status 2, nothing on standard output, one sentence on standard error."""
    status, out, err = found
    assert status == 2 and out == "", (out, err)
    assert err.count("\n") == 1 and "Traceback" not in err and err.startswith("lora-ext")
    for word in words:
        assert word in err


# -------------------------------------------------------------------------------------------------
# On what PEFT saved


@pytest.mark.parametrize("case", CASES)
def test_inspect_shows_every_module(case, run, run_json, tmp_path):
    peft_model(case).save_pretrained(tmp_path)
    value = LoraAdapter.load(tmp_path)
    status, out, err = run("inspect", tmp_path)
    assert (status, err) == (0, "")
    found = run_json("inspect", tmp_path)
    assert [row["module"] for row in found["modules"]] == sorted(value.modules, key=natural_order)
    for row in found["modules"]:
        assert re.search(rf"^{re.escape(row['module'])}\s+{row['r']}\s", out, re.M)
        spectrum = torch.linalg.svdvals(delta(value, row["module"]))
        assert row["norm"] == pytest.approx(float(spectrum.norm()))
        assert row["stable"] == pytest.approx(float((spectrum / spectrum[0]).square().sum()))
        assert row["threshold@0.01"] == int((spectrum > 0.01 * spectrum[0]).sum())
        assert row["bad"] == 0 and row["scaling"] == value.modules[row["module"]].scaling
    assert found["ranks"] == sorted({f.a.shape[0] for f in value.modules.values()})


def test_inspect_counts_what_is_not_finite(run, run_json, folders):
    path = folders[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, :3] = float("nan")
    tensors[f"base_model.model.{Q}.lora_B.weight"][0, 0] = float("inf")
    save_file(tensors, path)
    found = run_json("inspect", folders[0])
    rows = {row["module"]: row for row in found["modules"]}
    assert found["bad_values"] == rows[Q]["bad"] == 4 and rows[Q]["norm"] is None
    others = [row for name, row in rows.items() if name != Q]
    assert all(row["bad"] == 0 and row["norm"] > 0 for row in others)
    status, out, _ = run("inspect", folders[0], "--kinds", "participation", "absolute")
    assert status == 0 and re.search(r"participation +absolute@0.01 +bad", out)
    assert re.search(rf"{re.escape(Q)} .* - +- +- +4$", out, re.M)


@pytest.mark.parametrize("case", ["plain", "patterns", "bias", "regex"])
@pytest.mark.parametrize("mode", ["delta", "factors", "delta_svd"])
def test_merge_writes_what_the_function_returns(case, mode, run_json, tmp_path):
    folders = []
    for name in ("one", "two"):
        torch.manual_seed(len(folders))
        peft_model(case).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    out = tmp_path / "deep" / "out"
    found = run_json("merge", *folders, "--weights", 0.7, -0.2, "--mode", mode, "--out", out)
    assert LoraAdapter.load(out) == merge_adapters(folders, [0.7, -0.2], mode)
    assert found["weights"] == [0.7, -0.2] and found["out"] == str(out)
    base = CASES[case][0]()
    assert_peft_finds_every_key(base, out)
    AdapterPool(base, max_slots=1, max_rank=16).load("merged", out)


def test_merge_without_weights_is_the_mean_and_three_are_no_harder(run_json, folders, tmp_path):
    three = (*folders, folders[0])
    run_json("merge", *three, "--out", tmp_path / "out")
    assert LoraAdapter.load(tmp_path / "out") == merge_adapters(three, [1 / 3] * 3)
    run_json("merge", *three, "--weights", "0.5,0.25,1", "--out", tmp_path / "out")
    assert LoraAdapter.load(tmp_path / "out") == merge_adapters(three, [0.5, 0.25, 1])


def test_resize_writes_the_adapter_and_says_what_is_lost(run, run_json, folders, tmp_path):
    out = tmp_path / "out"
    found = run_json("resize", folders[0], "--rank", 2, "--out", out)
    wanted, errors = resize_adapter(folders[0], 2)
    assert LoraAdapter.load(out) == wanted
    for row in found["modules"]:
        assert row["error"] == pytest.approx(errors[row["module"]])
        assert row["relative"] == pytest.approx(row["error"] / row["norm"])
        assert (row["r_before"], row["r"]) == (4, 2)
    status, text, _ = run("resize", folders[0], "--rank", 9, "--out", folders[0])
    assert status == 0 and LoraAdapter.load(folders[0]) != wanted, "in place"
    assert re.search(rf"{re.escape(Q)} +4 +9 +\S+ +0 +0$", text, re.M)


def test_diff_of_two_and_of_one_with_itself(run, run_json, folders):
    found = run_json("diff", *folders)
    wanted = {each.module: each for each in compare_adapters(*folders)}
    for row in found["modules"]:
        each = wanted[row["module"]]
        assert row["distance"] == pytest.approx(each.distance)
        assert row["cosine"] == pytest.approx(each.cosine)
        assert torch.allclose(torch.tensor(row["angles"]).deg2rad(), torch.tensor(each.angles))
    total = sum(each.distance**2 for each in wanted.values()) ** 0.5
    assert found["distance"] == pytest.approx(total)
    same = run_json("diff", folders[0], folders[0])
    assert same["distance"] == 0.0 and same["cosine"] == pytest.approx(1.0)
    status, out, _ = run("diff", *folders)
    assert status == 0 and re.search(rf"{re.escape(Q)} +4/4 .* \d+\.\d \.\. \d+\.\d$", out, re.M)


def test_diff_says_what_it_does_not_compare(run, run_json, tmp_path):
    adapter(use_dora=True).save(tmp_path / "dora")
    assert run_json("diff", tmp_path / "dora", tmp_path / "dora")["not_compared"] == ["magnitude"]
    assert "not compared  magnitude" in run("diff", tmp_path / "dora", tmp_path / "dora")[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An adapter of PEFT's in eight modules, and the two models that SPLoRA compares."""
    folder = tmp_path_factory.mktemp("models")
    base, aligned = llama(), llama()
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    base.save_pretrained(folder / "base")
    aligned.save_pretrained(folder / "aligned", max_shard_size="20KB")
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    peft.get_peft_model(aligned, config).save_pretrained(folder / "adapter")
    return folder


def of(models):
    return models / "adapter", "--base", models / "base", "--aligned", models / "aligned"


def test_prune_takes_out_what_splora_singles_out(run, run_json, models, tmp_path):
    out = tmp_path / "out"
    found = run_json("prune", *of(models), "--num", 3, "--out", out)
    config = splora.SploraConfig(num=3)
    value = LoraAdapter.load(models / "adapter")
    wanted = splora.apply(value, models / "base", models / "aligned", config)
    assert LoraAdapter.load(out) == wanted.adapter and len(wanted.adapter.modules) == 5
    verdicts = {row["module"]: row["verdict"] for row in found["modules"]}
    assert {name for name, what in verdicts.items() if what == "pruned"} == set(wanted.pruned)
    scores = {row["module"]: row["score"] for row in found["modules"]}
    assert scores == pytest.approx({each.name: each.score for each in wanted.stats})
    assert found["pruned"] == 3 and found["direction"] == "smallest"
    assert_peft_finds_every_key(llama(), out)
    more = ("--threshold", 0.2, "--direction", "largest", "--projection", "orthogonal")
    status, text, err = run("prune", *of(models), *more, "--energy", 0.5, "--out", out)
    assert (status, err) == (0, "") and re.search(r"^direction +largest$", text, re.M)
    config = splora.SploraConfig(
        threshold=0.2, direction="largest", projection="orthogonal", energy=0.5
    )
    wanted = splora.apply(value, models / "base", models / "aligned", config)
    assert LoraAdapter.load(out) == wanted.adapter and 0 < len(wanted.pruned) < 8


def test_a_warning_is_one_line(run, models, tmp_path):
    out = ("--num", 1, "--projection", "orthogonal", "--out", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, text, err = run("prune", *of(models), *out)  # all directions: no distance is left
    assert status == 2 and text == ""
    assert [line.startswith("lora-ext prune: ") for line in err.splitlines()] == [True, True]
    assert "warning: " in err.splitlines()[0] and "spread" in err.splitlines()[1]


def test_prune_can_project_instead(run_json, models, tmp_path):
    found = run_json("prune", *of(models), "--num", 2, "--project", "--out", tmp_path / "out")
    chosen = [row["module"] for row in found["modules"] if row["verdict"] == "projected"]
    folders = models / "adapter", models / "base", models / "aligned"
    wanted = splora.project(*folders, chosen)
    assert len(chosen) == 2 and LoraAdapter.load(tmp_path / "out") == wanted
    assert len(wanted.modules) == 8


def test_prune_of_models_that_do_not_fit_is_one_sentence(run, models, tmp_path):
    out = ("--out", tmp_path / "out")
    other = adapter()
    other.save(tmp_path / "other")
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    base = ("--base", models / "base", "--aligned", models / "aligned", "--num", 1)
    same = ("--base", models / "base", "--aligned", models / "base", "--num", 1)
    empty = ("--base", models / "base", "--aligned", tmp_path, "--num", 1)
    nowhere = ("--base", models / "base", "--aligned", tmp_path / "nowhere", "--num", 1)
    for words, arguments in {
        Q: (tmp_path / "other", *base),
        "found 9": (models / "adapter", *base[:-1], 9),
        "q_proj": (models / "adapter", *empty),
        "nowhere": (models / "adapter", *nowhere),
        "self_attn": (models / "adapter", *same),
        "no modules": (models / "adapter", *base[:-1], 8),
    }.items():
        words = "expected an adapter with modules" if words == "no modules" else words
        assert_refused(run("prune", *arguments, *out), "lora-ext prune: ", words)
    assert not (tmp_path / "out").exists()


def test_doctor_as_json_and_as_text(run, run_json):
    found = run_json("doctor")
    assert found["ops"]["cpu"]["ok"] and "torch" in found["versions"]
    status, out, _ = run("doctor")
    assert status == 0 and "all good" in out


# -------------------------------------------------------------------------------------------------
# On what is wrong


def spoiled(folder, how):
    """A folder that is no adapter, in one of the ways that happen."""
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


def test_names_from_a_file_do_not_command_the_terminal(run, tmp_path):
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
def test_a_hostile_folder_is_one_sentence(how, run, folders, tmp_path):
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


def test_what_cannot_be_done_is_one_sentence(run, folders, tmp_path):
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
        "expected an integer from 0 to 2147483647": ("resize", one, "--rank", 10**30, *out),
        "--out: expected a folder, found ''": ("merge", one, two, "--out", ""),
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
        (),
        ("melt", "x"),
        ("merge", "x"),
        ("merge", "x", "y", "--out", "z", "--weights", "half"),
        ("merge", "x", "y", "--out", "z", "--mode", "ties"),
        ("resize", "x", "--out", "z"),
        ("resize", "x", "--rank", "two", "--out", "z"),
        ("inspect",),
        ("inspect", "x", "--kinds", "nuclear"),
        ("prune", "x", "--base", "b", "--aligned", "a", "--out", "z"),
        ("prune", "x", "--base", "b", "--aligned", "a", "--out", "z", "--num", 1, "--threshold", 1),
        ("diff", "x"),
    ],
)
def test_arguments_that_are_none_are_one_sentence(arguments, run):
    assert_refused(run(*arguments), "--help)")


def test_more_than_memory_holds_is_one_sentence(run, folders, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        found = run("resize", folders[0], "--rank", 10**8, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert_refused(found, "lora-ext resize: ", "memory")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_a_full_disk_leaves_what_was_there(limit, run, folders, tmp_path):
    one, two = folders
    before = contents(two)
    for out in (two, tmp_path / "deep" / "new"):
        for arguments in (("merge", one, two), ("resize", one, "--rank", 3)):
            with full_disk(limit):
                found = run(*arguments, "--out", out)
            assert_refused(found, f"{out}: cannot be written: File too large")
    assert contents(two) == before
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_an_interruption_leaves_what_was_there(run, folders, monkeypatch):
    one, two = folders
    before = contents(two)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    status, out, err = run("resize", one, "--rank", 2, "--out", two)
    assert (status, out, err) == (130, "", "lora-ext resize: interrupted\n")
    assert contents(two) == before


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch, folders):
    def broken(*_, **__):
        raise TypeError("a defect")

    monkeypatch.setattr("lora_ext.cli.reports.compare_adapters", broken)
    with pytest.raises(TypeError):
        cli.main(["diff", *map(str, folders)])


# -------------------------------------------------------------------------------------------------
# As a program


def test_help_of_all_commands_fits_a_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run("--help")
    assert status == 0 and all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)
    for arguments in (("--help",), *((name, "--help") for name in COMMANDS)):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80, arguments
    assert run("--version") == (0, f"lora_ext {lora_ext.__version__}\n", "")


def test_the_module_and_a_signal(folders, tmp_path):
    found = as_process("diff", *folders, "--json")
    assert found.returncode == 0 and json.loads(found.stdout)["distance"] > 0
    found = as_process("inspect", tmp_path / "nowhere")
    assert found.returncode == 2 and found.stderr.startswith("lora-ext inspect: ")
    assert found.stderr.count("\n") == 1
    code = (
        "import sys, time\n"
        "from lora_ext import cli\n"
        "from lora_ext.cli import changes\n"
        "changes.resize_adapter = lambda *a, **k: (print('ready', flush=True), time.sleep(60))\n"
        f"sys.exit(cli.main(['resize', {str(folders[0])!r}, '--rank', '2', '--out', 'x']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what it runs in the background with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and err == b"lora-ext resize: interrupted\n"


def test_a_reader_that_has_seen_enough_is_no_error(folders):
    command = f"{sys.executable} -m lora_ext inspect {folders[0]} | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.stderr == "" and found.stdout.strip() in ("0", "141")


def test_a_closed_output_and_one_of_few_letters_are_no_errors(tmp_path, monkeypatch):
    folder = tmp_path / "für"
    adapter().save(folder)
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    assert cli.main(["resize", str(folder), "--rank", "2", "--out", str(tmp_path / "a")]) == 0
    letters = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", letters)
    assert cli.main(["inspect", str(folder)]) == 0
    assert rb"f\xfcr" in letters.buffer.getvalue()
    assert letters.errors == "strict", "as it was"


def test_progress_is_for_terminals_alone(monkeypatch, capsys):
    items = ["a", "b"]
    assert output.progress(items) is items
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(output.progress(items)) == items
    assert capsys.readouterr().err == "", "nothing in the first second"
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert output.progress(items) is items, "where there is no tqdm"


def test_a_bar_appears_after_a_second_and_goes():
    """On standard error, where that is a terminal; standard output has the table alone."""
    code = (
        "import time\n"
        "from lora_ext.cli.output import progress\n"
        "for _ in progress(['a', 'b', 'c', 'd']):\n"
        "    time.sleep(0.5)\n"
        "print('table')\n"
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=slave
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while data := os.read(master, 4096):
            shown += data
    os.close(master)
    assert process.communicate(timeout=60)[0] == b"table\n" and process.returncode == 0
    assert b"3/4" in shown and shown.endswith(b"\r")


def test_modules_are_shown_as_they_follow_one_another(run_json, tmp_path):
    names = [f"layers.{i}.up" for i in range(12)]
    adapter(shapes=dict.fromkeys(names, (6, 5))).save(tmp_path)
    assert [row["module"] for row in run_json("inspect", tmp_path)["modules"]] == names


def test_cells_and_tables():
    rows = [
        {"module": "a.b", "r": 4, "x": 0.123456, "y": None},
        {"module": "c", "r": 12} | {"x": 1e9, "y": (1, 2)},
    ]
    assert output.table(rows).splitlines() == [
        "module   r       x     y",
        "a.b      4  0.1235     -",
        "c       12   1e+09  1, 2",
    ]


def test_peft_is_not_needed():
    """The commands read PEFT's files, and import neither PEFT nor transformers."""
    code = (
        "import sys; from lora_ext import cli; print({'peft', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "set()\n" and peft.__name__ == "peft"

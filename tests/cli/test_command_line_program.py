"""``lora-ext`` as a program: help, signals, closed outputs and progress bars."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import peft
import pytest
from cli.commands import ROOT, as_process
from made_adapters import adapter

import lora_ext
from lora_ext import cli
from lora_ext.cli import _output

pytestmark = pytest.mark.filterwarnings("ignore")
COMMANDS = ("doctor", "inspect", "merge", "resize", "prune", "diff")


def test_help_of_all_commands_fits_a_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run("--help")
    assert status == 0 and all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)
    for arguments in (("--help",), *((name, "--help") for name in COMMANDS)):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80, arguments
    assert run("--version") == (0, f"lora_ext {lora_ext.__version__}\n", "")


@pytest.mark.slow
def test_module_runs_as_a_program_and_handles_a_signal(folders, tmp_path):
    found = as_process("diff", *folders, "--json")
    assert found.returncode == 0 and json.loads(found.stdout)["distance"] > 0
    found = as_process("inspect", tmp_path / "nowhere")
    assert found.returncode == 2 and found.stderr.startswith("lora-ext inspect: ")
    assert found.stderr.count("\n") == 1
    code = (
        "import sys, time\n"
        "from lora_ext import cli\n"
        "from lora_ext.cli import _changes as changes\n"
        "changes.resize_adapter = lambda *a, **k: (print('ready', flush=True), time.sleep(60))\n"
        f"sys.exit(cli.main(['resize', {str(folders[0])!r}, '--rank', '2', '--out', 'x']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell without job control starts background jobs with this signal ignored.
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


@pytest.mark.slow
def test_pipe_closed_by_its_reader_is_no_error(folders):
    command = f"{sys.executable} -m lora_ext inspect {folders[0]} | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.stderr == "" and found.stdout.strip() in ("0", "141")


def test_closed_output_and_limited_encoding_are_no_errors(tmp_path, monkeypatch):
    folder = tmp_path / "für"
    adapter().save(folder)
    monkeypatch.setattr(sys, "stdout", None)  # Python's value for `>&-`
    assert cli.main(["resize", str(folder), "--rank", "2", "--out", str(tmp_path / "a")]) == 0
    letters = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", letters)
    assert cli.main(["inspect", str(folder)]) == 0
    assert rb"f\xfcr" in letters.buffer.getvalue()
    assert letters.errors == "strict", "found a changed error handler"


def test_progress_is_shown_only_on_terminals(monkeypatch, capsys):
    items = ["a", "b"]
    assert _output.progress(items) is items
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(_output.progress(items)) == items
    assert capsys.readouterr().err == "", "expected no output in the first second"
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert _output.progress(items) is items, "expected the items themselves without tqdm"


@pytest.mark.slow
def test_progress_bar_appears_after_a_second_and_is_removed():
    """Check also that the bar is written to standard error, and not to standard output."""
    code = (
        "import time\n"
        "from lora_ext.cli._output import progress\n"
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
    with contextlib.suppress(OSError):  # Reading fails once the process has ended.
        while data := os.read(master, 4096):
            shown += data
    os.close(master)
    assert process.communicate(timeout=60)[0] == b"table\n" and process.returncode == 0
    assert b"3/4" in shown and shown.endswith(b"\r")


def test_modules_are_sorted_by_number(run_json, tmp_path):
    names = [f"layers.{i}.up" for i in range(12)]
    adapter(shapes=dict.fromkeys(names, (6, 5))).save(tmp_path)
    assert [row["module"] for row in run_json("inspect", tmp_path)["modules"]] == names


def test_cells_and_tables_are_formatted():
    rows = [
        {"module": "a.b", "r": 4, "x": 0.123456, "y": None},
        {"module": "c", "r": 12} | {"x": 1e9, "y": (1, 2)},
    ]
    assert _output.table(rows).splitlines() == [
        "module   r       x     y",
        "a.b      4  0.1235     -",
        "c       12   1e+09  1, 2",
    ]


@pytest.mark.slow
def test_peft_is_not_needed():
    """Check that the commands read PEFT's files without importing PEFT or transformers."""
    code = (
        "import sys; from lora_ext import cli; print({'peft', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "set()\n" and peft.__name__ == "peft"

"""`make gpu` without a GPU: its calls are short enough, and what they run is there."""

import shutil
import subprocess
from types import ModuleType

import pytest
from scripts import load_script

from lora_ext.cli._arguments import make_parser


@pytest.fixture
def leg(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "tools", "gpu_leg")


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("compiler", ["/usr/bin/nvcc", None])
def test_a_call_takes_nine_minutes_at_most(call, compiler, leg, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    steps = leg.legs(call, "9.0a", tmp_path)
    assert sum(step.seconds for step in steps) <= 540
    assert {step.after for step in steps} <= {None, *(step.name for step in steps)}
    for step in steps:
        for word in step.command if isinstance(step.command, list) else ():
            if word.startswith(("tools/", "benchmarks/", "tests/")) or word == "setup.py":
                assert leg.ROOT.joinpath(word).exists(), word
            if word == "gpu-report":
                make_parser().parse_args(step.command[step.command.index(word) :])


@pytest.mark.slow
def test_the_probe_compiles(leg, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    command = ["nvcc", "-std=c++20", "-arch=sm_90a", "tools/gpu_probe.cu", "-o", tmp_path / "probe"]
    subprocess.run(command, cwd=leg.ROOT, check=True)


@pytest.mark.parametrize("how", [[], ["--overlap"]], ids=["siblings", "overlap"])
def test_the_captured_step_is_right_at_smallest_sizes(how, capsys, monkeypatch):
    step = load_script(monkeypatch, "benchmarks", "captured_step")
    assert step.main(["--tiny", "--rows", "6", *how]) == 0
    assert "6 rows, 6 adapters: right" in capsys.readouterr().out

"""`make gpu` without a GPU, and `make hosts`: their calls are short enough, and know what runs."""

import shutil
import subprocess
from types import ModuleType

import pytest
from scripts import load_script

import lora_ext
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


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "tools", "hosts")


def test_two_settings_run_side_by_side_and_a_failed_one_fails_all(hosts, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(hosts, "run", lambda legs, logs: ran.extend(legs) or 1)
    monkeypatch.setattr(hosts, "lacking", lambda env: None)
    monkeypatch.setattr(hosts, "processor", lambda: "Xeon")
    assert hosts.main() == 1
    assert "processor: Xeon" in capsys.readouterr().out
    assert [leg.name for leg in ran] == list(hosts.SETTINGS)
    assert abs(sum(leg.beside for leg in ran) - len(ran) / 2) < 1
    assert {leg.env["OMP_NUM_THREADS"] for leg in ran} == {"1", "3"}


def test_a_setting_that_the_processor_lacks_is_skipped_with_its_reason(hosts, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(hosts, "SETTINGS", {"plain": {}, "strange": {"LX_ISA": "avx1024"}})
    monkeypatch.setattr(hosts, "run", lambda legs, logs: ran.extend(legs) or 0)
    before = lora_ext._C.cpu_isa()
    assert hosts.main() == 0
    assert [leg.name for leg in ran] == ["plain"] and lora_ext._C.cpu_isa() == before
    assert "strange: skipped: set_cpu_isa: isa: expected" in capsys.readouterr().out

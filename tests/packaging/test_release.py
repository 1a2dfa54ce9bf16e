"""Release recipe: version and changelog, torch version of wheels, `make gpu` and `make hosts`."""

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scripts import ROOT, load_script, module_of, tool

import lora_ext
from lora_ext.cli._arguments import make_parser


def test_version_is_equal_everywhere_and_changes_are_in_order() -> None:
    for file, pattern in (
        ("pyproject.toml", r'^version = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
        ("CHANGELOG.md", r"^## (\S+)"),
    ):
        found = re.search(pattern, (ROOT / file).read_text(), re.M)
        assert found and found[1] == lora_ext.__version__, file
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert re.findall(r"^### (\w+)$", newest, re.M) == ["Added", "Changed", "Fixed"]


def test_every_step_of_the_recipe_has_a_known_command() -> None:
    page = (ROOT / "docs/releasing.md").read_text().split("\n## A release\n")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. .*?(?=^\d+\. |\Z)", page, re.M | re.S)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert len(steps) > 4
    for step in steps:
        (command,) = re.findall(r"^ *\$ (.+)$", step, re.M)
        name, first = command.split()[:2]
        assert name in ("git", "$EDITOR", "python", "pip") or (name == "make" and first in targets)


@pytest.mark.parametrize(("cuda", "local"), [(None, "torch2.13.cpu"), ("13.0", "torch2.13.cu130")])
def test_wheel_name_contains_the_torch_version(
    tmp_path: Path, cuda: str | None, local: str
) -> None:
    wheel = tmp_path / "lora_ext-0.2.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        out.writestr("lora_ext/_C.so", b"\0" * 9)
        requires = "Requires-Dist: torch>=2.11\nRequires-Dist: numpy\n"
        metadata = f"Name: lora_ext\nVersion: 0.2.0\n{requires}"
        out.writestr("lora_ext-0.2.0.dist-info/METADATA", metadata)
        out.writestr("lora_ext-0.2.0.dist-info/RECORD", "")
    made = tool("wheels").for_torch(wheel, "2.13.1+cpu", cuda)
    assert made.name == f"lora_ext-0.2.0+{local}-cp311-cp311-linux_x86_64.whl"
    assert not wheel.exists()
    found = zipfile.ZipFile(made)
    info = f"lora_ext-0.2.0+{local}.dist-info"
    assert found.namelist() == ["lora_ext/_C.so", f"{info}/METADATA", f"{info}/RECORD"]
    text = found.read(f"{info}/METADATA").decode()
    assert f"Version: 0.2.0+{local}\nRequires-Dist: torch==2.13.*\nRequires-Dist: numpy" in text
    record = found.read(f"{info}/RECORD").decode().splitlines()
    # SHA-256 of nine zero bytes, computed with openssl
    assert record[0] == "lora_ext/_C.so,sha256=PnB3_S9m1ongzuanz1s3vy3KfJea81bQoxy8XIVgXH0,9"
    assert record[2] == f"{info}/RECORD,,"


@pytest.fixture
def leg(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "tools", "gpu_leg")


@pytest.mark.parametrize("call", [0, 1, 2, 3])
@pytest.mark.parametrize("compiler", ["/usr/bin/nvcc", None])
def test_time_limits_of_a_call_sum_to_nine_minutes(call, compiler, leg, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    steps = leg.legs(call, "9.0a", tmp_path)
    prepared = [step.name for step in leg.preparations("9.0a")] if call < 2 else []
    assert [step.name for step in steps][: len(prepared)] == prepared
    assert sum(step.seconds for step in steps[len(prepared) :]) <= 540
    assert {step.after for step in steps} <= {None, *(step.name for step in steps)}
    for step in steps:
        for word in step.command if isinstance(step.command, list) else ():
            if word.startswith(("tools/", "benchmarks/", "tests/")) or word == "setup.py":
                assert leg.ROOT.joinpath(word).exists(), word
            if word == "gpu-report":
                make_parser().parse_args(step.command[step.command.index(word) :])


def test_only_initcheck_leaves_out_a_kernel(leg, tmp_path, monkeypatch):
    monkeypatch.setattr(leg, "sanitizer", lambda: "compute-sanitizer")
    steps = [step for call in (1, 2) for step in leg.legs(call, "9.0a", tmp_path)]
    words = {step.name: step.command for step in steps if step.name.startswith("sanitizer ")}
    assert len(words) == 4
    excluded = {
        name: [word for word in command if word.startswith("--kernel-name-exclude=")]
        for name, command in words.items()
    }
    assert excluded.pop("sanitizer initcheck") == ["--kernel-name-exclude=kns=lora_expand_kernel"]
    assert not any(excluded.values())
    assert " lora_expand_kernel<" in (ROOT / "kernels.lock").read_text()


def test_first_card_leaves_unconfirmed_values_and_does_not_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/emu"))
    goldens = tool("wrapper_goldens")
    golden, out, dumps = tmp_path / "wrappers.json", tmp_path / "out", {"vote": [1, 2]}
    assert goldens.judge("Card A", dumps, golden, None) == 1  # The values would be lost.
    assert goldens.judge("Card A", dumps, golden, out) == 0
    assert "unconfirmed" in capsys.readouterr().out
    found = json.loads((out / "wrappers.json").read_text())
    assert (found["status"], found["dumps"]) == ("unconfirmed", dumps)
    (out / "wrappers.json").rename(golden)  # The folder's file can become the golden file.
    assert goldens.judge("Card B", dumps, golden, out) == 0
    assert goldens.judge("Card B", {"vote": [1, 3]}, golden, out) == 1
    found = json.loads((out / "wrappers.json").read_text())
    assert (found["device"], found["status"]) == ("Card B", "different")


@pytest.mark.slow
def test_gpu_probe_compiles(leg, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    command = ["nvcc", "-std=c++20", "-arch=sm_90a", "tools/gpu_probe.cu", "-o", tmp_path / "probe"]
    subprocess.run(command, cwd=leg.ROOT, check=True)


def test_captured_step_is_correct_at_smallest_sizes(capsys, monkeypatch):
    step = load_script(monkeypatch, "benchmarks", "captured_step")
    assert step.main(["--tiny", "--rows", "6"]) == 0
    assert "6 rows, 6 adapters: correct" in capsys.readouterr().out


def test_captured_step_has_the_layers_that_memory_holds(monkeypatch):
    step = load_script(monkeypatch, "benchmarks", "captured_step")
    # Bytes of a layer of Llama-3-8B in bfloat16, and of 64 adapters of rank 16 on it
    layer = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    layer += 2 * 64 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert step.depth(80 << 30, 64) == 32
    for gib in (4, 8, 16):
        layers = step.depth(gib << 30, 64)
        assert layers * layer <= 0.8 * (gib << 30) < (layers + 1) * layer
    assert step.depth(1 << 20, 64) == 0
    model = step.make(2, 64, 128, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "tools", "hosts")


def test_two_settings_run_in_parallel_and_one_failure_fails_all(hosts, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(hosts, "run", lambda legs, logs: ran.extend(legs) or 1)
    monkeypatch.setattr(hosts, "lacking", lambda env: None)
    monkeypatch.setattr(hosts, "processor", lambda: "Xeon")
    assert hosts.main() == 1
    assert "processor: Xeon" in capsys.readouterr().out
    assert [leg.name for leg in ran] == list(hosts.SETTINGS)
    assert abs(sum(leg.beside for leg in ran) - len(ran) / 2) < 1
    assert {leg.env["OMP_NUM_THREADS"] for leg in ran} == {"1", "3"}


def test_setting_named_on_the_command_line_is_left_out(hosts, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(hosts, "run", lambda legs, logs: ran.extend(legs) or 0)
    assert hosts.main(["this processor"]) == 0
    assert "this processor" in hosts.SETTINGS and ran
    assert "this processor" not in [leg.name for leg in ran]
    assert "this processor: skipped: named on the command line" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="hosts: expected settings of"):
        hosts.main(["that"])


@dataclasses.dataclass(eq=False)
class Item:
    nodeid: str
    callspec: Any = None


def test_pairs_of_values_are_kept_and_combinations_are_left_out() -> None:
    product = [*itertools.product("ab", "rstu", "xyz")]
    items = [
        Item(f"t.py::test_f[{'-'.join(ids)}]", SimpleNamespace(_idlist=ids)) for ids in product
    ]
    others = [Item(f"t.py::test_two[{i}]", SimpleNamespace(_idlist=(i, "x"))) for i in "ab"]
    others.append(Item("t.py::test_plain"))
    select = module_of(ROOT / "tests/conftest.py", "conftest_of_all")._pairs

    def pairs(chosen: Iterable[Item]) -> set[Any]:
        ids = [item.callspec._idlist for item in chosen if item in items]
        return {pair for one in ids for pair in itertools.combinations(enumerate(one), 2)}

    kept = select([*items, *others], set())
    assert set(others) <= kept and pairs(kept) == pairs(items)
    assert len(kept) - len(others) == 4 * 3  # as few as the two longest parameters allow
    ran = {items[3], items[20]}
    rest = select([*items, *others], ran)
    assert pairs(rest | ran) == pairs(items) and len(rest) < len(kept)


def test_setting_that_the_processor_lacks_is_skipped_with_its_reason(hosts, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(hosts, "SETTINGS", {"plain": {}, "strange": {"LX_ISA": "avx1024"}})
    monkeypatch.setattr(hosts, "run", lambda legs, logs: ran.extend(legs) or 0)
    before = lora_ext._C.cpu_isa()
    assert hosts.main() == 0
    assert [leg.name for leg in ran] == ["plain"] and lora_ext._C.cpu_isa() == before
    assert "strange: skipped: set_cpu_isa: isa: expected" in capsys.readouterr().out

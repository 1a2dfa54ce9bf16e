"""The report of ``lora-ext gpu-report``, made with the emulator as the GPU, and its page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import tool
from torch.overrides import TorchFunctionMode

from lora_ext.cli import _gpu_cases, _gpu_report, main

gpu_page = tool("gpu_page")
ROOT = Path(__file__).resolve().parents[2]
SMALL = "lora_plan,lora_expand_,circuit_layers_walk"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, emulator: None) -> Path:
    out = tmp_path_factory.mktemp("report") / "card.json"
    assert main(["gpu-report", "--out", str(out), "--backend", "emu", "--only", SMALL]) == 0
    return out


@pytest.mark.emulated
def test_report_contains_the_checks_and_no_path_of_a_user(report: Path) -> None:
    found = json.loads(report.read_text())
    assert report.stat().st_size < 200_000
    assert found["checks"][0]["op"] == "lora_plan"
    assert all(check["ok"] and check["error"] <= check["bound"] for check in found["checks"])
    assert found["times"] == [] and found["card"]["name"] == "emulator"
    assert re.fullmatch("[0-9a-f]{64}", found["module"]) and found["module"] in gpu_page.hashes()
    assert not re.search(r"/(home|root|work|tmp|usr)", report.read_text())
    page = report.with_suffix(".md").read_text()
    assert "lora_plan" in page and "No times were measured" in page


def on_a_card(report: Path, tmp_path: Path, name: str = "Card A", **changes: Any) -> Path:
    """Return the path of a copy of the report that looks like the report of a real GPU."""
    found = json.loads(report.read_text())
    found["card"] = {"name": name, "capability": [9, 0]}
    found["times"] = [{"op": "lora_plan", "us": 6.0, "floor_us": 2.0}]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({**found, **changes}))
    return path


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "gpu.md"
    path.write_text((ROOT / "docs/gpu.md").read_text())
    return path


@pytest.mark.emulated
def test_reports_become_one_column_per_card(report: Path, page: Path, tmp_path: Path) -> None:
    cards = [on_a_card(report, tmp_path, name) for name in ("Card A", "Card B")]
    assert gpu_page.main([*map(str, cards), "--page", str(page)]) == 0
    text = page.read_text()
    assert "| op | Card A, us (over floor) | Card B, us (over floor) |" in text
    assert "| lora_plan | 6.0 (3.0) | 6.0 (3.0) |" in text


@pytest.mark.emulated
def test_report_of_another_build_has_its_own_column(
    report: Path, page: Path, tmp_path: Path
) -> None:
    times = [{"op": "lora_plan", "us": 7.0, "floor_us": 2.0}]
    other = on_a_card(report, tmp_path, "Card B", module="0" * 64, times=times)
    assert gpu_page.main([str(other), str(on_a_card(report, tmp_path)), "--page", str(page)]) == 0
    text = page.read_text()
    heads = "Card A, us (over floor) | Card B, other build 000000000000, us (over floor)"
    assert f"| op | {heads} |" in text
    assert "| lora_plan | 6.0 (3.0) | 7.0 (3.5) |" in text


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"module": None}, "expected the SHA-256 of the compiled module, found None"),
        (
            {"running": {"step": "check", "op": "lora_apply"}},
            "expected a report of all checks, found one that ended during lora_apply",
        ),
        ({"checks": [{"op": "lora_plan", "ok": False}]}, "found failures of lora_plan"),
        ({"checks": []}, "expected passed checks, found none"),
        ({"card": {"name": "emulator", "capability": None}}, "expected a GPU, found emulator"),
        ({"times": [{"op": 1}]}, "expected a report of lora-ext gpu-report"),
        ({"format": 2}, "expected format 1, found 2"),
    ],
)
def test_report_without_valid_checks_is_rejected(
    report: Path, page: Path, tmp_path: Path, changes: Any, reason: str
) -> None:
    before = page.read_text()
    with pytest.raises(SystemExit, match=reason):
        gpu_page.main([str(on_a_card(report, tmp_path, **changes)), "--page", str(page)])
    assert page.read_text() == before


FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}
COPIES = {"clone", "cpu", "from_numpy", "item", "numpy", "tensor", "tolist"}


class OnTheHost(TorchFunctionMode):
    """Mode that records calls that create a tensor on the host, or copy from or to it.

    A factory is such a call if it has no argument ``device``: the default device is the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(func, "__name__", ""), kwargs or {}
        made = name in FACTORIES and given.get("device") is None
        converted = name == "as_tensor" and not isinstance(args[0], torch.Tensor)
        if made or converted or name in COPIES:
            self.found.append(name)
        return func(*args, **given)


def timed(case: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the allocations on the host during the timed call of a case, at its small size."""
    seen = OnTheHost()

    def timer(call: Any, device: Any) -> list[float]:
        with seen:
            call()
        return [1.0]

    made = _gpu_report._inputs
    monkeypatch.setattr(_gpu_report, "_measured", timer)
    monkeypatch.setattr(_gpu_report, "_inputs", lambda case, size, device: made(case, 0, device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    entry = _gpu_report._time(case, device)
    assert entry["us"] == 1.0, entry
    return seen.found


@pytest.mark.emulated
@pytest.mark.parametrize("case", _gpu_cases.all_cases(), ids=lambda case: case.op)
def test_timed_call_creates_no_tensor_on_the_host(
    case: Any, emulated: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert timed(case, emulated, monkeypatch) == []


@pytest.mark.emulated
@pytest.mark.parametrize("case", _gpu_cases.all_cases(), ids=lambda case: case.op)
def test_timed_case_reads_all_inputs(case: Any, emulated: torch.device) -> None:
    """Check that the call reads every input, since the minimum time counts their bytes."""
    given = _gpu_report._inputs(case, 0, emulated)
    for missing in given.keys() - {"mask"}:  # the mask is optional
        with pytest.raises((KeyError, TypeError, ValueError), match=missing):
            case.run({name: given[name] for name in given if name != missing})


@pytest.mark.emulated
def test_tensor_that_a_timed_call_creates_on_the_host_is_found(
    emulated: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = (case for case in _gpu_cases.all_cases() if case.op == "lora_dropout")

    def prepare(of: Any, given: Any) -> Any:
        call = case.ready(given)
        return lambda: [*call(), torch.linspace(-1, 1, 9), given["x"].clone()]

    found = timed(replace(case, prepare=prepare), emulated, monkeypatch)
    assert found == ["linspace", "clone"]


def test_every_launcher_is_checked() -> None:
    headers = "\n".join(p.read_text() for p in (ROOT / "csrc/include").rglob("*.h"))
    launchers = set(re.findall(r"\blaunch_(\w+)\(", headers)) - {"status_string"}
    checked = {name for case in _gpu_cases.all_cases() for name in case.launchers}
    assert checked == launchers


def test_command_without_a_card_fails_with_a_message(tmp_path: Path, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is available")
    assert main(["gpu-report", "--out", str(tmp_path / "x.json")]) == 1
    assert "expected a GPU, found none" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()

"""Process that runs the cases of ``lora-ext gpu-report``: only a faulty case fails."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import faulty_cases
import pytest

from lora_ext.cli import _gpu_report, main
from lora_ext.cli._gpu_worker import Worker

ENDED = f"ended with status -{int(signal.SIGSEGV)}"


def test_case_after_a_fault_runs_in_a_new_process() -> None:
    with closing(Worker(faulty_cases.serve, "emu")) as worker:

        def process() -> int:
            entry = worker.run("check", "good")
            assert isinstance(entry, dict) and entry["op"] == "good"
            return entry["process"]

        assert worker.machine() == {"backend": "emu"}
        first = process()
        assert process() == first
        assert worker.run("check", "spoil") == {"op": "spoil", "process": first}
        second = process()
        assert worker.run("check", "crash") == ENDED
        third = process()
        worker._max_case_s = 0.0
        assert worker.run("check", "hang") == "gave no result in 0 s"
        worker._max_case_s = 60.0
        assert len({first, second, third, process()}) == 4


@pytest.fixture
def out(emulator: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(_gpu_report, "all_cases", faulty_cases.cases)
    monkeypatch.setattr(_gpu_report, "serve", faulty_cases.serve_cases)
    return tmp_path / "card.json"


@pytest.mark.emulated
def test_report_names_faults_and_continues(out: Path, monkeypatch: Any, capsys: Any) -> None:
    running, pages = [], []
    run = Worker.run

    def seen(worker: Worker, step: str, op: str) -> Any:
        running.append(json.loads(out.read_text())["running"])
        pages.append(out.with_suffix(".md").read_text())
        return run(worker, step, op)

    monkeypatch.setattr(Worker, "run", seen)
    assert main(["gpu-report", "--out", str(out), "--backend", "emu"]) == 1
    assert "found failures of wrong, crash" in capsys.readouterr().err
    report = json.loads(out.read_text())
    wrong, crash, good = report["checks"]
    assert not wrong["ok"] and wrong["error"] > 0.5
    assert not crash["ok"] and crash["found"] == f"The process {ENDED}."
    assert good["ok"] and report["running"] is None
    # The file names a case before it starts.
    assert running == [{"step": "check", "op": op} for op in ("wrong", "crash", "lora_shrink")]
    assert "Not finished: check of crash." in pages[1]

